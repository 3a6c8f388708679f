"""Calibration text as a mixture of sources by weight: `[{self: 0.1}, {corpus.txt: 0.9}]`.

Weights are shares of windows, made whole by the largest remainders (Hamilton's method). A source is what
`featherweight.model.text.documents` reads, `shipped` for the text that comes with the package, or `self`:
conversations that the original model writes through its own chat template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import CalibrationError, shown

SELF, SHIPPED = "self", "shipped"
STATISTICS_SUFFIX = ".safetensors"
"""Of files that take the place of text."""


@dataclass(frozen=True)
class Mixture:
    """sources : names, each once; weights : of each, not negative, at least one positive, of any sum"""

    sources: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, text: Any) -> Mixture:
        """From a source (None: the shipped text), "SOURCE=WEIGHT,SOURCE=WEIGHT", or a list of {source: weight}.

        Raises CalibrationError where that is no mixture; whether files exist is `check`'s to see.
        """
        if isinstance(text, cls):
            return text
        if text is None:
            return cls((SHIPPED,), (1.0,))
        if isinstance(text, str | Path):
            pairs = _written(str(text))
        elif isinstance(text, Mapping):
            pairs = list(text.items())
        elif isinstance(text, Sequence):
            pairs = [pair for entry in text for pair in _entry(entry)]
        else:
            raise _unreadable(text)
        return cls._checked([(str(name), weight) for name, weight in pairs])

    @classmethod
    def _checked(cls, pairs: list[tuple[str, Any]]) -> Mixture:
        for name, weight in pairs:
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise CalibrationError(
                    f"the weight of the calibration text {name} is {shown(weight)}, expected a number of at least 0"
                )
        names = [name for name, _ in pairs]
        for name in names:
            if not name.strip():
                raise CalibrationError("a calibration text has no name: write SOURCE=WEIGHT, like self=0.1")
            if names.count(name) > 1:
                raise CalibrationError(f"the calibration text {name} is named twice: give it one weight")
        if not any(weight > 0 for _, weight in pairs):
            raise CalibrationError(
                f"the weights of the calibration texts ({', '.join(names) or 'none are named'}) are all zero: "
                "give at least one of them more"
            )
        return cls(tuple(names), tuple(float(weight) for _, weight in pairs))

    @property
    def used(self) -> tuple[str, ...]:
        """Sources with a weight above zero."""
        return tuple(name for name, weight in zip(self.sources, self.weights, strict=True) if weight > 0)

    @property
    def single(self) -> str | None:
        """The source where it is the only one."""
        return self.used[0] if len(self.used) == 1 else None

    def dump(self) -> list[dict[str, float]]:
        """As recipes hold it."""
        return [{name: weight} for name, weight in zip(self.sources, self.weights, strict=True)]

    def counts(self, windows: int) -> dict[str, int]:
        """How many of so many windows come from each source in use: whole numbers that add up, each less than one
        from its share. Of equal remainders the source that is named first has the window."""
        total = math.fsum(self.weights)
        shares = {n: windows * w / total for n, w in zip(self.sources, self.weights, strict=True) if w > 0}
        found = {name: math.floor(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: found[name] - shares[name])
        for name in by_remainder[: windows - sum(found.values())]:
            found[name] += 1
        return found

    def check(self) -> None:
        """CalibrationError where a source is none that can be read, before anything is computed."""
        for name in self.used:
            if name in (SELF, SHIPPED) or name.startswith("hf:"):
                continue
            if not Path(name).expanduser().exists():
                raise CalibrationError(
                    f"there is no calibration file {name}; a text is {SELF}, {SHIPPED}, hf:NAME, or the path of a file "
                    "or folder"
                )
            if name.endswith(STATISTICS_SUFFIX) and self.single is None:
                raise CalibrationError(f"{name} is a file of statistics, which is not mixed with text: give it alone")


def spread(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Every (source, number within it) in an order in which any run of windows has about the shares of the whole:
    number j of k stands at the place (j + 1/2) / k."""
    places = [((2 * j + 1) / (2 * k), source, j) for source, k in enumerate(counts) for j in range(k)]
    return [(source, j) for _, source, j in sorted(places)]


def _written(text: str) -> list[tuple[str, Any]]:
    """A source, or several with weights; a file whose name looks like the latter is the former."""
    if "=" not in text or text.startswith("hf:") or Path(text).expanduser().exists():
        return [(text, 1.0)]
    pairs: list[tuple[str, Any]] = []
    for part in text.split(","):
        name, equals, weight = part.rpartition("=")
        if not equals:
            raise _unreadable(text)
        try:
            pairs.append((name.strip(), float(weight)))
        except ValueError:
            pairs.append((name.strip(), weight))
    return pairs


def _entry(entry: Any) -> list[tuple[Any, Any]]:
    if isinstance(entry, str | Path):
        return [(entry, 1.0)]
    if isinstance(entry, Mapping) and entry:
        return list(entry.items())
    raise _unreadable(entry)


def _unreadable(text: Any) -> CalibrationError:
    return CalibrationError(
        f"the calibration text {shown(text)} is no mixture: write SOURCE=WEIGHT,SOURCE=WEIGHT, or in a recipe "
        "[{self: 0.1}, {corpus.txt: 0.9}]"
    )
