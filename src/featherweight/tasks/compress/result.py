"""What a compression gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.pages.render import bytes_text, render
from featherweight.tasks.compress.earlier import earlier_text, most_error


@dataclass(frozen=True)
class Compression:
    """The result of `compress`. In a notebook it shows itself as a table.

    bits_per_weight : of the compressed layers of the blocks, everything stored for them
    bits_per_weight_linear : of all linear layers of the blocks, compressed or not
    bits_per_weight_outside : of embedding and output layer; None where they are kept
    layers : per layer name, code, spec, bits_per_weight, relative_error (Frobenius, of what is stored), nbytes
    resumed : layers found finished by an earlier run of the same command
    source : of a source that was compressed before, what is known of that (`earlier_loss`); None for plain weights
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
    source: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def loss_before(self) -> list[tuple[str, str]]:
        """Rows about a source that was compressed before: what it was, and how much both losses are at most."""
        known = {"source": self.source, "layers": self.layers}
        most, text = most_error(known), earlier_text(known)
        bound = [("error against what that was made from", f"at most {most[0]:.4f} ({most[1]})")] if most else []
        return [("the source", text), *bound] if text else []

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"out": str(self.out)}

    def in_short(self) -> dict[str, Any]:
        """`to_json` without the records of layers, the recipe and what is known of the source."""
        return {name: value for name, value in self.to_json().items() if name not in ("layers", "recipe", "source")}

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
            *self.loss_before,
            ("time", f"{self.seconds:.1f} s"),
            ("peak memory", bytes_text(self.peak_memory_bytes)),
        ]
        if self.bits_per_weight_outside is not None:
            rows.insert(3, ("bits per weight, embedding and output layer", f"{self.bits_per_weight_outside:.3f}"))
        found = f"{self.resumed} of {len(self.layers)} layers were found finished"
        return render("facts.html.jinja", title="Compression", rows=rows, notes=[found] if self.resumed else [])
