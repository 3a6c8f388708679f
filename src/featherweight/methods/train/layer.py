"""`LowBitLinear`: a linear layer that multiplies by its rounded weights, with latents that are trained.

A layer becomes one where it stands, by a change of its class: its parameters stay the same objects, so an optimiser
that has them, a tied layer or a hook goes on. What choices give it are further parameters and buffers; its clock is
one of them, so that a training that goes on later has it from the saved state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.methods.train.base import Activation, Backward, Clock, Forward, Rounded, Side
from featherweight.methods.train.inputs import hold, take_shapes
from featherweight.storage.codes import Code

SCALES, CLOCK = "learned_scales", "clock_steps"


@dataclass(frozen=True)
class Choices:
    """What a layer is trained by: a point in the product of the four axes."""

    forward: Forward
    backward: Backward
    side: Side
    activation: Activation

    def refusal(self) -> str:
        """Why these do not go together; empty where they do."""
        if self.forward.kind == "full":
            kinds = ((self.backward, "identity"), (self.side, "none"), (self.activation, "none"))
            wrong = [choice.kind for choice, plain in kinds if choice.kind != plain]
            return f"the forward code full rounds nothing, which {' and '.join(wrong)} would need" if wrong else ""
        return self.backward.refusal(self.forward) or self.side.refusal(self.forward, self.backward)


class LowBit(nn.Module):
    """What has a matrix that is rounded as choices say: a linear layer, or the product of two of an attention.

    Attributes
    ----------
    weight : the latents [out, in], float32 or float64
    choices : see `Choices`
    name : of the module in its model
    """

    weight: Tensor
    choices: Choices
    name: str
    _clock: Clock
    unstorable: ClassVar[str] = ""
    """Why no folder can hold it, whatever it is rounded to."""

    def begin(self, choices: Choices, name: str) -> None:
        """Be trained by these choices from now on; RecipeError where they cannot code this matrix."""
        rows, columns = self.weight.shape
        choices.forward.check_shape((rows, columns), name)
        self.choices, self.name, self._clock = choices, name, Clock()
        learned = choices.forward.start(self.weight.detach())
        if learned is not None:
            self.register_parameter(SCALES, nn.Parameter(learned))
        hold(self, choices.side.given(self.weight, self.rounded()), self.weight.device)
        self.register_buffer(CLOCK, torch.zeros(2, dtype=torch.int64, device="cpu"))
        self._register_load_state_dict_pre_hook(self._before_loading)  # type: ignore[no-untyped-call]

    def own(self, name: str) -> Any:
        """A parameter or buffer that a choice has given the layer."""
        return getattr(self, name)

    @property
    def learned(self) -> nn.Parameter | None:
        """Scales that are trained, where the forward code has such."""
        return self._parameters.get(SCALES)

    @property
    def clock(self) -> Clock:
        """Where the training is; `set_clock` sets it."""
        return self._clock

    def set_clock(self, clock: Clock) -> None:
        """`clock.step` steps of `clock.steps` are done."""
        self._clock = Clock(*clock)
        held: Tensor = self.own(CLOCK)
        held.copy_(torch.tensor(self._clock, dtype=torch.int64, device="cpu"))
        self.choices.side.ticked(self)

    def _before_loading(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + CLOCK in state:
            self._clock = Clock(*state[prefix + CLOCK].tolist())
            self.choices.side.ticked(self)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """What the latents are rounded to now."""
        return self.choices.forward.rounded(self.weight, self.learned)

    def matrix(self, found: Rounded) -> Tensor:
        """What the input is multiplied by, differentiable: [out, in]."""
        value = self.choices.backward.passed(self, self.choices.forward, found, self.learned)
        return self.choices.side.matrix(self, value)

    def penalty(self) -> Tensor | None:
        """A scalar that the side path adds to the loss."""
        return self.choices.side.penalty(self)

    @property
    def kinds(self) -> str:
        """Of the choices, for people."""
        parts = (self.choices.forward, self.choices.backward, self.choices.side, self.choices.activation)
        return " x ".join(part.kind for part in parts)


class LowBitLinear(LowBit, nn.Linear):
    """y = x Q(W)^T + b, and what the side path adds (see the module); `prepare` makes them."""

    def begin(self, choices: Choices, name: str) -> None:
        """See `LowBit`."""
        widen(self.weight)
        super().begin(choices, name)
        given = choices.activation.given()
        self.input_names = tuple(given)
        hold(self, given, self.weight.device)

    def _before_loading(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        super()._before_loading(state, prefix)
        take_shapes(self, self.input_names, state, prefix)

    def constant(self, found: Rounded) -> Tensor | None:
        """What is added to every output: the bias with what rule and side path add to it, [out], or None."""
        terms = [self.bias, self.choices.side.constant(self, found), self.choices.backward.constant(self, found)]
        total: Tensor | None = None
        for term in terms:
            if term is not None:
                total = term.to(self.weight.dtype) if total is None else total + term
        return total

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the type of the input."""
        found = self.rounded()
        constant = self.constant(found)
        constant = None if constant is None else constant.to(input.dtype)
        inputs = self.choices.activation.rounded(self, input)
        matrix = self.matrix(found)
        if inputs.dtype == input.dtype and self.choices.activation.kind == "none":
            product = F.linear(inputs, matrix.to(input.dtype), constant)
        else:  # as the loaded layer does it: the product in the type of the rounded inputs, then the bias
            product = F.linear(inputs, matrix.to(inputs.dtype)).to(input.dtype)
            product = product if constant is None else product + constant
        added = self.choices.side.added(self, inputs)
        return product if added is None else product + added.to(product.dtype)

    @torch.no_grad()
    def code(self) -> Code:
        """What is stored of the layer; its bias is `stored_bias`."""
        code = self.choices.forward.code(self.weight, self.learned)
        return self.choices.activation.stored(self.choices.side.stored(self, code))

    @torch.no_grad()
    def stored_bias(self) -> Tensor | None:
        """The bias [out] that is stored with the code, None where there is none."""
        constant = self.constant(self.rounded())
        return None if constant is None else constant.detach().clone()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kinds}"


def widen(latents: Tensor) -> None:
    """Make latents of fewer bits float32, in place: updates would be lost in fewer bits."""
    if latents.dtype not in (torch.float32, torch.float64):
        latents.data = latents.data.float()
