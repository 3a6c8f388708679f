"""Which type of ggml a tensor becomes, and what that costs: from spec and scales alone, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from featherweight.interop.exports import Fate
from featherweight.interop.gguf_writing.block_types import EXACT, TYPES, BlockType
from featherweight.interop.gguf_writing.integers import Integers, forms_of
from featherweight.interop.gguf_writing.mixtures import FALLBACKS
from featherweight.interop.stored import StoredTensor
from featherweight.storage.codes import describe_code

SCALE_LOSS = 2.0**-10
"""What fp16 may change a scale by, as a part of it, for the integers to be taken over; of normal numbers half."""
OFFSET_LOSS = 1 / 16
"""What fp16 may change an offset by, as a part of the step."""
PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
TERNARY = ("Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "Q2_K")


@dataclass(frozen=True)
class Wishes:
    """What the settings ask for.

    type : of matrices, a name of TYPES; None: what suits what is stored
    ternary : of matrices of one plane of trits, or None
    other : of codes that are no integers with scales, or None
    lossless : rather a larger type than other values
    """

    type: str | None = None
    ternary: str | None = None
    other: str | None = None
    lossless: bool = False


@dataclass(frozen=True)
class Choice:
    """type : what is written; form : the integers that are taken over, None where values are encoded anew; negated :
    with scales of the other sign; fate, why : as of `Verdict`"""

    type: BlockType
    fate: Fate
    why: str = ""
    form: Integers | None = None
    negated: bool = False


def choose(tensor: StoredTensor, wishes: Wishes) -> Choice:
    """The type of a tensor."""
    if len(tensor.shape) != 2:
        return _plain(tensor, "F32")
    if tensor.spec is None:
        wanted = wishes.type or PLAIN.get(tensor.dtype, "F32")
        return _fitting(tensor, wanted) if wishes.type else _plain(tensor, wanted)
    found = [] if wishes.type in ("F32", "F16", "BF16") else _candidates(tensor, wishes)
    if found:
        return found[0]
    if wishes.lossless:
        return Choice(TYPES["F32"], "exact", f"no smaller type holds {describe_code(tensor.spec)}")
    return _fitting(tensor, wishes.type or wishes.other or "Q8_0", describe_code(tensor.spec))


def _candidates(tensor: StoredTensor, wishes: Wishes) -> list[Choice]:
    """Types that take the integers over, from the fewest bits up."""
    forms = forms_of(tensor.code())
    names = [wishes.type] if wishes.type else list(EXACT)
    ternary = not wishes.type and wishes.ternary is not None
    if ternary and any(form.low >= -1 and form.high <= 1 and form.offsets is None for form in forms):
        names = [str(wishes.ternary), *(name for name in EXACT if name not in TERNARY)]
    found = []
    for name in names:
        kind = TYPES.get(name)
        if kind is None or not kind.of_integers:
            continue
        for form in forms:
            choice = _taken_over(form, kind, tensor.shape[1])
            if choice is not None and (choice.fate == "exact" or not wishes.lossless):
                found.append(choice)
    return found


def _taken_over(form: Integers, kind: BlockType, columns: int) -> Choice | None:
    """The choice of a type for these integers; None where it does not hold them."""
    size = 16 if kind.name == "Q2_K" else kind.weights
    if not kind.fits_columns(columns) or (form.group_size % size and form.group_size < columns):
        return None
    if kind.offset != (form.offsets is not None) or (kind.name == "Q1_0" and not form.signs):
        return None
    negated = not (kind.low <= form.low and form.high <= kind.high)
    if negated and (kind.offset or not (kind.low <= -form.high and -form.low <= kind.high)):
        return None
    reason = _rounding(form)
    if reason is None:
        return None
    if kind.name == "Q2_K" and form.group_size % 256 and form.group_size < columns:
        reason = "trits as they are; scales of 16 weights have four bits"
    return Choice(kind, "rounded" if reason else "exact", reason, form, negated)


def _rounding(form: Integers) -> str | None:
    """What fp16 does to scales and offsets, "" where nothing; None where too much."""
    scales = form.scales
    halves = scales.half().float()
    if not bool(halves.isfinite().all()) or not bool(((halves - scales).abs() <= SCALE_LOSS * scales.abs()).all()):
        return None
    rounded = [] if torch.equal(halves, scales) else ["scales"]
    if form.offsets is not None:
        halves = form.offsets.half().float()
        lost = (halves - form.offsets).abs()
        if not bool(halves.isfinite().all()) or not bool((lost <= OFFSET_LOSS * scales.abs()).all()):
            return None
        rounded += [] if not bool(lost.any()) else ["offsets"]
    return f"codes as they are; {' and '.join(rounded)} rounded to fp16" if rounded else ""


def _plain(tensor: StoredTensor, name: str) -> Choice:
    exact = torch.promote_types(tensor.dtype, torch.float32) == torch.float32 or name != "F32"
    return Choice(TYPES[name], "exact" if exact else "rounded", "" if exact else f"{tensor.dtype} rounded to float32")


def _fitting(tensor: StoredTensor, name: str, of: str = "") -> Choice:
    """Values encoded as a type, or as the one that stands in for it where rows are no whole blocks of it."""
    columns, why = tensor.shape[1], f"{of} decoded and rounded" if of else "rounded"
    kind = TYPES[name]
    while not kind.fits_columns(columns):
        kind = TYPES[FALLBACKS.get(kind.name, "F16")]
    if kind.name != name:
        why = f"{why}; {columns} columns are no whole blocks of {name}"
    if tensor.spec is None and (kind.name == PLAIN.get(tensor.dtype) or kind.name == "F32"):
        return _plain(tensor, kind.name)
    exact = kind.name == "F32"
    return Choice(kind, "exact" if exact else "rounded", "" if exact else why)


def describe_choice(choice: Choice) -> dict[str, Any]:
    """Fields of a `Verdict`."""
    return {"becomes": choice.type.name, "fate": choice.fate, "bits": choice.type.bits, "why": choice.why}
