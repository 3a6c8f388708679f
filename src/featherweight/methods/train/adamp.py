"""AdamP and SGDP: steps without the part along scale-invariant weights (arXiv 2006.08217).

Where a normalisation follows, the length of a weight does not matter: its gradient is orthogonal to it, but momentum is
not, and makes it longer than plain descent would, which shrinks the steps of its direction. Here that part of a step is
removed from tensors that look scale-invariant. The same arithmetic is in timm and pytorch_optimizer, of which these
lines would be the only use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.learn.optimisers import Optimiser

VIEWS = ("channel", "layer")
"""A row for each first index, and a single row: in this order."""


def project(
    weight: Tensor, gradient: Tensor, step: Tensor, *, delta: float, wd_ratio: float, eps: float
) -> tuple[Tensor, Tensor]:
    """A step without its part along the weight, if the gradient is orthogonal enough to the weight.

    Parameters
    ----------
    weight, gradient : before the step, of two or more dimensions, the first that of channels
    step : what would be subtracted, times a rate; of the same shape
    delta : a view is scale-invariant if all its rows have |cos(gradient, weight)| < delta / sqrt(columns)
    wd_ratio : what weight decay is multiplied by where a view is
    eps : least product of norms

    Returns
    -------
    The step, and a number: `wd_ratio` or 1. Nothing is asked of the device.
    """
    found, ratio = step, torch.ones((), device=weight.device, dtype=_wide(weight).dtype)
    for view in reversed(VIEWS):
        rows = weight.shape[0] if view == "channel" else 1
        w, g = (value.reshape(rows, -1) for value in (_wide(weight), _wide(gradient)))
        product = (w.norm(dim=1) * g.norm(dim=1)).clamp(min=eps)
        invariant = ((w * g).sum(1).abs() / product).amax() < delta / math.sqrt(w.shape[1])
        unit = w / (w.norm(dim=1, keepdim=True) + eps)
        p = _wide(step).reshape(rows, -1)
        cut = (p - unit * (unit * p).sum(1, keepdim=True)).reshape(step.shape).to(step.dtype)
        found = torch.where(invariant, cut, found)  # the channel view comes last and has the first word
        ratio = torch.where(invariant, wd_ratio, ratio)
    return found, ratio


def _wide(value: Tensor) -> Tensor:
    """In float32 at least: in bfloat16 the noise of a product is above the bound of large rows."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


class _Projected(torch.optim.Optimizer):
    """What both have: the walk over parameters, the projection, decay and step."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        rate = defaults["lr"]
        if rate < 0:
            raise FeatherError(f"the learning rate is {rate}: give one of 0 or more")
        super().__init__(params, defaults)
        self._ratios: list[tuple[Tensor, float]] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ratios = []
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(group, parameter, parameter.grad)
        return loss

    def _step_one(self, group: dict[str, Any], weight: Tensor, gradient: Tensor) -> None:
        step, rate, decay = self._direction(group, self.state[weight], weight, gradient)
        ratio: Tensor | float = 1.0
        if weight.dim() > 1:
            options = {"delta": group["delta"], "wd_ratio": group["wd_ratio"], "eps": group["eps"]}
            step, ratio = project(weight, gradient, step, **options)
            self._ratios.append((ratio, group["wd_ratio"]))
        if decay:
            weight.mul_(1 - decay * ratio)
        weight.add_(step, alpha=-rate)

    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], weight: Tensor, gradient: Tensor
    ) -> tuple[Tensor, float, float]:
        """The step, what it is multiplied by, and the share of the weight that decay takes."""
        raise NotImplementedError

    def projected(self) -> float:
        """The share of tensors of two and more dimensions that were projected in the last step.

        With `wd_ratio` 1 nothing tells them apart: 0.
        """
        cut = [bool(ratio == kept) for ratio, kept in self._ratios if kept != 1]
        return sum(cut) / len(cut) if cut else 0.0


class AdamP(_Projected):
    """Adam with decoupled weight decay and the projection. State: first and second moments of the plain gradient."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own | {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov})

    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], weight: Tensor, gradient: Tensor
    ) -> tuple[Tensor, float, float]:
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        count, first, second = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        divisor = (second.sqrt() / math.sqrt(1 - beta2**count)).add_(group["eps"])
        moved = first.lerp(gradient, 1 - beta1) if group["nesterov"] else first
        rate = group["lr"] / (1 - beta1**count)
        return moved / divisor, rate, group["lr"] * group["weight_decay"]


class SGDP(_Projected):
    """Descent with momentum and the projection. State: one buffer, which begins at zero.

    Decay is divided by 1 - momentum, so that it takes as much as decay that goes through the momentum.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.0,
        *,
        dampening: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise FeatherError(f"the momentum is {momentum}: give one from 0 to below 1")
        own = {"lr": lr, "momentum": momentum, "dampening": dampening, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own | {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov})

    def _direction(
        self, group: dict[str, Any], state: dict[str, Any], weight: Tensor, gradient: Tensor
    ) -> tuple[Tensor, float, float]:
        momentum, rate = group["momentum"], group["lr"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        step = gradient + momentum * buffer if group["nesterov"] else buffer
        return step, rate, rate * group["weight_decay"] / (1 - momentum)


def adamp(betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0, nesterov: bool = False) -> Optimiser:
    """`AdamP` by name, for the loop of trainings."""
    return lambda theta, rate: AdamP(theta, rate, betas, weight_decay=weight_decay, nesterov=nesterov)


def sgdp(momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False) -> Optimiser:
    """`SGDP` by name, for the loop of trainings."""
    return lambda theta, rate: SGDP(theta, rate, momentum, weight_decay=weight_decay, nesterov=nesterov)
