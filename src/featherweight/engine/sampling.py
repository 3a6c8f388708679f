"""How the next token is chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherError


@dataclass(frozen=True)
class Sampling:
    """Applied in this order, as transformers does; the defaults take the likeliest token.

    Attributes:
        repetition_penalty: logits of tokens that have occurred are divided by it, negative ones multiplied
            (Keskar et al., arXiv:1909.05858).
        temperature: logits are divided by it; 0 takes the likeliest token, the lowest of equals.
        top_k: keep the k likeliest; 0 for all.
        top_p: keep the fewest likeliest that together have this probability (Holtzman et al., arXiv:1904.09751).
        min_p: keep those with at least this share of the likeliest one's probability (Nguyen et al., arXiv:2407.01082).
        seed: of the random numbers; the same seed and logits give the same tokens on every machine.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 1e6),
            ("top_k", 0, 2**62),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-6, 1e6),
        ):
            if not low <= getattr(self, name) <= high:
                raise FeatherError(f"{name} is {getattr(self, name)}, expected {low} to {high}")


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model folder says about generation: tokens that end a text, and settings where nobody else sets them."""

    stops: tuple[int, ...]
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def apply(
        self, sampling: Sampling, min_p: float | None = None, repetition_penalty: float | None = None
    ) -> Sampling:
        """`sampling` with the folder's settings where None is given."""
        return replace(
            sampling,
            min_p=self.min_p if min_p is None else min_p,
            repetition_penalty=self.repetition_penalty if repetition_penalty is None else repetition_penalty,
        )


def generation_defaults(folder: Path, config: dict[str, Any]) -> GenerationDefaults:
    """From generation_config.json, or else config.json; what makes no sense there is left out."""
    found: dict[str, Any] = {}
    try:
        loaded = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        found = loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError):
        found = {}
    stops = found.get("eos_token_id", config.get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [stops]
    penalty, min_p = found.get("repetition_penalty"), found.get("min_p")
    return GenerationDefaults(
        tuple(token for token in stops if isinstance(token, int) and not isinstance(token, bool)),
        float(penalty) if isinstance(penalty, int | float) and 1e-6 <= penalty <= 1e6 else 1.0,
        float(min_p) if isinstance(min_p, int | float) and 0 <= min_p <= 1 else 0.0,
    )
