"""Variational binary fields: weights of +1 or -1 with learned probabilities (arXiv 2212.02846).

Each weight has a field theta, and is +1 with probability e^(b theta) / (2 cosh b theta), b the inverse temperature: its
mean is tanh(b theta), its variance 1 / cosh^2. A layer is evaluated by mean and deviation of its sums, so there is no
straight-through estimate; what is certain feels neither data nor penalty. Written from the abstract and from an account
of the authors' programs, without the text's figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError

LEAST_VARIANCE = 1e-30
"""Of a sum: no deviation is divided by less than its root."""
MOST_FIELD = 44.0
"""Magnitude of b theta beyond which 1 / cosh^2 is no longer a float32: the field is taken as this there."""


def variance_of(field: Tensor) -> Tensor:
    """1 / cosh^2 of b theta, without the cancellation of 1 - tanh^2 above 9."""
    return field.clamp(-MOST_FIELD, MOST_FIELD).cosh().pow(-2)


class _Sums(torch.autograd.Function):
    """Mean + deviation * noise of a layer's sums, with gradients in inputs and fields while the noise is held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, beta: float, noise: Tensor) -> Tensor:
        field = beta * theta
        mean, variance = field.tanh(), variance_of(field)
        fan_in = theta.shape[1]
        deviation = (x.square() @ variance.T / fan_in + LEAST_VARIANCE).sqrt()
        ctx.save_for_backward(x, mean, variance, noise / deviation)
        ctx.beta, ctx.certain = beta, deviation <= math.sqrt(2 * LEAST_VARIANCE)
        return x @ mean.T / math.sqrt(fan_in) + deviation * noise

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, mean, variance, share = ctx.saved_tensors
        (delta,) = gradients
        fan_in, size = x.shape[-1], math.sqrt(x.shape[-1])
        spread = (delta * share).masked_fill(ctx.certain, 0)  # of the deviation; nothing where there is none
        to_x = delta @ mean / size + (spread @ variance) * x / fan_in
        d, s, a = (value.reshape(-1, value.shape[-1]) for value in (delta, spread, x))
        to_theta = ctx.beta * variance * (d.T @ a / size - mean * (s.T @ a.square()) / fan_in)
        return to_x, to_theta, None, None


class BinaryFieldLinear(nn.Module):
    """y = (mean, or +-1) weights times x / sqrt(in), without bias.

    theta : [out, in] fields, standard normal at first
    beta : the inverse temperature, which `schedule` raises
    previous : fields that the penalty pulls to; `remember` sets them. None: no penalty
    mode : "moments": Gaussian sums, a draw for each unit and example; "mean": their means; "sample": weights of +-1,
        drawn anew for each call; "sign": the signs of the fields, which is what is stored in the end
    generator : of draws; None for PyTorch's own
    """

    theta: nn.Parameter
    previous: Tensor | None

    def __init__(self, in_features: int, out_features: int, beta: float = 1.0, device: Any = "cpu") -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(out_features, in_features, device=device))
        self.beta = beta
        self.mode: Literal["moments", "mean", "sample", "sign"] = "moments"
        self.generator: torch.Generator | None = None
        self.register_buffer("previous", None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]. Gradients of fields there are with "moments" alone."""
        size = math.sqrt(self.theta.shape[1])
        if self.mode == "moments":
            shape = (*x.shape[:-1], self.theta.shape[0])
            noise = torch.randn(shape, generator=self.generator, device=x.device, dtype=x.dtype)
            result: Tensor = _Sums.apply(x, self.theta, self.beta, noise)  # type: ignore[no-untyped-call]
            return result
        weights = {"mean": self.means, "sample": self.sampled, "sign": self.signs}[self.mode]()
        return x @ weights.to(x.dtype).T / size

    def means(self) -> Tensor:
        """[out, in] mean weights, from -1 to 1."""
        return (self.beta * self.theta.detach()).tanh()

    def sampled(self) -> Tensor:
        """[out, in] weights of +-1, drawn by their probabilities."""
        theta = self.theta.detach()
        drawn = torch.rand(theta.shape, generator=self.generator, device=theta.device, dtype=theta.dtype)
        return (2 * drawn - 1 < self.means()).to(theta.dtype) * 2 - 1

    def signs(self) -> Tensor:
        """[out, in] the likelier weight of each, +-1: one bit."""
        return torch.where(self.theta.detach() >= 0, 1.0, -1.0)

    def variances(self) -> Tensor:
        """[out, in] how uncertain each weight is, from 0 to 1: which bits may still change."""
        return variance_of(self.beta * self.theta.detach())

    def remember(self) -> None:
        """Take the present fields as those that the penalty pulls to: at the end of a task."""
        self.previous = self.theta.detach().clone()


def divergence(theta: Tensor, previous: Tensor, beta: float) -> Tensor:
    """KL of the signs' distributions, summed, in nats; its gradient in theta is beta^2 (theta - previous) / cosh^2."""
    field, old = beta * theta, beta * previous
    result: Tensor = ((field - old) * field.tanh() - log_cosh(field) + log_cosh(old)).sum()
    return result


def log_cosh(field: Tensor) -> Tensor:
    """ln 2 cosh, without overflow."""
    return field.abs() + torch.log1p((-2 * field.abs()).exp())


def divergence_gradient(theta: Tensor, previous: Tensor, beta: float) -> Tensor:
    """That of `divergence` in theta, in closed form."""
    return beta**2 * variance_of(beta * theta) * (theta - previous)


class Penalty:
    """Adds the gradient of the KL term to those of all layers, between `backward` and the optimiser's step.

    kind : "task": to the fields that each layer's `remember` kept, none where it has kept none; "stream": to the fields
        before the last step, which dampens along a stream without tasks and keeps one copy
    weight : what the term is multiplied by (a binary perceptron's program takes the batch's size for "task")

    Adam scales gradients of certain weights up again, which weakens what protects them; SGD does not.
    """

    def __init__(self, model: nn.Module, kind: Literal["task", "stream"], weight: float = 1.0) -> None:
        self.layers = layers_of(model)
        self.kind, self.weight = kind, weight
        self.before: dict[int, Tensor] = {}

    def add(self) -> None:
        """Once a step, after `backward`."""
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                previous = layer.previous if self.kind == "task" else self.before.get(i)
                if previous is not None and layer.theta.grad is not None:
                    layer.theta.grad += self.weight * divergence_gradient(layer.theta, previous, layer.beta)
                if self.kind == "stream":
                    self.before[i] = layer.theta.detach().clone()


def layers_of(model: nn.Module) -> list[BinaryFieldLinear]:
    """All layers of fields. FeatherError: there is none."""
    found = [module for module in model.modules() if isinstance(module, BinaryFieldLinear)]
    if not found:
        raise FeatherError("the model has no BinaryFieldLinear: put one in place of its linear layers")
    return found


def schedule(epoch: int, epochs: int, tasks: int = 5) -> float:
    """The inverse temperature of an epoch, from 1 to those of all tasks: 10 tanh(0.1 + 2 e / E), of two tasks e / E."""
    if not 1 <= epoch <= epochs:
        raise FeatherError(f"epoch {epoch} is not among 1 to {epochs}")
    return 10 * math.tanh(0.1 + (1 if tasks == 2 else 2) * epoch / epochs)


def set_beta(model: nn.Module, beta: float) -> None:
    """Of all layers of fields. Fields that are remembered are fields still: nothing else changes."""
    for layer in layers_of(model):
        layer.beta = beta


def likelihood(theta: Tensor, x: Tensor, y: Tensor, beta: float = 1.0) -> Tensor:
    """The exact binary perceptron: mean of -ln p(right answer), p = H(-y m / s), to be differentiated by autograd.

    Parameters
    ----------
    theta : [in] fields
    x : [examples, in] of +-1
    y : [examples] of +-1
    """
    field = beta * theta
    deviation = (variance_of(field).sum() + LEAST_VARIANCE).sqrt()
    result: Tensor = -torch.special.log_ndtr(y * (x @ field.tanh()) / deviation).mean()
    return result


def train_perceptron(
    theta: Tensor,
    x: Tensor,
    y: Tensor,
    optimiser: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    steps: int,
    *,
    beta: float = 1.0,
    previous: Tensor | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, list[float]]:
    """Fields [in] after full-batch steps from `theta`, and the loss before each; with the "task" term to `previous`."""
    trained = theta.detach().clone().requires_grad_()
    chosen, losses = optimiser([trained]), []
    for _ in range(steps):
        chosen.zero_grad()
        loss = likelihood(trained, x, y, beta)
        losses.append(float(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        if previous is not None and trained.grad is not None:
            trained.grad += weight * divergence_gradient(trained.detach(), previous, beta)
        chosen.step()
    return trained.detach(), losses
