"""`GpuOperand`: a weight matrix, or a term of one, as the GPU reads it.

Layout. A row's columns are cut into its groups (the columns with one scale), a group into elements of P weights, one
element being what is decoded together: a 32-bit word of fields, a few such words, a byte of trits. Element e of a group
of G columns, of E = ceil(G / P) elements, holds columns e, E + e, 2 E + e, ...: position i of all elements of a group
is then a contiguous run of columns, so activations are read in runs whatever the kernel. Groups are padded to whole
elements; no element has weights of two groups, so a scale belongs to an element.

Fields that fill one word (1, 2, 4 or 8 bits) lie in quads: a shift and a mask leave four codes, one a byte, and these
are four neighbouring columns, which four int8 activations in a word face. With F = 8 / b fields a byte, position
i = F b + j of element e, in byte b, is column 4 (j E + e) + b of the group.

Rows run fastest in memory: codes are [planes, elements, words, rows], scales [planes, groups, rows], rows padded to
`ROW_TILE`. Neighbouring lanes of a warp thus read neighbouring rows of the same element: loads are coalesced, a lane
adds up rows of its own, and an activation is one broadcast load for the warp instead of one load a lane. Of ternary
kernels built the other way round it is reported that reading activations is what limits them.

| scheme | element | bits a weight (group 128, before scales) |
|---|---|---|
| fields | b / gcd(b, 32) words of 32 bits, 32 / gcd(b, 32) fields of b bits, lowest first | b |
| digits | a byte of five trits | 1.625 a plane |
| digits, nine levels | 16 bits of five pairs of tied trits | 3.25 |
| table | as fields, with codebooks [groups, rows, 2^b] | b |
| quartets | a word of eight patterns and a byte of eight signs: Sherry's 32 weights | 1.25 |

Digits are kept as a fixed-point fraction, ceil(v 2^w / L^5) for the number v of five digits of base L, first digit
first: a product with L carries the next digit into the bits above w, so no division is needed to decode.

Fields hold uniform codes, and trit-planes in 2 bits; tied planes are one field, the level sum_k w_k (t_k + 1).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROW_TILE = 128
"""Rows are padded to a multiple of this, so that kernels need no mask along rows when they read weights."""

SLICE = 32
"""Rows of a slice of a sparse term: they have one length, so that their entries lie side by side."""

FIELDS, DIGITS, TABLE, QUARTETS = 0, 1, 2, 3
DENSE, LOW_RANK, SPARSE = 4, 5, 6
SCHEMES = ("fields", "digits", "table", "quartets", "dense", "low-rank", "sparse")


@dataclass(frozen=True)
class Step:
    """What happens to the input before the product, in order: gather, factors, block-Hadamard, rounding.

    `tensor`: for "permute" int64 [in], for "scale" [in], for "hadamard" the signs int8 [in]; None for "round".
    `block`: the order of the Hadamard matrix, or columns with one step of rounding to `bits` bits.
    """

    kind: str
    tensor: Tensor | None = None
    block: int = 0
    bits: int = 0


@dataclass(frozen=True)
class Layout:
    """Numbers that say how packed weights lie (the module's docstring) and what their codes mean.

    A weight is scale (code - zero), summed over planes; zero is `zero`, or an entry of the tensor `zeros`.
    """

    bits: int  # of a code: fields and tables store this many, digits have codes below 2^bits
    words: int  # 32-bit words an element
    positions: int  # weights an element
    group_size: int
    groups: int
    group_elements: int
    planes: int = 1
    zero: int = 0
    weights: tuple[int, ...] = ()  # tied digit planes: one scale for all, times these
    exponent: int | None = None  # of log8 scales: 2^(exponent - byte / 32), byte 255 is 0
    lane_stride: int = 1
    quads: bool = False  # the codes that a mask leaves in the bytes of a word are neighbouring columns

    @property
    def elements(self) -> int:
        """Elements of a row."""
        return self.groups * self.group_elements

    @property
    def even(self) -> bool:
        """Whether elements fill groups, without padding."""
        return self.positions * self.group_elements == self.group_size


@dataclass(frozen=True)
class GpuOperand:
    """One term of a weight matrix, packed once at load.

    Attributes
    ----------
    kind : the kind of code it was made from.
    scheme : one of FIELDS, DIGITS, TABLE, QUARTETS, DENSE, LOW_RANK, SPARSE.
    shape : (out_features, in_features).
    tensors : packed: `codes`, `scales`, and where present `zeros`, `tables`, `signs`; dense: `weight`;
        low-rank: `left` [rank, rows], `right` [rank, in]; sparse: `starts`, `columns`, `values`.
    layout : how packed weights lie, None for the other schemes.
    steps : what happens to the input first.
    """

    kind: str
    scheme: int
    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    layout: Layout | None = None
    steps: tuple[Step, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes read by one matrix-vector product, padding included."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def padded_rows(self) -> int:
        return -(-self.shape[0] // ROW_TILE) * ROW_TILE

    @property
    def packed(self) -> bool:
        """Whether it has codes, which the kernels of `matvec` and `tiles` multiply with."""
        return self.scheme <= QUARTETS

    @property
    def int8_ready(self) -> bool:
        """Whether there is a product with int8 activations: fields that fill words and groups, in tiles of 32 or more.

        A rounded activation has a scale for the weights' group, of at most 2^16 columns.
        """
        layout = self.layout
        if self.scheme != FIELDS or layout is None or layout.words != 1:
            return False
        return layout.group_size % 32 == 0 and layout.group_size <= 1 << 16 and layout.even

    def to(self, device: torch.device | str) -> GpuOperand:
        """A copy whose tensors are on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        steps = tuple(
            step if step.tensor is None else dataclasses.replace(step, tensor=step.tensor.to(device))
            for step in self.steps
        )
        return dataclasses.replace(self, tensors=tensors, steps=steps)

    def describe(self) -> dict[str, Any]:
        """What a report needs: kind, scheme, shape, bytes, bits per weight."""
        return {
            "kind": self.kind,
            "scheme": SCHEMES[self.scheme],
            "shape": list(self.shape),
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
        }
