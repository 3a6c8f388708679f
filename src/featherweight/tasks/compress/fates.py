"""What becomes of every tensor of the source: nothing is left out without a word, and the counts add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["replaced", "copied", "changed", "renamed", "dropped"]
KINDS: tuple[Kind, ...] = ("replaced", "copied", "changed", "renamed", "dropped")
RARE = ("changed", "renamed")  # said only where there are any


@dataclass(frozen=True)
class Fate:
    """name : of the tensor as the source stores it
    kind : replaced by codes, copied byte by byte, changed (other values or another type under its name), renamed (the
        same bytes under another name), or dropped
    reason : why, or what by
    becomes : its name in the output, or the names of the compressed modules; empty where it is dropped
    """

    name: str
    kind: Kind
    reason: str
    becomes: tuple[str, ...]


def fates_of(
    copied: Iterable[str],
    layers: Mapping[str, Sequence[tuple[str, str]]],
    dropped: Mapping[str, str],
    renamed: Mapping[str, str],
    plain: bool,
) -> tuple[Fate, ...]:
    """A fate for each of the source's tensors, sorted by name.

    Parameters
    ----------
    copied : Iterable[str]
        Tensors whose bytes are copied. Names are those without a wrapper's prefix, here and below.
    layers : Mapping[str, Sequence[tuple[str, str]]]
        Tensor -> name and code, in words, of each layer it holds.
    dropped : Mapping[str, str]
        Tensor -> reason.
    renamed : Mapping[str, str]
        Tensor -> name in the source, where it carries a prefix there.
    plain : bool
        The codes are plain values under the tensors' own names.
    """
    found = [Fate(renamed.get(name, name), "dropped", reason, ()) for name, reason in dropped.items()]
    for name in copied:
        if name in renamed:
            found.append(Fate(renamed[name], "renamed", "the prefix of a wrapper is taken off", (name,)))
        else:
            found.append(Fate(name, "copied", "the recipe compresses nothing in it", (name,)))
    for name, parts in layers.items():
        codes = ", ".join(dict.fromkeys(code for _, code in parts))
        stored = renamed.get(name, name)
        if plain:
            found.append(Fate(stored, "changed", f"stored as {codes}", (name,)))
        else:
            found.append(Fate(stored, "replaced", f"compressed to {codes}", tuple(layer for layer, _ in parts)))
    return tuple(sorted(found, key=lambda fate: fate.name))


def counts_of(fates: Iterable[Fate]) -> dict[str, int]:
    """How many tensors have which fate, by kind; the rare kinds only where there are any."""
    found = Counter(fate.kind for fate in fates)
    return _without_rare({kind: found[kind] for kind in KINDS})


def counts_in(tensors: Mapping[str, Any], is_source: Callable[[str], bool]) -> dict[str, int]:
    """`counts_of` for a finished output.

    Parameters
    ----------
    tensors : Mapping[str, Any]
        The entry `tensors` of its manifest, in which `copied` counts those that changed or were renamed, too.
    is_source : Callable[[str], bool]
        Whether the source has a tensor of this name: what calibration added has no fate.
    """
    changed = {name for name in tensors.get("changed", ()) if is_source(name)}
    renamed = set(tensors.get("renamed", ())) - changed
    counts = {
        "replaced": tensors["replaced"],
        "copied": tensors["copied"] - len(changed) - len(renamed),
        "changed": len(changed),
        "renamed": len(renamed),
        "dropped": len(tensors["dropped"]),
    }
    return _without_rare(counts)


def _without_rare(counts: dict[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count or kind not in RARE}


def counts_text(counts: Mapping[str, int]) -> str:
    """Counts for people: "14 replaced, 7 copied, 0 dropped"."""
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if kind in counts)
