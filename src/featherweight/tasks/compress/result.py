"""What a compression gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.pages.render import bytes_text, render


@dataclass(frozen=True)
class Compression:
    """The result of `compress`. In a notebook it shows itself as a table.

    bits_per_weight : of the compressed layers of the blocks, everything stored for them
    bits_per_weight_linear : of all linear layers of the blocks, compressed or not
    bits_per_weight_outside : of embedding and output layer; None where they are kept
    layers : per layer name, code, spec, bits_per_weight, relative_error (Frobenius, of what is stored), nbytes
    resumed : layers found finished by an earlier run of the same command
    fates : how many tensors of the source were replaced, copied, changed, renamed, dropped; adds up to all of them
    """

    out: Path
    seconds: float
    peak_memory_bytes: int
    weights: int
    bits_per_weight: float
    bits_per_weight_linear: float
    bits_per_weight_model: float
    bytes: int
    layers: list[dict[str, Any]] = field(repr=False)
    tensors: dict[str, Any]
    recipe: dict[str, Any] = field(repr=False)
    resumed: int = 0
    already_complete: bool = False
    fates: dict[str, int] = field(default_factory=dict)
    bits_per_weight_outside: float | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"out": str(self.out)}

    def in_short(self) -> dict[str, Any]:
        """`to_json` without the records of layers and the recipe."""
        return {name: value for name, value in self.to_json().items() if name not in ("layers", "recipe")}

    def _repr_html_(self) -> str:
        """For notebooks."""
        worst = max(self.layers, key=lambda record: record["relative_error"])
        rows = [
            ("output", str(self.out)),
            ("recipe", str(self.recipe.get("name"))),
            ("bits per weight, all linear layers", f"{self.bits_per_weight_linear:.3f}"),
            ("bits per weight, whole model", f"{self.bits_per_weight_model:.3f}"),
            ("size", bytes_text(self.bytes)),
            ("largest relative error", f"{worst['relative_error']:.4f} ({worst['name']})"),
            ("time", f"{self.seconds:.1f} s"),
            ("peak memory", bytes_text(self.peak_memory_bytes)),
        ]
        if self.bits_per_weight_outside is not None:
            rows.insert(3, ("bits per weight, embedding and output layer", f"{self.bits_per_weight_outside:.3f}"))
        found = f"{self.resumed} of {len(self.layers)} layers were found finished"
        return render("facts.html.jinja", title="Compression", rows=rows, notes=[found] if self.resumed else [])
