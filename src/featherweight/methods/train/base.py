"""The axes of a trained layer: forward code x backward rule x side path x activations, and the schedule over time.

A layer keeps its weight as floating-point *latents*. In every step the forward code rounds them to what a stored code
can hold, scales included, and the layer multiplies by that; the backward rule says what gradient the latents get, the
side path adds what the rounded matrix lacks, the activation rounds the input. What is trained is thereby what is
stored. A choice on an axis is one file with one `@register(axis, name)` class, as those of recipes are.

Rules are pure: tensors in, tensors out. They see the layer they are in as `Layer`, never a model or an optimiser.
"""

from __future__ import annotations

import abc
import fnmatch
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from featherweight.methods.quantize.base import Choice
from featherweight.storage.codes import Code


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a pattern fits the full name of a module, or its last part."""
    return any(fnmatch.fnmatchcase(text, p) for p in patterns for text in (name, name.rpartition(".")[2]))


class Clock(NamedTuple):
    """Where a training is: `step` steps of `steps` are done; 0 of 0 where nobody has said, which counts as the end."""

    step: int = 0
    steps: int = 0

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(1.0, self.step / self.steps) if self.steps > 0 else 1.0


class Rounded(NamedTuple):
    """What a forward code makes of latents.

    value : [out, in], what the layer multiplies by; the very values of the stored code
    digits : [out, in], whole numbers, of the code's levels in ascending order; 0 for a weight that is off
    scales : [out, groups], as they are stored
    """

    value: Tensor
    digits: Tensor
    scales: Tensor


class Layer(Protocol):
    """What choices see of the layer that they are in."""

    name: str
    """Of the module in its model."""
    training: bool

    @property
    def weight(self) -> Tensor:
        """The latents [out, in]; [0, 0] where what is rounded meets no matrix, as in an attention."""
        ...

    @property
    def clock(self) -> Clock:
        """Where the training is."""
        ...

    def own(self, name: str) -> Any:
        """A parameter or buffer that a choice has given the layer."""
        ...


Given = dict[str, Tensor]
"""Tensors that a choice gives a layer, by name: parameters (`nn.Parameter`), else buffers."""


class Forward(Choice, abc.ABC):
    """How latents are rounded.

    zero : whether a weight may be off (digit 0), so that there are dead weights
    edges : whether neighbouring codes meet at fixed places, see `position`
    learned : whether scales are parameters, which the backward rule must train
    """

    zero: ClassVar[bool] = True
    edges: ClassVar[bool] = True
    learned: ClassVar[bool] = False

    def start(self, weight: Tensor) -> Tensor | None:
        """The first learned scales for latents [out, in]; None where scales are computed."""
        return None

    @abc.abstractmethod
    def rounded(self, weight: Tensor, learned: Tensor | None = None) -> Rounded:
        """Latents [out, in], of float32 or float64 on any device, rounded; without gradients."""

    @abc.abstractmethod
    def code(self, weight: Tensor, learned: Tensor | None = None) -> Code:
        """What is stored: its `decode` is `rounded(weight).value`."""

    def position(self, weight: Tensor, learned: Tensor | None = None) -> tuple[Tensor, int, int]:
        """Where latents stand between codes: [out, in] in steps of codes, and the lowest and highest code.

        Codes k and k + 1 meet at the position k + 1/2.
        """
        raise TypeError(f"the forward code {self.kind} has no fixed places between its codes")

    def check_shape(self, shape: tuple[int, int], name: str) -> None:
        """RecipeError where a matrix of this shape, in the layer `name`, cannot be coded so."""


class Straight(torch.autograd.Function):
    """`value`, with the gradient passed on to `latent` as it is (times `mask`, where one is given)."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        ctx.mask = mask
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] if ctx.mask is None else gradients[0] * ctx.mask, None, None


def straight(latent: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `Straight`."""
    passed: Tensor = Straight.apply(latent, value, mask)  # type: ignore[no-untyped-call]
    return passed


class Backward(Choice, abc.ABC):
    """What gradient the latents get."""

    def refusal(self, forward: Forward) -> str:
        """Why this rule cannot train that forward code; empty where it can."""
        if forward.learned:
            return f"the forward code {forward.kind} learns its scales, which only the backward rule lsq trains"
        return ""

    @abc.abstractmethod
    def passed(self, layer: Layer, forward: Forward, found: Rounded, learned: Tensor | None) -> Tensor:
        """`found.value`, differentiable by this rule."""

    def constant(self, layer: Layer, found: Rounded) -> Tensor | None:
        """[out], added to every output: zeros whose gradient is not; None for nothing."""
        return None

    def frozen(self, layer: Layer, forward: Forward, learned: Tensor | None) -> Tensor | None:
        """Latents that the coming step of the optimiser must not change: bool [out, in]; None for none."""
        return None


class Side(Choice, abc.ABC):
    """What is added to the product with the rounded matrix."""

    def refusal(self, forward: Forward, backward: Backward) -> str:
        """Why this path cannot stand beside those; empty where it can."""
        return ""

    def given(self, weight: Tensor, found: Rounded) -> Given:
        """Parameters and buffers of its own, for latents [out, in] and what they are rounded to."""
        return {}

    def matrix(self, layer: Layer, value: Tensor) -> Tensor:
        """The matrix that is multiplied by, given the rounded one."""
        return value

    def constant(self, layer: Layer, found: Rounded) -> Tensor | None:
        """[out], added to every output; None for nothing."""
        return None

    def added(self, layer: Layer, inputs: Tensor) -> Tensor | None:
        """[..., out], added to the product; None for nothing."""
        return None

    def penalty(self, layer: Layer) -> Tensor | None:
        """A scalar for the loss; None for nothing."""
        return None

    def ticked(self, layer: Layer) -> None:
        """Called when the layer's clock is set."""

    def rates(self) -> dict[str, float]:
        """Factors of the learning rate for its own parameters, by name; 1 for those that are not named."""
        return {}

    def stored(self, layer: Layer, code: Code) -> Code:
        """The code of the layer with what this path adds to it; a constant becomes the layer's bias by itself."""
        return code


class Activation(Choice, abc.ABC):
    """How the layer's input is rounded."""

    def given(self) -> Given:
        """Parameters and buffers of its own. Their shapes may be found with the first batch: give their `data` another
        one then; a state that is loaded does so too."""
        return {}

    def rounded(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Inputs [..., in] as they are multiplied, differentiable."""
        return inputs

    @property
    def unstorable(self) -> str:
        """Why a folder cannot hold a layer with such inputs; empty where it can."""
        return ""

    def stored(self, code: Code) -> Code:
        """The code of a layer whose input is rounded so."""
        return code


class Rates(NamedTuple):
    """What the optimiser works with in a step."""

    learning_rate: float
    weight_decay: float


class Schedule(Choice, abc.ABC):
    """Learning rate and weight decay over the steps of a training; side paths and rules follow the same clock."""

    @abc.abstractmethod
    def at(self, step: int, steps: int) -> Rates:
        """Those of step number `step` of `steps`, counted from 0."""
