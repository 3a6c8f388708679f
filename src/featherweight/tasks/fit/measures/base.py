"""A measure: for every layer its worth, by which errors are weighed when bytes are given out."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.registry import register
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.tasks.fit.curves import Curves, Measured
from featherweight.tasks.fit.sensitivity import Network

TYPICAL_ERROR = 0.02
"""Worths are taken with the way whose error is nearest to this: small enough to be quadratic, large enough to stand
out."""

__all__ = ["TYPICAL_ERROR", "Asked", "Measure", "register"]


@dataclass(frozen=True)
class Asked:
    """What a measure may look at.

    network : the original in memory; None where the measure needs none
    told : called with layers done, and all
    """

    checkpoint: Checkpoint
    layers: Sequence[LinearLayer]
    curves: Curves
    network: Network | None
    tokens: int
    told: Callable[[int, int], None]

    def typical(self, layer: LinearLayer) -> Measured:
        """The way that a layer's worth is taken with."""
        return min(self.curves.measured[layer.name], key=lambda m: abs(m.error - TYPICAL_ERROR))

    def error(self, layer: LinearLayer) -> float:
        """Of the code that was made of the typical way, before what descents are taken to leave of it."""
        return float(self.curves.store.load(self.typical(layer).key)[0]["error"])

    def change(self, layer: LinearLayer) -> Tensor:
        """dW = Q - W of the typical way: float32 [out, in]."""
        return self.curves.code(self.typical(layer)).decode().float() - self.weight(layer)

    def weight(self, layer: LinearLayer) -> Tensor:
        """The original's matrix: float32 [out, in]."""
        return LayerWeight(self.checkpoint, layer).rows(0, layer.shape[0]).float()

    def by_layer(self, what: str, find: Callable[[LinearLayer], Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Records of all layers, each kept as soon as it is found. what : the measure, and whatever it hangs on"""
        found = {}
        for number, layer in enumerate(self.layers):
            self.told(number, len(self.layers))
            key = f"{what}-{self.typical(layer).key}-{self.tokens}"
            record = self.curves.store.record(key)
            if record is None:
                record = dict(find(layer))
                self.curves.store.keep(key, {}, record)
            found[layer.name] = record
        self.told(len(self.layers), len(self.layers))
        return found


class Measure(abc.ABC):
    """Registered with `@register("sensitivity", NAME)`.

    title : for help
    passes : forward passes of the whole network over the text, as a sentence
    needs_network : whether `worths` runs the original
    needs_text : whether it is of no use without text
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    passes: ClassVar[str]
    needs_network: ClassVar[bool] = True
    needs_text: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        """By layer, what a relative squared error of one of its output is worth, in nats or in a unit of its own."""


def per_error(found: Mapping[str, Mapping[str, Any]], value: str) -> dict[str, float]:
    """Values over errors, by layer; 0 for a layer without error, and where rounding leaves a value just below 0."""
    return {n: max(0.0, float(r[value])) / float(r["error"]) if r["error"] > 0 else 0.0 for n, r in found.items()}


def gradients(asked: Asked, squared: bool = False) -> dict[str, Tensor]:
    """Gradients of the mean negative log-likelihood in every layer's weight: float32 [out, in], the mean over
    windows; or of their squares."""
    assert asked.network is not None
    whole, network = asked.network.whole, asked.network
    weights = {layer.name: asked.weight(layer).requires_grad_(True) for layer in asked.layers}
    found = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    for number, ids in enumerate(network.windows):
        asked.told(number, len(network.windows))
        with torch.enable_grad(), whole.overridden(weights):
            logits = whole.head(whole.hidden(ids.unsqueeze(0))[0])[:-1].float()
            torch.nn.functional.cross_entropy(logits, ids[1:].to(logits.device)).backward()  # type: ignore[no-untyped-call]
        for name, weight in weights.items():
            if weight.grad is not None:
                grad = weight.grad.float()
                found[name] += grad.square() if squared else grad
                weight.grad = None
    asked.told(len(network.windows), len(network.windows))
    return {name: value / len(network.windows) for name, value in found.items()}


def spread_over_layers(asked: Asked, by_block: Sequence[float]) -> dict[str, float]:
    """A block's score times each layer's share of all weights; matrices outside the blocks have the mean score."""
    weights = sum(layer.parameters for layer in asked.layers)
    mean = sum(by_block) / max(1, len(by_block))
    return {
        layer.name: (mean if layer.block is None else by_block[layer.block]) * layer.parameters / weights
        for layer in asked.layers
    }
