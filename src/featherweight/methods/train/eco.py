"""ECO: training that keeps quantised weights and moments alone (arXiv 2601.22101).

Each step rounds the new weights, and what the rounding lost is put into the momentum, so that the following steps bring
it back: no master weights and no other buffer. Reconstructed from the abstract, two public implementations' formulas
and a derivation of our own: later updates caused by an error add up to the error. That gives the paper's rules for
SGD, Adam and Muon, and says what Nesterov's momentum takes, of which no source has anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.learn.optimisers import Optimiser, optimiser_named
from featherweight.methods.train.quantisers import WIDE, Codes, Fp8, Quantiser, floating


@dataclass(frozen=True)
class Momentum:
    """Where an error of one parameter goes in this step.

    buffer : the momentum; None if the optimiser has none, where the error waits in a buffer of its own
    back : an error of the weights -> what is added to the buffer, so that later updates add up to the error
    kept : 1 - learning rate * decoupled weight decay
    """

    buffer: Tensor | None
    back: Callable[[Tensor], Tensor]
    kept: float


Form = Callable[[dict[str, Any], dict[str, Any], Tensor], Momentum]
"""Settings of a parameter's group, its state and its gradient, after the base's step -> where its error goes."""


def _as_it_is(error: Tensor) -> Tensor:
    return error


def _of_sgd(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Momentum:
    """Heavy ball, and with dampening = momentum the exponential mean: both 1/rate (1 - 1/beta)."""
    beta, rate = group["momentum"], float(group["lr"])
    if not beta:
        return Momentum(None, _as_it_is, 1.0)
    share = (1 - beta) / (beta**2 if group["nesterov"] else beta)
    return Momentum(state["momentum_buffer"], lambda error: error * (-share / rate), 1.0)


def _of_adam(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Momentum:
    """D * (1 - beta1^t) / rate * (1 - 1/beta1), D the divisor of this very step."""
    (beta, beta2), rate, step = group["betas"], float(group["lr"]), float(state["step"])
    kept: float = 1 - rate * group["weight_decay"] if group.get("decoupled_weight_decay", False) else 1.0
    if not beta:
        return Momentum(None, _as_it_is, kept)
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]

    def back(error: Tensor) -> Tensor:
        divisor = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        share: float = kept * (1 - beta**step) / rate * (1 - 1 / beta)
        given: Tensor = error * divisor * share
        return given

    return Momentum(state["exp_avg"], back, kept)


def _of_adamw(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Momentum:
    return _of_adam(group | {"decoupled_weight_decay": True}, state, gradient)


def _of_muon(group: dict[str, Any], state: dict[str, Any], gradient: Tensor) -> Momentum:
    """E (M'M)^(1/2), on the shorter side of the matrix, where the root loses nothing of E."""
    beta, rate = group["momentum"], float(group["lr"])
    kept: float = 1 - rate * group["weight_decay"]
    if not beta:
        return Momentum(None, _as_it_is, kept)
    buffer, rows, columns = state["momentum_buffer"], *gradient.shape
    ratio = {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
    rate *= ratio.get(group["adjust_lr_fn"], math.sqrt(max(1, rows / columns)))  # as torch.optim.Muon has it
    share = (1 - beta) / (beta**2 if group["nesterov"] else beta)

    def back(error: Tensor) -> Tensor:
        matrix = gradient.to(buffer.dtype).lerp(buffer, beta) if group["nesterov"] else buffer
        square = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
        values, vectors = torch.linalg.eigh(square.double())
        root = ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).to(error.dtype)
        turned: Tensor = error @ root if rows >= columns else root @ error
        given: Tensor = turned * (-kept * share / rate)
        return given

    return Momentum(buffer, back, kept)


FORMS: dict[str, Form] = {"SGD": _of_sgd, "AdamW": _of_adamw, "Adam": _of_adam, "Muon": _of_muon}
"""By the name of the optimiser's class, or of one it is made from; another's is one more entry."""


class Eco(torch.optim.Optimizer):
    """A wrapper around an optimiser with momentum: parameters are quantised after each step, errors go into momentum.

    The parameters hold values of their quantisers from the moment this is made, which rounds them; gradients are those
    at these values. Settings, moments and state are the base's own, so schedules set `param_groups` as usual.

    base : SGD, Adam, AdamW or Muon of torch.optim, or what FORMS has; without momentum, one buffer of errors is kept
    quantisers : of those parameters that get one; the others are the base's alone (norms, biases, embeddings)
    feedback : False drops the errors: the naive removal of master weights, as a control
    clip : errors are clipped to so many distances of two levels (`Codes.spacing`): for fixed scales, beyond whose last
        level errors grow
    seed : of stochastic rounding; a step's draw depends on seed, parameter and number of the step alone

    A parameter in bfloat16 or float16 is stepped in a float32 copy of that one, its moments are float32, and what the
    type rounds off counts as error too. A jump of the learning rate makes errors on their way return too small or
    too large by its ratio once. A rate of 0 leaves weights and errors as they are. Moments grow like spacing / rate:
    keep them in float32.

    FeatherError: the base's momentum is of no known form, or a quantiser is given for what it has not.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        quantisers: Mapping[Tensor, Quantiser],
        *,
        feedback: bool = True,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        forms = [FORMS[kind.__name__] for kind in type(base).__mro__ if kind.__name__ in FORMS]
        if not forms:
            raise FeatherError(
                f"ECO does not know the momentum of {type(base).__name__}; it knows {', '.join(FORMS)}, and others by "
                "an entry of featherweight.methods.train.eco.FORMS"
            )
        super().__init__(base.param_groups, base.defaults)
        self.base, self.form, self.feedback, self.clip, self.seed = base, forms[0], feedback, clip, seed
        self._share_with_base()
        self.quantisers = {id(parameter): quantiser for parameter, quantiser in quantisers.items()}
        own = [parameter for _, parameter in self._parameters()]
        if len(self.quantisers.keys() & {id(parameter) for parameter in own}) < len(self.quantisers):
            raise FeatherError("a quantiser is given for a tensor that the base optimiser does not train")
        if clip is not None and not all(isinstance(quantiser, Codes) for quantiser in quantisers.values()):
            raise FeatherError("`clip` counts distances of levels, which only quantisers made from Codes tell")
        self.places = {id(parameter): i for i, parameter in enumerate(own)}
        self.defaults = base.defaults | {
            "base": type(base).__name__,
            "quantisers": sorted({str(quantiser) for quantiser in quantisers.values()}),
            "feedback": feedback,
            "clip": clip,
            "seed": seed,
        }
        with torch.no_grad():
            for _, parameter in self._quantised():
                parameter.copy_(self._quantise(parameter, floating(parameter), 0))

    def _share_with_base(self) -> None:
        self.state, self.param_groups = self.base.state, self.base.param_groups

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def _quantised(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group, p in self._parameters() if id(p) in self.quantisers]

    def _quantise(self, parameter: Tensor, weight: Tensor, step: int) -> Tensor:
        quantiser = self.quantisers[id(parameter)]
        if not (isinstance(quantiser, Codes) and quantiser.stochastic):
            return quantiser(weight)
        generator = torch.Generator(device=weight.device)
        generator.manual_seed(((self.seed * 1_000_003 + self.places[id(parameter)]) << 32 | step) % 2**63)
        return quantiser(weight, generator)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base, then quantisation. Call it once a batch: after all gradients have been added up."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            narrow = [(group, p) for group, p in self._quantised() if p.dtype not in WIDE]
            self._step_all_but({id(p) for _, p in narrow})
            for group, parameter in self._quantised():
                if parameter.dtype in WIDE and parameter.grad is not None:
                    self._feed_back(group, parameter, parameter, parameter.grad)
            for group, parameter in narrow:
                if parameter.grad is not None:
                    self._step_in_float32(group, parameter, parameter.grad)
        return loss

    def _step_all_but(self, left_out: set[int]) -> None:
        everything = [group["params"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in left_out]
            self.base.step()
        finally:
            for group, parameters in zip(self.param_groups, everything, strict=True):
                group["params"] = parameters

    def _step_in_float32(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        wide = parameter.detach().float()
        wide.grad = gradient.float()
        everything = [other["params"] for other in self.param_groups]
        state = self.state
        try:
            for other in self.param_groups:
                other["params"] = [wide] if other is group else []
            if parameter in state:
                state[wide] = state.pop(parameter)
            self.base.step()
        finally:
            if wide in state:
                state[parameter] = state.pop(wide)
            for other, parameters in zip(self.param_groups, everything, strict=True):
                other["params"] = parameters
        self._feed_back(group, parameter, wide, wide.grad)

    def _feed_back(self, group: dict[str, Any], parameter: Tensor, stepped: Tensor, gradient: Tensor) -> None:
        """Round what the base made of a parameter, and hand the error on."""
        if float(group["lr"]) == 0:
            return
        state = self.state[parameter]
        momentum = self.form(group, state, gradient)
        wanted = stepped.clone()
        if "eco_error" in state:
            wanted += momentum.kept * state["eco_error"]
        quantiser = self.quantisers[id(parameter)]
        step = 0
        if isinstance(quantiser, Codes) and quantiser.stochastic:
            state["eco_step"] = state.get("eco_step", torch.zeros((), device="cpu")) + 1
            step = int(state["eco_step"])
        parameter.copy_(self._quantise(parameter, wanted, step))
        if not self.feedback:
            return
        error = wanted.sub_(parameter)
        if self.clip is not None and isinstance(quantiser, Codes):
            most = self.clip * quantiser.spacing(parameter).to(error.dtype)
            error = torch.maximum(torch.minimum(error, most), -most)
        if momentum.buffer is None:
            state["eco_error"] = error
        else:
            momentum.buffer.add_(momentum.back(error))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base has it."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after the start: the quantisers of new parameters are not known."""
        if hasattr(self, "quantisers"):
            raise FeatherError("make a new Eco for further parameters, with their quantisers")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, to the bit: moments keep their types. The model's has the weights."""
        self.base.load_state_dict(state_dict)
        self._share_with_base()
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (_, parameter) in zip(saved, self._parameters(), strict=True):
            for key, kept in state_dict["state"].get(i, {}).items():
                if isinstance(kept, Tensor):  # PyTorch casts them to the parameter's type
                    place = parameter.device if kept.dim() else kept.device
                    self.state[parameter][key] = kept.to(place, copy=True)

    def nbytes(self) -> dict[str, int]:
        """Bytes of what has to stay between steps: {"weights", "state"}.

        weights : codes with scales where a quantiser tells (`Codes.nbytes`), else the parameter as it is
        state : moments and all else that the optimiser holds
        """
        weights = 0
        for _, parameter in self._parameters():
            quantiser = self.quantisers.get(id(parameter))
            own = isinstance(quantiser, Codes)
            weights += quantiser.nbytes(parameter.shape) if own else parameter.nbytes  # type: ignore[union-attr]
        state = sum(kept.nbytes for held in self.state.values() for kept in held.values() if isinstance(kept, Tensor))
        return {"weights": weights, "state": state}


def eco(
    quantiser: Quantiser | None = None,
    base: str = "adamw",
    *,
    feedback: bool = True,
    clip: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> Optimiser:
    """`Eco` by name, for the loop of trainings: tensors of two and more dimensions get the quantiser.

    quantiser : `Fp8(stochastic=True)` unless given
    base : an optimiser of `featherweight.methods.learn.optimisers`; `settings` are its own
    """
    make = optimiser_named(base, **settings)
    chosen = Fp8(stochastic=True) if quantiser is None else quantiser

    def made(theta: list[Tensor], rate: float) -> torch.optim.Optimizer:
        quantisers = {value: chosen for value in theta if value.dim() >= 2}
        return Eco(make(theta, rate), quantisers, feedback=feedback, clip=clip, seed=seed)

    return made
