"""What rounded inputs share: few levels with a learned scale, their gradients (LSQ), and what holds such scales.

x becomes a clip(round(x / a), low, high). da is that of LSQ (arXiv 1902.08153), the limit outside and
round(x / a) - x / a inside, times 1 / sqrt(inputs with this scale x high); dx is 1 within the limits and 0 outside.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.methods.train.base import Activation, Clock, Given


class FewLevels(torch.autograd.Function):
    """a times the whole number nearest to x / a within limits; `signs`: a sign(x), +a for 0.

    scale : of a shape that the inputs' is reached from by repeating
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: Tensor, limits: tuple[int, int], signs: bool) -> Tensor:
        position = inputs / scale
        ctx.save_for_backward(position)
        ctx.limits, ctx.signs, ctx.shape = limits, signs, scale.shape
        if signs:
            return torch.where(inputs < 0, -scale, scale)
        return position.clamp(*limits).round() * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (position,) = ctx.saved_tensors
        low, high = ctx.limits
        below, above = position < low, position > high
        if ctx.signs:
            slope = torch.where(position < 0, -1.0, 1.0)
        else:
            slope = torch.where(below, float(low), torch.where(above, float(high), position.round() - position))
        factor = (position.numel() / ctx.shape.numel() * high) ** -0.5
        to_scale = (gradients[0] * slope).sum_to_size(ctx.shape) * factor
        return gradients[0] * ~(below | above), to_scale, None, None


def few_levels(inputs: Tensor, scale: Tensor, limits: tuple[int, int], signs: bool) -> Tensor:
    """See `FewLevels`."""
    found: Tensor = FewLevels.apply(inputs, scale.to(inputs.dtype), limits, signs)  # type: ignore[no-untyped-call]
    return found


def hold(module: nn.Module, given: Given, device: torch.device) -> None:
    """Give a module what a choice has for it: parameters, and buffers where they are none."""
    for key, tensor in given.items():
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(device)
            module.register_parameter(key, tensor)
        else:
            module.register_buffer(key, tensor.to(device))


def take_shapes(module: nn.Module, names: Iterable[str], state: dict[str, Any], prefix: str) -> None:
    """Before a state is loaded: parameters of these names get the shapes that it has."""
    for name in names:
        stored, held = state.get(prefix + name), module._parameters.get(name)
        if stored is not None and held is not None and stored.shape != held.shape:
            held.data = held.new_empty(stored.shape)


class RoundedInput(nn.Module):
    """Rounds what is no input of a linear layer, by an activation: in an attention queries, keys, values, chances."""

    def __init__(self, activation: Activation, name: str, device: torch.device) -> None:
        super().__init__()
        self.activation, self.name, self.clock = activation, name, Clock()
        given = activation.given()
        self.given_names = tuple(given)
        hold(self, given, device)
        self.register_buffer("weight", torch.empty(0, 0, device=device), persistent=False)
        self.weight: Tensor
        self._register_load_state_dict_pre_hook(self._before_loading)  # type: ignore[no-untyped-call]

    def own(self, name: str) -> Any:
        """A parameter or buffer that the activation has given it."""
        return getattr(self, name)

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, positions, channels], or [batch, heads, positions, channels], to the same, rounded."""
        return self.activation.rounded(self, inputs).to(inputs.dtype)

    def _before_loading(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        take_shapes(self, self.given_names, state, prefix)
