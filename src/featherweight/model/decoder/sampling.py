"""How the next token is chosen: what the user gave, else what the model's folder says, else our defaults.

Both engines read the folder's settings here, so that they mean the same to both. Seeds: one text's random numbers are a
function of its seed alone; texts that are to differ get seeds derived from one (`derived_seed`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, FeatherError
from featherweight.model.text.plain import read_object

FILE_NAME = "generation_config.json"
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e6),
    "top_k": (0, 2**62),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
}
OURS = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Where neither the user nor the folder says anything."""
FOREIGN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), (1, 1.0)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty"), (1.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), ()),
    **dict.fromkeys(("top_h", "min_length", "min_new_tokens", "penalty_alpha", "max_time", "stop_strings"), ()),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers"), ()),
    **dict.fromkeys(("constraints", "force_words_ids", "prompt_lookup_num_tokens", "token_healing"), ()),
}
"""Settings of transformers that change the text and that the native decoder lacks, with values that do nothing."""
MAY_BE_ZERO = ("forced_bos_token_id", "forced_eos_token_id")


@dataclass(frozen=True)
class Sampling:
    """Applied in this order, as transformers does; the defaults take the likeliest token.

    Attributes
    ----------
    repetition_penalty : logits of tokens that have occurred are divided by it, negative ones multiplied
        (Keskar et al., arXiv:1909.05858).
    temperature : logits are divided by it; 0 takes the likeliest token, the lowest of equals.
    top_k : keep the k likeliest; 0 for all.
    top_p : keep the fewest likeliest that together have this probability (Holtzman et al., arXiv:1904.09751).
    min_p : keep those with at least this share of the likeliest one's probability (Nguyen et al., arXiv:2407.01082).
    seed : of the random numbers; the same seed and logits give the same tokens on every machine. None: the model
        goes on with its own, so that no two calls share random numbers and a program's run is repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in RANGES:
            if reason := _out_of_range(name, getattr(self, name)):
                raise FeatherError(reason)
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise FeatherError(f"seed is {_shown(self.seed)}, expected a whole number")


def derived_seed(seed: int, index: int) -> int:
    """The seed of the text number `index` among those made from one seed; of the first, the seed itself."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model folder says about generation.

    Attributes
    ----------
    stops : tokens that end a text.
    settings : of `Sampling` by name, where the folder sets them; temperature 0 where it asks for the likeliest.
    foreign : what it asks for beside that, each as "num_beams 4": transformers does it, the native decoder does not.
    """

    stops: tuple[int, ...]
    settings: Mapping[str, float]
    foreign: tuple[str, ...] = ()

    def sampling(self, given: Mapping[str, float | None], seed: int | None = None) -> Sampling:
        """What is `given`, else what the folder says, else our defaults."""
        chosen = OURS | dict(self.settings) | {name: value for name, value in given.items() if value is not None}
        return Sampling(**{name: chosen[name] for name in OURS}, seed=seed)  # type: ignore[arg-type]


def generation_defaults(folder: Path, config: Mapping[str, Any]) -> GenerationDefaults:
    """From generation_config.json, or else config.json. CheckpointError where a setting makes no sense."""
    path = folder / FILE_NAME
    found: Mapping[str, Any] = read_object(path)
    nested = config.get("text_config")
    layers = (config, nested if isinstance(nested, Mapping) else {})
    where = str(path)
    if not found:
        found, where = {**layers[1], **layers[0]}, str(folder / "config.json")
    stops = next((v for part in (found, *layers) if (v := part.get("eos_token_id")) is not None), None)
    return GenerationDefaults(_stops(stops, where), _settings(found, where), _foreign(found))


def _settings(found: Mapping[str, Any], where: str) -> dict[str, float]:
    settings: dict[str, float] = {}
    for name in RANGES:
        value = found.get(name)
        if value is None:
            continue
        value = int(value) if name == "top_k" and isinstance(value, float) and value.is_integer() else value
        if reason := _out_of_range(name, value):
            raise CheckpointError(f"in {where}, {reason}: correct or remove the entry")
        settings[name] = value
    sampled = found.get("do_sample")
    if sampled not in (None, True, False):
        raise CheckpointError(f"in {where}, do_sample is {_shown(sampled)}, expected true or false: correct the entry")
    if sampled is not None:
        settings["temperature"] = settings.get("temperature", 1.0) if sampled else 0.0
    return settings


def _stops(found: Any, where: str) -> tuple[int, ...]:
    stops = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in stops):
        raise CheckpointError(
            f"in {where}, eos_token_id is {_shown(found)}, expected a token's number or a list of them: "
            "correct or remove the entry"
        )
    return tuple(token for token in stops if 0 <= token < 2**31)


def _foreign(found: Mapping[str, Any]) -> tuple[str, ...]:
    asked = []
    for name, neutral in FOREIGN.items():
        value = found.get(name)
        nothing = not value and name not in MAY_BE_ZERO and not isinstance(value, Mapping)  # {} asks for defaults
        off = value is None or value is False or value in neutral or nothing
        if not off:
            asked.append(f"{name} {_shown(value)}")
    return tuple(asked)


def _out_of_range(name: str, value: Any) -> str | None:
    """Why a setting cannot be used, None if it can."""
    low, high = RANGES[name]
    kinds = int if name == "top_k" else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or math.isnan(value):
        return f"{name} is {_shown(value)}, expected a {'whole ' if name == 'top_k' else ''}number"
    return None if low <= value <= high else f"{name} is {value}, expected {low} to {high}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
