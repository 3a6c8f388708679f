"""Trit-planes: W = sum over K planes of scale times ternary digit, scales per group of input columns.

PTQTP (arXiv 2509.16989), section 3, for K = 2 and free scales. K = 1 and 3 and tied scales (one scale s a group,
plane k weighted 3^(K-1-k) s, so that the planes are the digits of one balanced-ternary integer) are extensions.

Two tied planes may be weighted 3 to 2 instead of 3 to 1 (`weights`): the levels 0, 1, 2, 3, 5 times s on either side
lie closer to those of least error for a normal distribution (free planes end near this ratio, which is PTQTP's).

Stored: `trits` uint8 [K, bytes], each plane row-major over the whole matrix without padding between rows, five trits a
byte (base3, 1.6 bits) or four (2bit); `scales` [out, groups, K], tied [out, groups], fp16 unless they do not fit, or
`log8`: a byte u for the scale 2^(e - u/32), u = 255 for 0, with `scale_exponent` int8 [1], the e of the matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import shown
from featherweight.native.packing import TRITS_PER_BYTE, Packing, decode_trit_planes, pack_trits, unpack_trits
from featherweight.registry import register
from featherweight.storage.codes.base import (
    Code,
    Cut,
    TensorLayout,
    dtype_from,
    dtype_name,
    group_text,
    grouped,
    groups_of,
    matrix_shape,
    plural,
    ungrouped,
    whole_number,
)

LOG8 = "log8"
LOG8_STEPS = 32  # to a factor of two
LOG8_ZERO = 255
LOG8_LEAST = -112
"""The least exponent of one-byte scales: with it the smallest of them is still a normal float32."""
_LOG8_FRACTIONS = torch.tensor([2.0 ** (-k / LOG8_STEPS) for k in range(LOG8_STEPS)], dtype=torch.float32)


def log8_rounded(scales: Tensor) -> Tensor:
    """|scales| to the nearest power of 2^(1/32), in float32; 0 stays 0. The bytes of a matrix also limit the range."""
    steps = torch.round(torch.log2(scales.detach().double().abs()) * LOG8_STEPS)
    steps = steps.clamp(LOG8_LEAST * LOG8_STEPS, 127 * LOG8_STEPS)
    return torch.where(scales == 0, 0.0, _log8_values(steps.long())).to(torch.float32)


def log8_encode(scales: Tensor) -> tuple[Tensor, int]:
    """Bytes uint8 and exponent e of scales >= 0; those below 2^(e - 254/32) are raised to it."""
    scales = scales.detach().double()
    steps = torch.round(torch.log2(scales.clamp_min(2.0**LOG8_LEAST)) * LOG8_STEPS).long()
    top = int(steps.amax()) if scales.numel() and bool((scales > 0).any()) else 0
    exponent = max(LOG8_LEAST, min(127, -(-top // LOG8_STEPS)))
    codes = (exponent * LOG8_STEPS - steps).clamp(0, LOG8_ZERO - 1)
    return torch.where(scales > 0, codes, LOG8_ZERO).to(torch.uint8), exponent


def log8_reaches(scales: Tensor) -> bool:
    """Whether one byte a scale can hold these: all that are not 0 lie within 254/32 octaves, above 2^-112."""
    positive = scales.detach().double()
    positive = positive[positive > 0]
    if not positive.numel():
        return True
    steps = torch.round(torch.log2(torch.stack([positive.amin(), positive.amax()])) * LOG8_STEPS).long().tolist()
    exponent = -(-steps[1] // LOG8_STEPS)
    return bool(LOG8_LEAST <= exponent <= 127 and exponent * LOG8_STEPS - steps[0] < LOG8_ZERO)


def log8_decode(codes: Tensor, exponent: int) -> Tensor:
    """float32 scales of bytes uint8."""
    table = _log8_values(exponent * LOG8_STEPS - torch.arange(256, device="cpu"))
    table[LOG8_ZERO] = 0.0
    return table.to(torch.float32).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _log8_values(steps: Tensor) -> Tensor:
    """2^(steps / 32), the same bits on every machine."""
    whole = -torch.div(-steps, LOG8_STEPS, rounding_mode="floor")  # rounded up
    return torch.ldexp(_LOG8_FRACTIONS.to(steps.device)[whole * LOG8_STEPS - steps], whole.to(torch.int32))


def tied_weights(planes: int) -> tuple[int, ...]:
    """The powers of three that tie K planes unless a code says otherwise."""
    return tuple(3 ** (planes - 1 - k) for k in range(planes))


@register("code", "trit-planes")
@dataclass(frozen=True)
class TritPlanes(Code):
    """See the module. `group_size` counts input columns; the last group of a row may be shorter."""

    trits: Tensor  # uint8 [K, bytes]
    scales: Tensor  # [out, groups, K] or, tied, [out, groups]
    shape: tuple[int, int]
    group_size: int
    tied: bool = False
    packing: Packing = "base3"
    scale_format: str = "float"  # "log8": values are held as float32 and stored as bytes
    weights: tuple[int, ...] | None = None  # tied: integer weight of each plane; None: powers of three
    log8: tuple[Tensor, int] | None = field(default=None, init=False, repr=False)  # what is stored for `scales`

    def __post_init__(self) -> None:
        if self.scale_format == LOG8:
            self._hold(*log8_encode(self.scales.abs()))

    def _hold(self, codes: Tensor, exponent: int) -> None:
        """Scales as they are stored; `scales` is decoded when it is first asked for, which kernels never do."""
        object.__setattr__(self, "log8", (codes, exponent))
        object.__delattr__(self, "scales")

    def __getattr__(self, name: str) -> Tensor:
        if name != "scales" or self.log8 is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        scales = log8_decode(*self.log8)
        object.__setattr__(self, "scales", scales)
        return scales

    @classmethod
    def encode(
        cls,
        trits: Tensor,
        scales: Tensor,
        group_size: int,
        *,
        tied: bool = False,
        packing: Packing = "base3",
        scale_dtype: torch.dtype | str = torch.float16,
        weights: tuple[int, ...] | None = None,
    ) -> TritPlanes:
        """Pack `trits` int8 [K, out, in] in {-1, 0, 1} and round `scales` to their stored dtype, or to "log8"."""
        _, rows, columns = trits.shape
        packed = torch.stack([pack_trits(plane.reshape(-1), packing) for plane in trits])
        format, dtype = (LOG8, torch.float32) if isinstance(scale_dtype, str) else ("float", scale_dtype)
        return cls(packed, scales.to(dtype), (rows, columns), group_size, tied, packing, format, weights)

    @property
    def planes(self) -> int:
        return self.trits.shape[0]

    @property
    def plane_weights(self) -> tuple[int, ...]:
        """Tied: what the scale of a group is multiplied by for each plane."""
        return self.weights or tied_weights(self.planes)

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "kind": self.kind,
            "shape": list(self.shape),
            "planes": self.planes,
            "tied": self.tied,
            "group_size": self.group_size,
            "packing": self.packing,
        }
        if self.scale_format == LOG8:
            spec["scale_dtype"] = LOG8
        else:
            spec["scale_dtype"] = dtype_name(self.scales.dtype)
        if self.weights is not None:
            spec["weights"] = list(self.weights)
        return spec

    def tensors(self) -> dict[str, Tensor]:
        if self.log8 is None:
            return {"trits": self.trits, "scales": self.scales}
        codes, exponent = self.log8
        return {"trits": self.trits, "scales": codes, "scale_exponent": torch.tensor([exponent], dtype=torch.int8)}

    def unpack(self) -> Tensor:
        """The trits: int8 [K, out, in]."""
        count = self.shape[0] * self.shape[1]
        return torch.stack([unpack_trits(plane, count, self.packing).view(self.shape) for plane in self.trits])

    def decode(self) -> Tensor:
        return decode_trit_planes(self.trits, self._by_plane(self.scales), self.shape, self.group_size, self.packing)

    def _by_plane(self, scales: Tensor) -> Tensor:
        """Scales as the decoder takes them: tied ones with weights other than powers of three are spread out."""
        if self.weights is None or not self.tied:
            return scales
        return scales.float().unsqueeze(-1) * torch.tensor(self.weights, dtype=torch.float32)

    def decode_rows(self, first: int, last: int) -> Tensor:
        columns = self.shape[1]
        per_byte = TRITS_PER_BYTE[self.packing]
        if first * columns % per_byte:  # the rows begin inside a byte
            return super().decode_rows(first, last)
        trits = self.trits[:, first * columns // per_byte : -(-last * columns // per_byte)]
        shape = (last - first, columns)
        return decode_trit_planes(trits, self._by_plane(self.scales[first:last]), shape, self.group_size, self.packing)

    @classmethod
    def layout(cls, spec: dict[str, Any]) -> dict[str, TensorLayout]:
        rows, columns = matrix_shape(spec)
        planes = whole_number(spec, "planes", 1, 3)
        group_size = whole_number(spec, "group_size", 1, 1 << 30)
        packing = spec.get("packing", "base3")
        if packing not in TRITS_PER_BYTE:
            raise ValueError(f"packing is {shown(packing)}, expected {' or '.join(TRITS_PER_BYTE)}")
        groups = groups_of(columns, group_size)
        scales = (rows, groups) if spec.get("tied", False) else (rows, groups, planes)
        _weights_of(spec, planes)
        log8 = spec.get("scale_dtype") == LOG8
        dtype = torch.uint8 if log8 else dtype_from(spec, "scale_dtype", "float16")
        stored = {
            "trits": TensorLayout((planes, -(-rows * columns // TRITS_PER_BYTE[packing])), torch.uint8),
            "scales": TensorLayout(scales, dtype),
        }
        return stored | ({"scale_exponent": TensorLayout((1,), torch.int8)} if log8 else {})

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> TritPlanes:
        weights = _weights_of(spec, tensors["trits"].shape[0])
        code = cls(
            tensors["trits"],
            tensors["scales"],
            matrix_shape(spec),
            spec["group_size"],
            spec.get("tied", False),
            spec.get("packing", "base3"),
            "float",
            weights,
        )
        if spec.get("scale_dtype") == LOG8:  # after construction, which would find the bytes again, slowly
            exponent = int(tensors["scale_exponent"])
            if exponent < LOG8_LEAST:
                raise ValueError(f"scale_exponent is {exponent}, expected {LOG8_LEAST} to 127")
            object.__setattr__(code, "scale_format", LOG8)
            code._hold(tensors["scales"], exponent)
        return code

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> str:
        tied = "tied " if spec["tied"] else ""
        return f"{plural(spec['planes'], f'{tied}trit-plane')}{group_text(spec)}"

    @classmethod
    def summands(cls, spec: dict[str, Any]) -> int:
        return int(spec["planes"])

    @classmethod
    def prefix_of(cls, spec: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Cut]]:
        """Tied planes keep their weights, which are then no longer those of so many planes."""
        cuts = {name: Cut(name) for name in cls.layout(spec)} | {"trits": Cut("trits", 0, count)}
        if not spec.get("tied", False):
            return {**spec, "planes": count}, cuts | {"scales": Cut("scales", 2, count)}
        weights = (_weights_of(spec, spec["planes"]) or tied_weights(spec["planes"]))[:count]
        return {**spec, "planes": count, "weights": list(weights)}, cuts

    def group_levels(self, row: int, group: int) -> list[float]:
        scales = self.scales.float()[row, group].reshape(-1).tolist()
        if self.tied:
            scales = [scales[0] * weight for weight in self.plane_weights]
        sums = (
            sum(s * t for s, t in zip(scales, trits, strict=True))
            for trits in itertools.product((-1, 0, 1), repeat=len(scales))
        )
        return sorted(set(sums))

    @classmethod
    def of_rows(cls, parts: Sequence[Code]) -> TritPlanes:
        own = [part for part in parts if isinstance(part, TritPlanes)]
        first, trits, scales = own[0], torch.cat([p.unpack() for p in own], 1), torch.cat([p.scales for p in own])
        dtype = LOG8 if first.scale_format == LOG8 else scales.dtype
        return cls.encode(
            trits, scales, first.group_size, tied=first.tied, packing=first.packing, scale_dtype=dtype,
            weights=first.weights,
        )  # fmt: skip

    def row_fields(self) -> tuple[str, ...]:
        return ("scales",)

    def digits(self) -> Tensor:
        integers = self.unpack()
        if self.tied:
            weights = torch.tensor(self.plane_weights, dtype=torch.int8)
            integers = (integers * weights.view(-1, 1, 1)).sum(0, keepdim=True, dtype=torch.int8)
        return grouped(integers, self.group_size, self.scales.shape[1])

    def digits_nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        if not self.tied:
            return _nearest_trits(values, scales)
        integers, _ = self._integers()
        levels = integers.to(values.device, values.dtype)
        relative = values / torch.where(scales == 0, torch.ones_like(scales), scales)
        places = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
        return integers.to(values.device)[places].unsqueeze(0)

    def with_digits(self, digits: Tensor) -> TritPlanes:
        trits = ungrouped(digits, self.shape[1])
        if self.tied:
            integers, planes = self._integers()
            trits = planes[torch.searchsorted(integers, trits[0].contiguous())].movedim(-1, 0)
        packed = torch.stack(
            [pack_trits(plane.reshape(-1).contiguous(), self.packing) for plane in trits.to(torch.int8)]
        )
        return self.replaced({"trits": packed})  # type: ignore[return-value]

    def _integers(self) -> tuple[Tensor, Tensor]:
        """Tied: the integers int8 [n] that planes make up, rising, and trits int8 [n, planes] that make up each."""
        combinations = torch.tensor(list(itertools.product((-1, 0, 1), repeat=self.planes)), dtype=torch.int8)
        sums = (combinations * torch.tensor(self.plane_weights, dtype=torch.int8)).sum(1, dtype=torch.int8)
        integers, inverse = torch.unique(sums, return_inverse=True)
        first = torch.stack([(inverse == number).nonzero()[0, 0] for number in range(len(integers))])
        return integers, combinations[first]


def _nearest_trits(values: Tensor, scales: Tensor) -> Tensor:
    """Trits int8 [planes, out, groups, size] of the sums of scales [out, groups, planes] nearest to `values`."""
    planes, device = scales.shape[-1], values.device
    combinations = torch.tensor(list(itertools.product((-1, 0, 1), repeat=planes)), dtype=torch.int8, device=device)
    levels, order = (scales @ combinations.to(scales.dtype).t()).sort(-1)
    places = torch.zeros(values.shape, dtype=torch.uint8, device=device)
    for number in range(len(combinations) - 1):
        places += values > (levels[..., number : number + 1] + levels[..., number + 1 : number + 2]) / 2
    chosen = order.gather(-1, places.flatten(2).long()).view(values.shape)
    return torch.stack([plane[chosen] for plane in combinations.t().contiguous()])


def _weights_of(spec: dict[str, Any], planes: int) -> tuple[int, ...] | None:
    """The spec's own weights of tied planes. ValueError where they are not one small positive integer a plane."""
    weights = spec.get("weights")
    if weights is None:
        return None
    whole = isinstance(weights, list | tuple) and all(type(w) is int and 1 <= w <= 27 for w in weights)
    if not whole or len(weights) != planes or not spec.get("tied", False):
        raise ValueError(f"weights are {shown(weights)}, expected {planes} integers from 1 to 27 for tied planes")
    return tuple(weights)
