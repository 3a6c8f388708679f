"""What a report is about: a model and its compressed variants, with whatever is known of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from featherweight.pages.render import bytes_text


@dataclass(frozen=True)
class Variant:
    """One row of the report. Whatever is missing is left out of the page, or said to be missing.

    evaluation : as of `feather eval --json`
    compression : as of `feather compress --json`
    record : of the run, as `featherweight.storage.run.record` has it under `compression`
    speed : as of `feather bench --json`
    sample : text that the variant wrote
    recipe : its recipe
    histograms : results of `levels.histogram_of`
    family : variants of a family share a colour; the first word of the name if not given
    original : it is the uncompressed model
    command : what made it
    missing : sentences about what is not known of it, and how to come by it
    """

    name: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    compression: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)
    sample: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    histograms: Sequence[Mapping[str, Any]] = ()
    family: str = ""
    original: bool = False
    command: str = ""
    missing: Sequence[str] = ()

    @classmethod
    def of(cls, data: Variant | Mapping[str, Any]) -> Variant:
        """From a mapping with the same fields; unknown ones and nulls are ignored."""
        if isinstance(data, cls):
            return data
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in data.items() if k in known and v is not None}  # type: ignore[union-attr]
        return cls(**{"name": "unnamed", **given})

    def number(self, *path: str) -> float | None:
        """A finite number of the evaluation, or of another part after its name; None if there is none."""
        parts = {"compression": self.compression, "record": self.record, "speed": self.speed}
        return number_in(parts.get(path[0], self.evaluation), *(path[1:] if path[0] in parts else path))

    def text(self, *path: str) -> str:
        """Something of the record in words; "" if it is not there."""
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, str) else ""

    @property
    def perplexity(self) -> float | None:
        return self.number("perplexity")

    @property
    def linear_bits(self) -> float | None:
        return first_of(self.number("bits_per_weight", "linear"), self.number("compression", "bits_per_weight"))

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """Records of its compressed layers."""
        found = self.compression.get("layers")
        return [layer for layer in found if isinstance(layer, Mapping)] if isinstance(found, list | tuple) else []

    @property
    def tasks(self) -> list[Mapping[str, Any]]:
        """What was recorded of each task."""
        found = self.evaluation.get("tasks")
        return [task for task in found if isinstance(task, Mapping)] if isinstance(found, list | tuple) else []

    @property
    def group(self) -> str:
        """The family, by whatever it is known."""
        return self.family or (self.name.split() or [""])[0]


@dataclass(frozen=True)
class Page:
    """All variants, the original apart, with what several sections need."""

    variants: list[Variant]
    originals: list[Variant]
    families: dict[str, int]
    perplexity: float | None

    @classmethod
    def of(cls, variants: Iterable[Variant]) -> Page:
        everything = list(variants)
        originals = [v for v in everything if v.original]
        rest = [v for v in everything if not v.original]
        names = dict.fromkeys(v.group for v in rest)
        given = [v.perplexity for v in originals] + [v.number("perplexity_against") for v in rest]
        return cls(rest, originals, {name: i for i, name in enumerate(names)}, first_of(*given))

    @property
    def rows(self) -> list[Variant]:
        """The original first."""
        return [*self.originals, *self.variants]

    def series(self, variant: Variant) -> int:
        """The number of its family, which gives colour and marker."""
        return self.families.get(variant.group, 0)

    def excess(self, variant: Variant) -> float | None:
        """Per cent above the original's perplexity."""
        if variant.perplexity is None or not self.perplexity or variant.original:
            return None
        return 100 * (variant.perplexity / self.perplexity - 1)


def number_in(data: Any, *path: str) -> float | None:
    """A finite number within mappings; None if there is none."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    usable = isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data)
    return float(data) if usable else None


def first_of(*values: float | None) -> float | None:
    """The first that is there."""
    return next((value for value in values if value is not None), None)


def findings(page: Page) -> list[tuple[str, str, str]]:
    """(label, value, note) of what a reader wants to know first."""
    found = []
    if page.perplexity:
        original = page.originals[0] if page.originals else None
        stored = original.number("bytes") if original else None
        note = "perplexity" + (f", {bytes_text(stored)}" if stored else "")
        found.append(("Original", f"{page.perplexity:,.4g}", note))
    measured = [(v, e, b) for v in page.variants if (e := page.excess(v)) is not None and (b := v.linear_bits)]
    whole = all(v.number("bytes") for v, _, _ in measured)

    def size(variant: Variant, bits: float) -> float:
        """Of the whole file, where all are known: an embedding that is kept may be half of it."""
        return (variant.number("bytes") or 0.0) if whole else bits

    def facts(variant: Variant, excess: float, bits: float) -> str:
        return f"{excess:+.2f} %, {bytes_text(size(variant, bits))}" if whole else f"{excess:+.2f} % at {bits:.2f} bits"

    if measured:
        best = min(measured, key=lambda m: (m[1], size(m[0], m[2])))
        found.append(("Closest to it", best[0].name, facts(*best)))
    for limit in (1, 5, 10, 30, 50):
        near = [m for m in measured if m[1] <= limit]
        if near:
            best = min(near, key=lambda m: (size(m[0], m[2]), m[1]))
            if best[0].name not in [value for _, value, _ in found]:
                found.append((f"Smallest within {limit} %", best[0].name, facts(*best)))
    return found[:4]
