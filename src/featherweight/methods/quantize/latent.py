"""Codes whose digits are trained: every weight has a latent value, and its digits are those nearest to it.

The backward rule is the identity straight through (Bengio et al., arXiv 1308.3432): the gradient of a latent value is
that of the weight, whatever level it went to. Scales have the gradient of the product with the digits of the moment, as
in learned step sizes (arXiv 1902.08153) without their factor. What is around the digits (a rotation, a low-rank term)
is decoded, and trained, as `TunableCode` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.methods.quantize.decoding import TunableCode, group_values, scale_gradients, scales_by_plane
from featherweight.storage.codes.base import Code, ungrouped

LATENTS = "latents"
SHARES = (1.0, 0.7, 0.4, 0.2, 0.0)
"""Of the way from a weight's level to the original weight, tried in turn where the whole way leads to another level."""


class LatentCode(TunableCode):
    """A code whose digits move, too.

    `parameters` have, beside those of a `TunableCode`, PATH.latents float32 [out, groups, size] for the part that the
    original matrix was rounded to; not where that kind keeps its digits (`trains` is False then).

    Parameters
    ----------
    code : what is trained, in main memory
    weight : float32 [out, in], what the code stands for: latent values start as near to it as the code's digits allow,
        so that the code they give at first is the code itself
    device : see `TunableCode`
    """

    def __init__(
        self, code: Code, weight: Tensor, device: torch.device | None = None, *, prefix: str = "", within: Any = None
    ) -> None:
        self._leaf: Code
        self._wanted: Tensor
        self._leaf, self._wanted = code.opened(weight)[:2] if within is None else within
        self._latents: Tensor | None = None
        super().__init__(code, prefix, device)
        if code is self._leaf and self._digits is not None:
            self._start()
        self._wanted = torch.empty(0, device="cpu")  # it has served

    def _part(self, code: Code, prefix: str) -> TunableCode:
        return LatentCode(code, self._wanted, self.device, prefix=prefix, within=(self._leaf, self._wanted))

    def _start(self) -> None:
        assert self._digits is not None
        own = {name: getattr(self.code, name).detach().float().to(self.device) for name in self._own}
        scales = scales_by_plane(own)
        padded = torch.nn.functional.pad(
            self._wanted, (0, self._digits.shape[2] * self._digits.shape[3] - self.code.shape[1])
        )
        wanted = padded.view(self._digits.shape[1:]).to(self.device)
        now = group_values(self._digits, scales)
        try:
            latents, settled = now, torch.zeros_like(now, dtype=torch.bool)
            for share in SHARES:
                tried = torch.where(settled, latents, torch.lerp(now, wanted, share))
                same = group_values(self.code.digits_nearest(tried, scales), scales) == now
                settled |= self.code.all_together(same)
                latents = torch.where(settled, tried, now)
        except NotImplementedError:
            return
        self._latents = latents
        self._unit = scales.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def trains(self) -> bool:
        """Whether digits of any part move."""
        return self._latents is not None or any(isinstance(c, LatentCode) and c.trains for c in self._leaves())

    @property
    def parameters(self) -> dict[str, Tensor]:
        found = super().parameters
        return found if self._latents is None else {**found, self._prefix + LATENTS: self._latents}

    @property
    def units(self) -> dict[str, Tensor]:
        """Of latent values: the largest scale of their group."""
        found = {} if self._latents is None else {self._prefix + LATENTS: self._unit}
        for child in self._leaves():
            found |= child.units
        return found

    def decode(self, parameters: Mapping[str, Tensor]) -> Tensor:
        if self._latents is None:
            return super().decode(parameters)
        scales = scales_by_plane({name: parameters[self._prefix + name] for name in self._own})
        latents = parameters[self._prefix + LATENTS]
        with torch.no_grad():
            digits = self.code.digits_nearest(latents, scales)
        value: Tensor = _StraightThrough.apply(latents, scales, digits)  # type: ignore[no-untyped-call]
        return value.flatten(1)[:, : self.code.shape[1]]

    def stored(self, parameters: Mapping[str, Tensor]) -> Code:
        scaled = super().stored(parameters)
        if self._latents is None:
            return scaled
        own = {name: getattr(scaled, name).float() for name in self._own}
        latents = parameters[self._prefix + LATENTS].detach().cpu()
        return scaled.with_digits(scaled.digits_nearest(latents, scales_by_plane(own)))


def moved_digits(before: Code, after: Code) -> tuple[int, int]:
    """How many weights have another digit in a later form of a code, of how many."""
    one, other = _leaf_digits(before), _leaf_digits(after)
    if one is None or other is None:
        return 0, 0
    return int((one != other).any(0).sum()), one[0].numel()


def _leaf_digits(code: Code) -> Tensor | None:
    leaf = code.opened(torch.zeros(code.shape, device="cpu"))[0]
    digits = leaf.digits()
    return None if digits is None else ungrouped(digits, leaf.shape[1])


class _StraightThrough(torch.autograd.Function):
    """`group_values` of the digits nearest to latents [out, groups, size]; keeps only the digits."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, scales: Tensor, digits: Tensor) -> Tensor:
        ctx.save_for_backward(digits)
        return group_values(digits, scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], scale_gradients(gradients[0], ctx.saved_tensors[0]), None
