"""FlexRound: rounding learned by block reconstruction, each weight with a positive divisor of its own.

FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization (arXiv 2306.00317), in the
log-domain form of the authors' code. What = c Delta e^d1 with c = clamp(round(W / (Delta e^(d1 + d2 + d3)))): d1 per
group moves the step, d2 per weight and d3 per row only the rounding; all start at zero, which is round to nearest on
the grid's fit. Zero points stay. Gradients are those of the straight-through estimator; d2's is proportional to |W|.
All layers of a block are trained together against the float block's output on the float stream, fed with the stream
quantised so far.

Where this departs: d2 stays within `limit` (a divisor beyond e has no use); the step with the least loss on held-out
samples is kept, measured with the codes as they are stored, round to nearest among the candidates; groups are allowed.
The published default is 5000 steps; presets for a CPU take fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.learn.batches import ShuffledRounds
from featherweight.methods.learn.loop import Schedule, Training, minimise
from featherweight.methods.learn.objectives import BlockObjective
from featherweight.methods.quantize.base import Grid, Rounding, Scope, SolveOptions, WeightSource
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.system.precision import Precision, choose_precision

NEEDED = "it needs a uniform grid along the input"


@register("rounding", "flexround")
class FlexRound(Rounding):
    """Learn divisors and steps of uniform grids block by block (see the module)."""

    scope: ClassVar[Scope] = "block"

    steps: int = Field(5000, ge=1, description="Adam steps a block")
    learning_rate: float = Field(3e-3, gt=0, description="in the log domain; cosine to zero")
    learn_divisors: bool = Field(
        True, description="train a divisor of each weight and row; off: only the step of a group"
    )
    limit: float = Field(1.0, gt=0, description="divisors of weights stay within e^-limit and e^limit")
    checks: int = Field(10, ge=1, description="how often the held-out samples are measured")
    held_out_share: float = Field(0.125, gt=0, lt=1, description="batches that only choose the best step")
    precision: Precision = Field("float32", description="of training passes; auto: the faster here; measured in fp32")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("targets",)

    @property
    def training_bytes(self) -> int:
        return 44  # weight, divisor, its gradient, moments and best, both bounds, weight as decoded and its gradient

    def refusal(self, grid: Grid) -> str | None:
        return None if isinstance(grid, UniformGrid) and grid.axis == "input" else NEEDED

    def quantize_source(self, source: WeightSource, grid: Grid, statistics: Statistics, options: SolveOptions) -> Code:
        """Without a block to reconstruct: the start, round to nearest."""
        return grid.quantize_source(source, options, statistics)

    def quantize_block(
        self,
        session: BlockAccess,
        grids: Mapping[str, Grid],
        statistics: Mapping[str, Statistics],
        options: SolveOptions,
        notify: Observer = silent,
        seed: int = 0,
    ) -> dict[str, Code]:
        objective = BlockObjective(
            session, self.held_out_share, choose_precision(self.precision, notify, session.device)
        )
        layers = {
            name: DividedWeight(
                session.weight(name), _uniform(grids[name], name), statistics.get(name, {}), objective.device
            )
            for name in grids
        }
        theta = [p for layer in layers.values() for p in layer.parameters(self.learn_divisors)]

        def gradients(batch: int) -> float:
            leaves = {name: layer.decode().requires_grad_() for name, layer in layers.items()}
            loss = objective.backward(leaves, {}, batch)
            for name, leaf in leaves.items():
                layers[name].backward(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
            return loss

        def project() -> None:
            for layer in layers.values():
                layer.by_weight.clamp_(-self.limit, self.limit)

        minimise(
            theta,
            gradients,
            Training("flexround", Schedule(self.steps, self.learning_rate, checks=self.checks)),
            ShuffledRounds(objective.batches, seed),
            check=lambda: objective.held_out_loss({n: layer.code().decode() for n, layer in layers.items()}, {}),
            project=project,
            notify=notify,
        )
        return {name: layer.code() for name, layer in layers.items()}


def _uniform(grid: Grid, name: str) -> UniformGrid:
    if not isinstance(grid, UniformGrid) or grid.axis != "input":
        raise RecipeError(f"rounding flexround cannot round {name}: {NEEDED}")
    return grid


class DividedWeight:
    """One layer's parameters, and the weight they stand for. Everything is float32, on one device.

    Attributes
    ----------
    by_group : d1 [out, groups]
    by_weight : d2 [out, in]
    by_row : d3 [out, 1]
    """

    def __init__(
        self, weight: Tensor, grid: UniformGrid, statistics: Statistics, device: torch.device | None = None
    ) -> None:
        self.fit = {name: value.to(device or weight.device) for name, value in grid.fit(weight, statistics).items()}
        self.weight, self.grid = weight.to(device or weight.device), grid
        self.size = min(grid.group_size, weight.shape[1])
        self.start = self.fit["scales"].float()
        self.by_group = torch.zeros_like(self.start)
        self.by_weight = torch.zeros_like(self.weight)
        self.by_row = torch.zeros(weight.shape[0], 1, device=self.weight.device)
        zero_points = self._spread(self.fit["zero_points"].float())
        self._low, self._high = -zero_points, (1 << grid.bits) - 1 - zero_points

    def parameters(self, divisors: bool) -> list[Tensor]:
        return [self.by_group, self.by_weight, self.by_row] if divisors else [self.by_group]

    def _spread(self, groups: Tensor) -> Tensor:
        """A value of each group to one of each weight."""
        return groups.repeat_interleave(self.size, 1)[:, : self.weight.shape[1]]

    def _divided(self) -> Tensor:
        """W / (Delta e^(d1 + d2 + d3)), zero where the step is."""
        steps = self._spread(self.start)
        ratio = torch.where(steps > 0, self.weight / steps, torch.zeros_like(steps))
        return ratio * torch.exp(-(self._spread(self.by_group) + self.by_weight + self.by_row))

    def decode(self) -> Tensor:
        """What [out, in], the step not yet rounded to its stored type."""
        codes = self._divided().round_().clamp_(self._low, self._high)
        return codes * self._spread(self.start * self.by_group.exp())

    def backward(self, gradient: Tensor) -> None:
        """Set the gradients of all parameters from that of What: closed forms of the straight-through estimator."""
        divided = self._divided()
        rounded = divided.round()
        inside = (rounded >= self._low) & (rounded <= self._high)
        steps = self._spread(self.start * self.by_group.exp())
        moved = torch.where(inside, divided * steps, torch.zeros_like(divided))  # W e^-(d2 + d3) where not clipped
        self.by_weight.grad = -gradient * moved
        self.by_row.grad = self.by_weight.grad.sum(1, keepdim=True)
        value = rounded.clamp_(self._low, self._high) * steps
        by_weight = gradient * (value - moved)
        columns = self.weight.shape[1]
        padded = torch.nn.functional.pad(by_weight, (0, self.start.shape[1] * self.size - columns))
        self.by_group.grad = padded.view(len(padded), -1, self.size).sum(-1)

    def code(self) -> Code:
        """With steps rounded to their stored type, in main memory; codes are those of `decode`."""
        codes = self._divided().round_().clamp_(self._low, self._high) - self._low
        scales = (self.start * self.by_group.exp()).to(self.fit["scales"].dtype)
        fit = {name: value.cpu() for name, value in {**self.fit, "scales": scales}.items()}
        return self.grid.encode(codes.to(torch.uint8).cpu(), fit)
