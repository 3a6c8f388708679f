"""How long a plan takes on this machine: every kind of work in it is timed on a small sample and counted.

A layer's time is that of `solve_layer` on a few rows, with statistics of random tokens; a pass's that of a product, an
attention and what is done element by element, in the type that the network will run in. Disk, and trainings of whole
blocks or models, are not counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from featherweight.errors import FeatherError
from featherweight.methods.calibrate.accumulate import Accumulator
from featherweight.methods.quantize.base import HeldWeight
from featherweight.methods.quantize.treatment import scope_of
from featherweight.tasks.compress.data import pass_precision
from featherweight.tasks.compress.layer_statistics import gathered_needs
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.solve import InputStatistics, relative_error, solve_layer

FEW, MANY = 32, 160  # rows of the two samples of a layer
WIDEST = 1024  # columns of samples at most: a wider layer's time follows from theirs
TOKENS = 2048  # of samples of passes and statistics
NORM_PASSES = 8  # over the hidden state in a block: two norms, again for every set of layers that is solved
HEADS, HEAD_DIM = 4, 64


def estimate_seconds(plan: Plan) -> float:
    """Seconds of computing for a plan on this machine, of its threads."""
    solving = sum(_Solving(plan, job).seconds for job in _distinct(plan))
    return solving + (_Passes(plan).seconds if plan.recipe.calibrated else 0.0)


def _timed(work: Callable[[], object], tries: int = 2) -> float:
    """The least of some tries, in seconds; the first call of all warms up."""
    work()
    found = []
    for _ in range(tries):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def _key(job: Job) -> str:
    width = job.layer.shape[1] if job.treatment.calibrated else 0
    return json.dumps([job.treatment.settings(), width], sort_keys=True)


def _distinct(plan: Plan) -> list[Job]:
    return list({_key(job): job for job in plan.jobs}.values())


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


@dataclass(frozen=True)
class _Solving:
    """The layers of a plan that are treated like `job` and, where data counts, as wide."""

    plan: Plan
    job: Job

    @property
    def seconds(self) -> float:
        alike = [job.layer for job in self.plan.jobs if _key(job) == _key(self.job)]
        rows = sum(layer.shape[0] for layer in alike)
        near = self.job.treatment.calibrated and not self.job.treatment.by_itself
        if near:
            try:
                once, each, row = self._with_data
                return once * len({layer.input_group for layer in alike}) + each * len(alike) + row * rows
            except FeatherError:  # it wants more than a pass gives: counted as without data
                pass
        return self._without_data * sum(layer.parameters for layer in alike)

    @cached_property
    def _without_data(self) -> float:
        """Seconds a weight."""
        treatment = self.job.treatment.without_data()
        weight = HeldWeight(_random(2 * MANY, 4 * WIDEST).mul_(0.02).bfloat16())
        options = self.plan.options

        def work() -> None:
            code = treatment.rounding.quantize_source(weight, treatment.grid, {}, options)
            relative_error(weight, code, options.threads)

        return _timed(work, 1) / (2 * MANY * 4 * WIDEST)

    @cached_property
    def _with_data(self) -> tuple[float, float, float]:
        """Seconds for an input's factors, beside them for a layer, and for a row, of the layers' width."""
        width = min(self.job.layer.shape[1], WIDEST)
        larger = self.job.layer.shape[1] / width
        tokens = _random(2 * width, width)
        needs = gathered_needs(self.job.treatment, self.plan.recipe.calibration.held_out)

        def took(rows: int, inputs: InputStatistics) -> float:
            layer = replace(self.job.layer, shape=(rows, width))
            weight = HeldWeight(_random(rows, width).mul_(0.02))
            begun = time.perf_counter()
            solve_layer(replace(self.job, layer=layer), weight, inputs, self.plan.options)
            return time.perf_counter() - begun

        def gathered() -> InputStatistics:
            accumulator = Accumulator(width, needs, torch.device("cpu"))
            accumulator.add(tokens, None, 0.01 * tokens.flip(0) if "cross" in needs else None)
            accumulator.add_held_out(tokens)
            return InputStatistics(accumulator.finish(), 0)

        took(8, gathered())  # warms up
        shared = gathered()
        first = took(FEW, shared)
        few, many = (min(took(rows, shared) for _ in range(2)) for rows in (FEW, MANY))
        row = max(0.0, many - few) / (MANY - FEW)
        return max(0.0, first - few) * larger**3, max(0.0, few - FEW * row) * larger**2, row * larger**2


@dataclass(frozen=True)
class _Passes:
    """What running the network for a plan takes, every product once (see model/network/replay.py)."""

    plan: Plan

    @property
    def seconds(self) -> float:
        settings = self.plan.recipe.calibration
        tokens = settings.sequences * settings.length * settings.expansion
        streams = 2 if "cross" in self.plan.needs else 1
        return tokens * (streams * self._forward_token + self._statistics_token)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, pass_precision(self.plan.recipe))  # type: ignore[no-any-return]

    @property
    def _hidden(self) -> int:
        return min(job.layer.shape[1] for job in self.plan.jobs)

    @cached_property
    def _forward_token(self) -> float:
        """Seconds of a forward pass of all blocks for one token."""
        dtype, length = self._dtype, self.plan.recipe.calibration.length
        inputs, weight = _random(TOKENS, self._hidden).to(dtype), _random(2 * self._hidden, self._hidden).to(dtype)
        heads = _random(1, HEADS, length, HEAD_DIM).to(dtype)
        wide = max((job.layer.shape[0] for job in self.plan.jobs if job.layer.block is not None), default=self._hidden)

        def norm() -> Tensor:
            exact = inputs.float()
            return inputs * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True))).to(dtype)

        with torch.no_grad():
            product = _timed(lambda: linear(inputs, weight)) / (TOKENS * weight.numel())
            attention = _timed(lambda: scaled_dot_product_attention(heads, heads, heads, is_causal=True))
            attention /= length * HEADS * HEAD_DIM  # a token and channel, of this length
            gate = _timed(lambda: silu(inputs) * inputs) / inputs.numel()
            norms = NORM_PASSES * _timed(norm) / inputs.numel()
        block = attention * self._hidden + norms * self._hidden + gate * wide
        return product * self.plan.linear_weights + block * self.plan.anatomy.blocks

    @cached_property
    def _statistics_token(self) -> float:
        """Seconds of adding one token to the statistics of all inputs."""
        dtype = self._dtype
        wanted: dict[str, tuple[int, tuple[str, ...]]] = {}
        for job in self.plan.jobs:
            needs = gathered_needs(job.treatment, self.plan.recipe.calibration.held_out)
            if needs:
                wanted[job.layer.input_group] = job.layer.shape[1], needs
        costs: dict[tuple[int, tuple[str, ...]], float] = {}
        seconds = 0.0
        for columns, needs in wanted.values():
            width, key = min(columns, WIDEST), (min(columns, WIDEST), needs)
            if key not in costs:
                accumulator = Accumulator(width, needs, torch.device("cpu"))
                tokens = _random(TOKENS, width).to(dtype)
                difference = 0.01 * tokens.float() if "cross" in needs else None
                costs[key] = _timed(lambda a=accumulator, t=tokens, d=difference: a.add(t, None, d)) / TOKENS  # type: ignore[misc]
            seconds += costs[key] * (columns / width) ** 2
        return seconds


def left_out(plan: Plan) -> list[str]:
    """Kinds of the choices whose trainings the estimate does not count."""
    return [choice.kind for choice in plan.recipe.choices if scope_of(choice) != "layer"]
