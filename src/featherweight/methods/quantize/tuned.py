"""Values of codes, and plain tensors, as relative changes that an optimiser moves: one rate serves all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featherweight.methods.learn.objectives import Objective
from featherweight.methods.quantize.decoding import TunableCode
from featherweight.storage.codes import Code


class TunedState:
    """Relative changes theta of all values, and what they stand for, on one device; codes are in main memory.

    codes : by layer, on `device`
    tensors : plain ones that are trained, too, by name in the checkpoint
    fixed : plain ones that take the place of the network's and stay as they are
    """

    def __init__(
        self,
        codes: Mapping[str, TunableCode],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.codes = dict(codes)
        self.fixed = {name: value.to(device) for name, value in (fixed or {}).items()}
        self.tensors = {name: value.to(device) for name, value in tensors.items()}
        keys = [(name, path, v) for name, code in self.codes.items() for path, v in code.parameters.items()]
        keys += [("", name, value.float()) for name, value in self.tensors.items()]
        self._keys = [(name, path) for name, path, _ in keys]
        self._start = [value for _, _, value in keys]
        units = {(name, path): unit for name, code in self.codes.items() for path, unit in code.units.items()}
        self._unit = [
            units[key] if key in units else typical_size(value)
            for key, value in zip(self._keys, self._start, strict=True)
        ]
        self.theta = [torch.zeros_like(value).requires_grad_() for value in self._start]

    def values(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Values by layer and path, and tensors by name; differentiable in theta."""
        by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in self.codes}
        tensors: dict[str, Tensor] = {}
        for (name, path), start, unit, theta in zip(self._keys, self._start, self._unit, self.theta, strict=True):
            value = torch.addcmul(start, unit, theta)
            if name:
                by_layer[name][path] = value
            else:
                tensors[path] = value
        return by_layer, tensors

    def backward(self, objective: Objective, batch: int) -> float:
        """One batch's loss; gradients go to theta through leaves, so that the network's graph ends at the weights."""
        for theta in self.theta:
            theta.grad = None
        by_layer, tensors = self.values()
        weights = {name: code.decode(by_layer[name]) for name, code in self.codes.items()}
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        tensor_leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
        loss = objective.backward(leaves, {**self.fixed, **tensor_leaves}, batch)
        roots = [(weights[n], leaf.grad) for n, leaf in leaves.items()]
        roots += [(tensors[n], leaf.grad) for n, leaf in tensor_leaves.items()]
        used = [(root, gradient) for root, gradient in roots if gradient is not None and root.requires_grad]
        torch.autograd.backward([root for root, _ in used], [gradient for _, gradient in used])
        return loss

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Decoded weights and tensors as they would be stored now."""
        return self.decoded(*self.result())

    def decoded(
        self, codes: Mapping[str, Code], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and tensors that the network computes with if these are stored."""
        return {name: code.decode() for name, code in codes.items()}, {**self.fixed, **tensors}

    def clip(self, most: float) -> None:
        """Scale the gradients of all values so that their norm together is not above `most`."""
        both = zip(self.theta, self._unit, strict=True)
        known = [(theta.grad, unit) for theta, unit in both if theta.grad is not None]
        norms = [(gradient / unit.to(gradient.device)).norm() for gradient, unit in known]
        if norms:
            factor = most / torch.stack(norms).norm().clamp_min(most)
            for gradient, _ in known:
                gradient.mul_(factor)

    def given(self) -> tuple[dict[str, Code], dict[str, Tensor]]:
        """Codes and tensors as they were given."""
        return {name: code.code for name, code in self.codes.items()}, dict(self.tensors)

    def result(self) -> tuple[dict[str, Code], dict[str, Tensor]]:
        with torch.no_grad():
            by_layer, tensors = self.values()
            codes = {name: code.stored(by_layer[name]) for name, code in self.codes.items()}
            return codes, {name: value.to("cpu", self.tensors[name].dtype) for name, value in tensors.items()}


def typical_size(value: Tensor) -> Tensor:
    """The scale of a change of each value."""
    rows = value.reshape(value.shape[0], -1) if value.dim() > 1 else value.reshape(1, -1)
    typical = rows.square().mean(1).sqrt()
    shaped = typical.view(-1, *([1] * (value.dim() - 1))) if value.dim() > 1 else typical
    return torch.maximum(value.abs(), 0.1 * shaped)
