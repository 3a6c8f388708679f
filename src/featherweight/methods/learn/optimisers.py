"""Optimisers of trainings, by name; and what one remembers of each tensor, for trainings that go on later."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.registry import nearest

Optimiser = Callable[[list[Tensor], float], torch.optim.Optimizer]
"""Makes an optimiser of leaf tensors with a first learning rate, which the loop sets before each step."""


def adam(betas: tuple[float, float] = (0.9, 0.999)) -> Optimiser:
    """Adam (arXiv 1412.6980), without weight decay."""
    return lambda theta, rate: torch.optim.Adam(theta, lr=rate, betas=betas)


def adamw(betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01, eps: float = 1e-8) -> Optimiser:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return lambda theta, rate: torch.optim.AdamW(theta, lr=rate, betas=betas, weight_decay=weight_decay, eps=eps)


def sgd(momentum: float = 0.0) -> Optimiser:
    """Stochastic gradient descent."""
    return lambda theta, rate: torch.optim.SGD(theta, lr=rate, momentum=momentum)


def _of_training(name: str, module: str) -> Callable[..., Optimiser]:
    """The function of this name in a module of methods/train, a room above, imported when it is asked for."""

    def make(**settings: Any) -> Optimiser:
        found: Optimiser = getattr(importlib.import_module(f"featherweight.methods.train.{module}"), name)(**settings)
        return found

    return make


OPTIMISERS: dict[str, Callable[..., Optimiser]] = {
    "adam": adam,
    "adamw": adamw,
    "sgd": sgd,
    "adamp": _of_training("adamp", "adamp"),
    "sgdp": _of_training("sgdp", "adamp"),
    "eco": _of_training("eco", "eco"),
}


def optimiser_named(name: str, **settings: Any) -> Optimiser:
    """The optimiser of this name with the settings of its function here.

    Raises
    ------
    FeatherError : there is none of this name, or it has no such setting
    """
    if name not in OPTIMISERS:
        raise FeatherError(
            f"there is no optimiser {name!r}{nearest(name, OPTIMISERS)}; known: {', '.join(OPTIMISERS)}; another is a "
            "function in featherweight.methods.learn.optimisers"
        )
    try:
        return OPTIMISERS[name](**settings)
    except TypeError:
        raise FeatherError(f"the optimiser {name} has no setting among {', '.join(settings)}") from None


def remembered(optimiser: torch.optim.Optimizer, theta: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors that the optimiser keeps, as KEY.NUMBER with the place of a tensor in `theta`; not copied.

    A tensor that never had a gradient has none.
    """
    return {
        f"{key}.{i}": kept
        for i, value in enumerate(theta)
        for key, kept in optimiser.state.get(value, {}).items()
        if isinstance(kept, Tensor)
    }


def remind(optimiser: torch.optim.Optimizer, theta: Sequence[Tensor], kept: Mapping[str, Tensor]) -> None:
    """Give back to an optimiser what `remembered` found: copies, on the device of each tensor.

    A number of steps (a tensor without dimensions) stays in main memory, where optimisers keep it.
    """
    for name, tensor in kept.items():
        key, _, place = name.rpartition(".")
        value = theta[int(place)]
        copied = tensor.clone() if tensor.dim() == 0 else tensor.to(value.device, copy=True)
        optimiser.state[value][key] = copied
