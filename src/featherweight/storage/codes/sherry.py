"""3:4 ternary codes: of every four weights one is 0 and three are +-scale; 5 bits a quartet, 1.25 bits a weight.

Sherry (arXiv 2601.07892), its storage, with the index rule of llama.cpp's proposed type STQ1_0. A quartet with its zero
at lane z and first non-zero lane of sign f has the pattern 4 z + [2nd non-zero differs from f] + 2 [3rd differs], of 4
bits, and the sign bit [f = -1].

Stored: `patterns` uint8, bit string of 4 bits a quartet; `signs` uint8, one bit a quartet; `scales` [out, groups].
Quartets are row-major; lane p of quartet q of a span of 4 s columns is its column q + s p, where s = `lane_stride`: 1
for four neighbours, 16 as in STQ1_0. The last span of a row is padded; what stands there means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.native.packing import pack_bits, unpack_bits
from featherweight.registry import register
from featherweight.storage.codes.base import (
    Code,
    TensorLayout,
    dtype_from,
    dtype_name,
    grouped,
    groups_of,
    matrix_shape,
    ungrouped,
    whole_number,
)

STQ1_0_SPAN = 256  # weights a block of llama.cpp's type


def _all_quartets() -> list[list[int]]:
    """The trits of joint code 16 [f = -1] + pattern."""
    quartets = []
    for code in range(32):
        first = -1 if code & 16 else 1
        trits = [first, -first if code & 1 else first, -first if code & 2 else first]
        trits.insert(code >> 2 & 3, 0)
        quartets.append(trits)
    return quartets


# The device is named because modules may be imported while models are built on the meta device.
QUARTETS = torch.tensor(_all_quartets(), dtype=torch.int8, device="cpu")
"""int8 [32, 4]: the quartets of all joint codes, pattern + 16 times sign bit."""


def quartet_codes(trits: Tensor) -> Tensor:
    """Joint codes uint8 [...] of quartets [..., 4]. ValueError unless each holds one 0 and three of -1, 1."""
    values = trits.to(torch.int64)
    if bool(((values == 0).sum(-1) != 1).any()) or bool((values.abs() > 1).any()):
        raise ValueError("every quartet must hold exactly one 0 and three of -1 and 1")
    zero = (values == 0).to(torch.uint8).argmax(-1, keepdim=True)
    lanes = torch.arange(3, device=trits.device)
    kept = values.gather(-1, lanes + (lanes >= zero))
    differs = (kept != kept[..., :1]).long()
    code = 4 * zero.squeeze(-1) + differs[..., 1] + 2 * differs[..., 2] + 16 * (kept[..., 0] < 0)
    return code.to(torch.uint8)


def to_quartets(matrix: Tensor, lane_stride: int) -> Tensor:
    """[rows, columns] to [rows, quartets, 4], zeros behind the last column."""
    span = 4 * lane_stride
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % span))
    return padded.view(len(matrix), -1, 4, lane_stride).transpose(2, 3).reshape(len(matrix), -1, 4)


def from_quartets(quartets: Tensor, columns: int, lane_stride: int) -> Tensor:
    """The inverse of `to_quartets`: [rows, columns]."""
    rows = len(quartets)
    spans = quartets.reshape(rows, -1, lane_stride, 4).transpose(2, 3)
    return spans.reshape(rows, -1)[:, :columns].contiguous()


def trits_of(codes: Tensor, columns: int, lane_stride: int) -> Tensor:
    """Trits int8 [rows, columns] of joint codes [rows, quartets], where these are."""
    quartets = QUARTETS.to(codes.device)[codes.int()]
    return from_quartets(quartets.view(len(codes), -1, 4), columns, lane_stride)


@register("code", "sherry")
@dataclass(frozen=True)
class Sherry(Code):
    """See the module. `group_size` counts input columns; the last group of a row may be shorter."""

    patterns: Tensor  # uint8 [bytes]
    signs: Tensor  # uint8 [bytes]
    scales: Tensor  # [out, groups]
    shape: tuple[int, int]
    group_size: int
    lane_stride: int = 1

    @classmethod
    def encode(
        cls, codes: Tensor, scales: Tensor, shape: tuple[int, int], group_size: int, lane_stride: int = 1
    ) -> Sherry:
        """Pack joint codes uint8 [out, quartets] (see `quartet_codes`)."""
        flat = codes.reshape(-1)
        return cls(pack_bits(flat & 15, 4), pack_bits(flat >> 4, 1), scales, shape, group_size, lane_stride)

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "lane_stride": self.lane_stride,
            "scale_dtype": dtype_name(self.scales.dtype),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"patterns": self.patterns, "signs": self.signs, "scales": self.scales}

    def unpack(self) -> Tensor:
        """The trits: int8 [out, in]."""
        rows, columns = self.shape
        count = rows * quartets_of(columns, self.lane_stride)
        codes = unpack_bits(self.patterns, count, 4) | unpack_bits(self.signs, count, 1) << 4
        return trits_of(codes.view(rows, -1), columns, self.lane_stride)

    def decode(self) -> Tensor:
        scales = self.scales.float().repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]
        return self.unpack().float() * scales

    def decode_rows(self, first: int, last: int) -> Tensor:
        count = quartets_of(self.shape[1], self.lane_stride)
        if first * count % 8:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        patterns, signs = (
            tensor[first * count * bits // 8 : -(-last * count * bits // 8)]
            for tensor, bits in ((self.patterns, 4), (self.signs, 1))
        )
        shape = (last - first, self.shape[1])
        return Sherry(patterns, signs, self.scales[first:last], shape, self.group_size, self.lane_stride).decode()

    def stq1_0_blocks(self) -> Tensor:
        """The matrix in llama.cpp's proposed type STQ1_0: uint8 [blocks, 42], patterns, signs, fp16 scale a block.

        Raises
        ------
        ValueError
            the lanes, groups, columns or scales are not those of STQ1_0.
        """
        spans = (self.lane_stride, self.group_size, self.shape[1] % STQ1_0_SPAN, self.scales.dtype)
        if spans != (16, STQ1_0_SPAN, 0, torch.float16):
            raise ValueError("STQ1_0 needs lane_stride 16, group_size 256, columns in 256s and float16 scales")
        parts = (self.patterns.view(-1, 32), self.signs.view(-1, 8), self.scales.view(torch.uint8).view(-1, 2))
        return torch.cat(parts, 1)

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        lane_stride = whole_number(spec, "lane_stride", 1, 1 << 20)
        groups = groups_of(columns, whole_number(spec, "group_size", 1, 1 << 30))
        count = rows * quartets_of(columns, lane_stride)
        return {
            "patterns": TensorLayout((-(-count // 2),), torch.uint8),
            "signs": TensorLayout((-(-count // 8),), torch.uint8),
            "scales": TensorLayout((rows, groups), dtype_from(spec, "scale_dtype", "float16")),
        }

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Sherry:
        stored = (tensors["patterns"], tensors["signs"], tensors["scales"])
        return cls(*stored, matrix_shape(spec), spec["group_size"], spec["lane_stride"])

    def digits(self) -> Tensor:
        return grouped(self.unpack().unsqueeze(0), self.group_size, self.scales.shape[1])

    def digits_nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        relative = ungrouped(torch.where(scales < 0, -values, values), self.shape[1])
        quartets = to_quartets(relative, self.lane_stride)
        trits = torch.where(quartets < 0, -1, 1).to(torch.int8)
        trits.scatter_(-1, quartets.abs().argmin(-1, keepdim=True), 0)
        whole = from_quartets(trits, self.shape[1], self.lane_stride)
        return grouped(whole.unsqueeze(0), self.group_size, scales.shape[1])

    def all_together(self, flags: Tensor) -> Tensor:
        quartets = to_quartets(ungrouped((~flags).to(torch.int8), self.shape[1]), self.lane_stride)
        settled = (quartets.amax(-1, keepdim=True) == 0).to(torch.int8).expand_as(quartets)
        whole = from_quartets(settled, self.shape[1], self.lane_stride)
        return grouped(whole.unsqueeze(0), self.group_size, flags.shape[1])[0] > 0

    def with_digits(self, digits: Tensor) -> Sherry:
        quartets = to_quartets(ungrouped(digits[0], self.shape[1]).contiguous(), self.lane_stride)
        short = self.shape[1] % (4 * self.lane_stride) != 0
        codes = quartet_codes(_filled(quartets) if short else quartets)
        made = Sherry.encode(codes, self.scales, self.shape, self.group_size, self.lane_stride)
        return made


def _filled(quartets: Tensor) -> Tensor:
    """Quartets of a padded span [..., 4]: zeros beside the first one become 1, where nothing is read."""
    zeros = quartets == 0
    return torch.where(zeros & (zeros.cumsum(-1) > 1), 1, quartets).to(torch.int8)


def quartets_of(columns: int, lane_stride: int) -> int:
    """Quartets in a row, the last span padded."""
    return groups_of(columns, 4 * lane_stride) * lane_stride
