"""DiscQuant: for every weight the grid value below or above, chosen by distilling the original model end to end.

DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy Theory (arXiv 2501.06417; from the abstract
and the authors' code, the paper's text was not at hand). With neighbours down <= w <= up on the grid and y the share by
which w lies above down, w(x) = (1 - x) down + x up for x in [0, 1]. Adam on x with the gradient
-c + clip(rho grad KL / delta^2, -kappa, kappa), c = 2y - 1, delta^2 the mean over layers of 12 times RTN's mean squared
error, and x clipped to [0, 1] after each step; at the end x is rounded. rho = 0 is round to nearest.

Any grid with levels will do. Where this departs: no weight decay on x (the published library default of 0.01 pulls
towards down); x starts at y unless `start` is random, as published. That the result is better than round to nearest
is not taken for granted: a run compares the two on held-out windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.learn.batches import ShuffledRounds
from featherweight.methods.learn.loop import Schedule, Training, minimise
from featherweight.methods.learn.objectives import ModelObjective
from featherweight.methods.quantize.base import Grid, Rounding, Scope, SolveOptions, WeightSource
from featherweight.model.network.access import ModelAccess
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.run.training_store import NO_STORE, TrainingStore
from featherweight.system.precision import Precision, choose_precision


@register("rounding", "discquant")
class DiscQuant(Rounding):
    """Round up or down by distillation of the whole model (see the module)."""

    scope: ClassVar[Scope] = "model"

    steps: int = Field(1024, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="windows a step")
    learning_rate: float = Field(0.05, gt=0, description="of Adam on x; cosine to zero")
    warmup: float = Field(0.125, ge=0, lt=1, description="share of the steps with a rising learning rate")
    rho: float = Field(200.0, ge=0, description="weight of the divergence")
    kappa: float = Field(0.5, gt=0, description="gradients of the divergence are clipped to this")
    start: Literal["weight", "random"] = Field("weight", description="x = y, or uniform in [0, 1] as published")
    precision: Precision = Field("float32", description="of training passes; auto: the faster here; compared in fp32")

    @property
    def training_bytes(self) -> int:
        return 44  # weight, share, gap, lower value, x, its gradient and moments, w(x) and its gradient; indices

    def refusal(self, grid: Grid) -> str | None:
        has_levels = type(grid).levels is not Grid.levels and type(grid).fit is not Grid.fit
        return None if has_levels else "it needs a grid with a list of levels"

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        """Without a model to distil: round to nearest."""
        return grid.quantize_source(source, options, statistics)

    def quantize_model(
        self,
        model: ModelAccess,
        grids: Mapping[str, Grid],
        options: SolveOptions,
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> dict[str, Code]:
        layers = {name: Neighbours(model.weight(name), grid, name, model.device) for name, grid in grids.items()}
        nearest = {name: layer.code(layer.share) for name, layer in layers.items()}
        errors = [float((code.decode() - layers[name].weight).square().mean()) for name, code in nearest.items()]
        scale = 12 * sum(errors) / max(1, len(errors))
        objective = ModelObjective(model, self.batch_size, choose_precision(self.precision, notify, model.device))
        if self.rho > 0 and (scale == 0 or objective.batches == 0):
            notify({"event": "discquant", "skipped": "nothing to distil"})
            return nearest
        generator = torch.Generator("cpu").manual_seed(seed)
        x = {
            name: torch.rand(layer.share.shape, generator=generator, device="cpu").to(model.device)
            if self.start == "random"
            else layer.share.clone()
            for name, layer in layers.items()
        }

        def gradients(batch: int) -> float:
            loss = 0.0
            pull: dict[str, Tensor] = {}
            if self.rho > 0:
                leaves = {name: layer.value(x[name]).requires_grad_() for name, layer in layers.items()}
                loss = objective.backward(leaves, {}, batch)
                pull = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
            for name, layer in layers.items():
                gradient = 1 - 2 * layer.share
                if name in pull:
                    divergence = pull[name] * layer.gap * (self.rho / scale)
                    gradient += divergence.clamp_(-self.kappa, self.kappa)
                x[name].grad = gradient
            return loss

        def project() -> None:
            for value in x.values():
                value.clamp_(0, 1)

        training = Training("discquant", Schedule(self.steps, self.learning_rate, self.warmup))
        sampler = ShuffledRounds(max(1, objective.batches), seed)
        minimise(list(x.values()), gradients, training, sampler, project=project, notify=notify, store=store)
        notify({"event": "discquant", "fractional": _fractional(x, layers)})
        return {name: layer.code(x[name]) for name, layer in layers.items()}


def _fractional(x: Mapping[str, Tensor], layers: Mapping[str, Neighbours]) -> float:
    """Share of the weights between two different levels whose x is not within 0.01 of an end."""
    between = sum(int(layer.free.sum()) for layer in layers.values())
    inside = sum(int((((v > 0.01) & (v < 0.99)).cpu() & layers[n].free).sum()) for n, v in x.items())
    return inside / max(1, between)


class Neighbours:
    """The grid values below and above each weight; what is trained with on a device, the rest in main memory.

    Attributes
    ----------
    share : y [out, in], how far the weight lies from the lower to the upper; 0.5 where there is no upper one
    gap : up - down, 0 there
    free : bool, where there is
    """

    def __init__(self, weight: Tensor, grid: Grid, name: str, device: torch.device | None = None) -> None:
        self.weight, self.grid = weight, grid
        try:
            self.fit = grid.fit(weight)
            levels = grid.levels(self.fit)
        except TypeError as error:
            raise RecipeError(f"rounding discquant cannot round {name}: {error}") from None
        rows, columns = weight.shape
        groups, count = levels.shape[1:]
        size = min(grid.group_size, columns)
        flat = levels.reshape(rows * groups, count).contiguous()
        padded = torch.nn.functional.pad(weight, (0, groups * size - columns)).reshape(rows * groups, size)
        upper = torch.searchsorted(flat, padded.contiguous(), right=True).clamp(1, count - 1)
        below, above = flat.gather(1, upper - 1), flat.gather(1, upper)
        gap = above - below
        outside = (padded <= flat[:, :1]) | (padded >= flat[:, -1:]) | (gap <= 0)
        # Beyond the ends, and on the top level, the end is both neighbours.
        top = padded >= flat[:, -1:]
        index = torch.where(top, upper, upper - 1)
        share = torch.where(outside, torch.full_like(gap, 0.5), (padded - below) / gap.clamp(min=1e-38))

        def whole(t: Tensor) -> Tensor:
            return t.view(rows, groups * size)[:, :columns].contiguous()

        self.share = whole(share).clamp(0, 1)
        self.gap = whole(torch.where(outside, torch.zeros_like(gap), gap))
        self.down = whole(torch.where(top, above, below))
        self.index = whole(index).to(torch.uint8)
        self.free = self.gap > 0
        if not torch.allclose(self.code(torch.zeros_like(weight)).decode(), self.down, rtol=1e-4, atol=1e-30):
            raise RecipeError(f"rounding discquant cannot round {name}: values of grid {grid.kind} are not its levels")
        if device is not None:
            self.share, self.gap, self.down = self.share.to(device), self.gap.to(device), self.down.to(device)

    def value(self, x: Tensor) -> Tensor:
        """w(x) [out, in]."""
        return torch.addcmul(self.down, x.detach(), self.gap)

    def code(self, x: Tensor) -> Code:
        """x rounded to 0 or 1, a half down."""
        up = (x.detach() > 0.5).cpu() & self.free
        return self.grid.encode(self.index + up.to(torch.uint8), self.fit)
