"""What a fit has come to: the model, which layer got what, and what more or fewer bytes would buy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featherweight.system.units import size_text
from featherweight.tasks.compress.result import Compression
from featherweight.tasks.evaluate.result import Evaluation
from featherweight.tasks.fit.checking import LinearModel

BESIDE = ("out", "layers", "front", "recipe", "compression", "evaluation")
"""Fields that JSON has in another form, or not."""


@dataclass(frozen=True)
class LayerChoice:
    """One layer: its way's name, bytes stored, bits a weight, and the divergence its error was taken to be worth."""

    name: str
    role: str
    block: int | None
    choice: str
    bytes: int
    bits: float
    cost: float


@dataclass(frozen=True)
class FrontPoint:
    """A model that might have been made.

    bytes : of its weight files
    kl : nats a token; measured for the model that was made, else predicted from what was measured of layers
    perplexity : the same; None where the result was not compared with the original
    chosen : this is the model that was made
    """

    bytes: int
    kl: float
    perplexity: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Fit:
    """The result of `featherweight.fit`.

    out : the folder
    bytes : of its weight files on disk; budget : what they may be, None where pools were given
    parameters : of the model; layers : their choices, in the model's order
    front : from the smallest to the largest
    kl, perplexity, perplexity_of_original : on held-out text; None where that was not asked for
    predicted_kl, assembled_kl : on calibration text: of the choice by adding up, and truly, of the model put together
        from measured codes; None without text
    unrefined_kl, uniform_kl : likewise, of the first choice, and of the best of one way in all layers
    recipe : what `compress` was given
    sensitivity : how it was found what hangs on each layer
    linear_model : how far sums of worth times error predict true divergences; None where that was not checked
    tokens_per_second : of products with the chosen layers, by rates measured here; None where no floor was asked for
    notes : what was left out, a sentence each
    seconds : of this call
    compression : what `compress` gave back; None for a GGUF
    evaluation : of the result beside the original; None where that was not asked for
    tensor_types : options of llama.cpp's quantiser that make the same choice, a line each
    """

    out: Path
    bytes: int
    budget: int | None
    parameters: int
    layers: tuple[LayerChoice, ...]
    front: tuple[FrontPoint, ...]
    recipe: Mapping[str, Any]
    kl: float | None = None
    perplexity: float | None = None
    perplexity_of_original: float | None = None
    predicted_kl: float | None = None
    assembled_kl: float | None = None
    unrefined_kl: float | None = None
    uniform_kl: float | None = None
    sensitivity: str = "kl"
    linear_model: LinearModel | None = None
    tokens_per_second: float | None = None
    notes: tuple[str, ...] = field(default=())
    seconds: float = 0.0
    compression: Compression | None = field(default=None, repr=False)
    evaluation: Evaluation | None = field(default=None, repr=False)
    tensor_types: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Bits a parameter of the whole file."""
        return 8 * self.bytes / max(1, self.parameters)

    @property
    def choices(self) -> dict[str, int]:
        """How many layers went which way."""
        found: dict[str, int] = {}
        for layer in self.layers:
            found[layer.choice] = found.get(layer.choice, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-able; what is not known is null."""
        kept = {name: value for name, value in vars(self).items() if name not in BESIDE}
        return {
            **kept,
            "linear_model": None if self.linear_model is None else self.linear_model.to_json(),
            "notes": list(self.notes),
            "bits": self.bits,
            "layers": [asdict(layer) for layer in self.layers],
            "front": [asdict(point) for point in self.front],
            "recipe": dict(self.recipe),
        }

    def __str__(self) -> str:
        score = "" if self.kl is None else f", KL {self.kl:.4f}"
        return f"{self.out}: {size_text(self.bytes)}, {self.bits:.2f} bits a parameter{score}"
