"""One trit-plane whose codes follow from learned factors of a group, softly at first: the parametrisation of CAT-Q.

CAT-Q: Cost-efficient and Accurate Ternary Quantization for LLMs (arXiv 2606.26650). With w' the weight, changed by a
low-rank product that is merged into it, a group has mu0 = mean w', al0 = mean |w' - mu0| + 1e-6, and three factors:

    mu = mu0 + (2 sigmoid(b) - 1) al0,   al = 2 sigmoid(a) al0,   D = sigmoid(c),   h = (w' - mu) / al.

Its trits are T = clamp(round(h / (2 D)), -1, 1), and what stands for w' is al T: mu chooses codes and is dropped. While
training is soft, T is the sum of two steps of tanh of a sharpness s. Reconstructed: that mu0 and al0 follow w' as the
low-rank change moves it, with gradients; that the gradient of the hard T goes straight through the rounding and stops
at the clamp; that hard values have scales as they will be stored; and the low-rank factors' start, that of LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featherweight.methods.quantize.decoding import TunableCode
from featherweight.methods.quantize.row_grid import grouped
from featherweight.storage.codes.base import Code
from featherweight.storage.codes.trit_planes import TritPlanes

FACTORS = ("a", "b", "c")
LEFT, RIGHT = "left", "right"
LEAST = 1e-6  # is added to a group's mean deviation
THRESHOLD = 0.5  # of h, where c is 0


@dataclass(frozen=True)
class LowRankChange:
    """W + scale B A is what is rounded, B [out, rank] and A [rank, in]; both change by `unit` where factors change by
    1, which makes their learning rate that share of the factors'. rank 0: the weight stays."""

    rank: int = 64
    scale: float = 1.0
    unit: float = 0.2


def modulation(weight: Tensor, there: Tensor, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """mu, al and D [out, groups, 1] of groups.

    weight : [out, groups, size], 0 where nothing is `there` bool [groups, size]
    factors : a, b and c [out, groups, 1]
    """
    count = there.sum(-1, keepdim=True)
    mean = weight.sum(-1, keepdim=True) / count
    deviation = ((weight - mean).abs() * there).sum(-1, keepdim=True) / count + LEAST
    a, b, c = (2 * torch.sigmoid(factors[name]) for name in FACTORS)
    return mean + (b - 1) * deviation, a * deviation, c * THRESHOLD


def soft_trits(h: Tensor, sharpness: float, threshold: Tensor) -> Tensor:
    """[tanh(s (h - D)) + tanh(s (h + D))] / (2 tanh s): near h for a small s, the hard step for a large one."""
    both = torch.tanh(sharpness * (h - threshold)) + torch.tanh(sharpness * (h + threshold))
    return both / (2 * float(torch.tanh(torch.tensor(sharpness, dtype=torch.float64, device="cpu"))))


def hard_trits(h: Tensor, threshold: Tensor) -> Tensor:
    """clamp(round(h / (2 D)), -1, 1), where h = D gives 0; the gradient goes straight through the rounding."""
    ratio = h * THRESHOLD / threshold
    return (ratio.round().detach() + (ratio - ratio.detach())).clamp(-1, 1)


class ModulatedCode(TunableCode):
    """A code of one trit-plane, within whatever is around it, as a function of three factors a group.

    `parameters` have PATH.a, PATH.b and PATH.c float32 [out, groups, 1] for the part that the original matrix was
    rounded to, and PATH.left [out, rank] and PATH.right [rank, in] of the low-rank change; of other parts what a
    `TunableCode` has. The code that is given lends its form only: what its factors give at 0 is CAT-Q's start.

    Parameters
    ----------
    code : of which there is one trit-plane: see `one_plane`
    weight : float32 [out, in] of the original
    device : see `TunableCode`
    """

    def __init__(
        self,
        code: Code,
        weight: Tensor,
        device: torch.device | None = None,
        change: LowRankChange | None = None,
        *,
        prefix: str = "",
        within: Any = None,
    ) -> None:
        self._change = change or LowRankChange()
        self._within: tuple[Code, Tensor] = code.opened(weight)[:2] if within is None else within
        self._sharpness: float | None = None
        super().__init__(code, prefix, device)
        self._modulated = code is self._within[0]
        if self._modulated:
            assert one_plane(code)
            self._digits = None  # they follow from the factors
            values, self._there = grouped(self._within[1], code.group_size)  # type: ignore[attr-defined]
            self._weight = values.to(self.device)
            self._there = self._there.to(self.device)
        self._within = (self._within[0], torch.empty(0, device="cpu"))  # it has served

    def _part(self, code: Code, prefix: str) -> TunableCode:
        whole = self._within[1]
        return ModulatedCode(code, whole, self.device, self._change, prefix=prefix, within=self._within)

    def soften(self, sharpness: float | None) -> None:
        """Decode with soft trits of this sharpness from now on; None: with hard ones, and scales as they are stored."""
        self._sharpness = sharpness
        for child in self._leaves():
            if isinstance(child, ModulatedCode):
                child.soften(sharpness)

    @property
    def parameters(self) -> dict[str, Tensor]:
        if not self._modulated:
            return super().parameters
        rows, columns = self.code.shape
        groups = torch.zeros(*self._weight.shape[:2], 1, device=self.device)
        found = {self._prefix + name: groups.clone() for name in FACTORS}
        rank = min(self._change.rank, rows, columns)
        if rank:
            random = torch.Generator(device="cpu").manual_seed(0)
            right = torch.rand(rank, columns, generator=random, device="cpu") * 2 - 1
            found[self._prefix + LEFT] = torch.zeros(rows, rank, device=self.device)
            found[self._prefix + RIGHT] = (right / columns**0.5).to(self.device)
        return found

    @property
    def units(self) -> dict[str, Tensor]:
        """Factors change by themselves, the low-rank change by its own unit."""
        found: dict[str, Tensor] = {}
        if self._modulated:
            one = torch.ones((), device=self.device)
            found = {self._prefix + name: one for name in FACTORS}
            found |= {self._prefix + name: one * self._change.unit for name in (LEFT, RIGHT)}
        for child in self._leaves():
            found |= child.units
        return found

    def decode(self, parameters: Mapping[str, Tensor]) -> Tensor:
        if not self._modulated:
            return super().decode(parameters)
        names = [*FACTORS, *(name for name in (LEFT, RIGHT) if self._prefix + name in parameters)]

        def value(*tensors: Tensor) -> Tensor:
            al, trits = self._rounded(dict(zip(names, tensors, strict=True)), self._sharpness)
            if self._sharpness is None:
                al = self._scales(al).to(al.device).float() + (al - al.detach())
            return (al * trits).flatten(1)[:, : self.code.shape[1]]

        # what is between is made again on the way back, layer by layer, in place of being kept for all of them
        tensors = [parameters[self._prefix + name] for name in names]
        found: Tensor = checkpoint(value, *tensors, use_reentrant=False, preserve_rng_state=False)
        return found

    def _rounded(self, values: Mapping[str, Tensor], sharpness: float | None) -> tuple[Tensor, Tensor]:
        """al [out, groups, 1] and trits [out, groups, size], soft or hard."""
        weight = self._weight
        if LEFT in values:
            changed = self._change.scale * (values[LEFT] @ values[RIGHT])
            weight = weight + grouped(changed, weight.shape[2])[0]
        mu, al, threshold = modulation(weight, self._there, values)
        h = (weight - mu) / al
        return al, hard_trits(h, threshold) if sharpness is None else soft_trits(h, sharpness, threshold)

    def _scales(self, al: Tensor) -> Tensor:
        """As they are stored, in main memory, in al's shape."""
        return self._with_scales(al).scales.view(al.shape)

    def _with_scales(self, al: Tensor) -> TritPlanes:
        assert isinstance(self.code, TritPlanes)
        scales = al.detach().to("cpu", self.code.scales.dtype).view(self.code.scales.shape)
        return self.code.replaced({"scales": scales})  # type: ignore[return-value]

    def stored(self, parameters: Mapping[str, Tensor]) -> Code:
        if not self._modulated:
            return super().stored(parameters)
        own = {name.removeprefix(self._prefix): value for name, value in parameters.items()}
        al, trits = self._rounded({name: value.detach() for name, value in own.items()}, None)
        return self._with_scales(al).with_digits(trits.unsqueeze(0).to("cpu", torch.int8))


def one_plane(code: Code) -> bool:
    """Whether what a matrix was rounded to is one trit-plane."""
    leaf = code.opened(torch.zeros(code.shape, device="cpu"))[0]
    return isinstance(leaf, TritPlanes) and leaf.planes == 1
