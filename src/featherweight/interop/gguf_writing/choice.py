"""Which type of ggml a tensor becomes, and what that costs: from spec and scales alone, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from featherweight.interop.exports import Fate
from featherweight.interop.gguf_writing.block_types import EXACT, TYPES, BlockType
from featherweight.interop.gguf_writing.integers import Form, forms_of
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
    form: Form | None = None
    negated: bool = False


def choose(tensor: StoredTensor, wishes: Wishes) -> Choice:
    """The type of a tensor."""
    if len(tensor.shape) != 2:
        return _plain(tensor, "F32")
    if tensor.spec is None:
        wanted = wishes.type or PLAIN.get(tensor.dtype, "F32")
        return _fitting(tensor, wanted) if wishes.type else _plain(tensor, wanted)
    found = None if wishes.type in ("F32", "F16", "BF16") else _of_integers(tensor, wishes)
    if found is not None:
        return found
    if wishes.lossless:
        return Choice(TYPES["F32"], "exact", f"no smaller type holds {describe_code(tensor.spec)}")
    return _fitting(tensor, wishes.type or wishes.other or "Q8_0", describe_code(tensor.spec))


def _of_integers(tensor: StoredTensor, wishes: Wishes) -> Choice | None:
    """The type of the fewest bits that takes the integers over."""
    forms = forms_of(tensor.code())
    names = [wishes.type] if wishes.type else list(EXACT)
    ternary = not wishes.type and wishes.ternary is not None
    if ternary and any(form.low >= -1 and form.high <= 1 and form.offsets is None for form in forms):
        names = [str(wishes.ternary), *(name for name in EXACT if name not in TERNARY)]
    reasons: dict[int, str | None] = {}  # by form: what fp16 does to it is looked at once
    for name in names:
        kind = TYPES.get(name)
        if kind is None or not kind.of_integers:
            continue
        for number, form in enumerate(forms):
            if not _holds(form, kind, tensor.shape[1]):
                continue
            if number not in reasons:
                reasons[number] = _rounding(form)
            choice = _taken_over(form, kind, reasons[number], tensor.shape[1])
            if choice is not None and (choice.fate == "exact" or not wishes.lossless):
                return choice
    return None


def _holds(form: Form, kind: BlockType, columns: int) -> bool:
    """Whether blocks of a type hold these integers, with scales of this sign or the other."""
    size = 16 if kind.name == "Q2_K" else kind.weights
    if not kind.fits_columns(columns) or (form.group_size % size and form.group_size < columns):
        return False
    if kind.offset != (form.offsets is not None) or (kind.name == "Q1_0" and not form.signs):
        return False
    negated = not kind.offset and kind.low <= -form.high and -form.low <= kind.high
    return negated or (kind.low <= form.low and form.high <= kind.high)


def _taken_over(form: Form, kind: BlockType, reason: str | None, columns: int) -> Choice | None:
    """The choice of a type that holds these integers; None where fp16 would change too much."""
    if reason is None:
        return None
    if kind.name == "Q2_K" and form.group_size % 256 and form.group_size < columns:
        reason = "trits as they are; scales of 16 weights have four bits"
    negated = not (kind.low <= form.low and form.high <= kind.high)
    return Choice(kind, "rounded" if reason else "exact", reason, form, negated)


def _rounding(form: Form) -> str | None:
    """What fp16 does to scales and offsets, "" where nothing; None where too much."""
    if form.scales.dtype == torch.float16:
        halves, rounded = form.scales, []
        if not bool(halves.isfinite().all()):
            return None
    else:
        scales = form.scales.float()
        halves = scales.half().float()
        if not bool(halves.isfinite().all()) or not bool(((halves - scales).abs() <= SCALE_LOSS * scales.abs()).all()):
            return None
        rounded = [] if torch.equal(halves, scales) else ["scales"]
    if form.offsets is not None:
        halves = form.offsets.half().float()
        lost = (halves - form.offsets).abs()
        if not bool(halves.isfinite().all()) or not bool((lost <= OFFSET_LOSS * form.scales.float().abs()).all()):
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
