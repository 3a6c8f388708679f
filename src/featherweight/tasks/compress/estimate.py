"""How long a plan takes on this machine: every kind of work in it is timed on a small sample and counted.

A layer's time is that of `solve_layer` on a few rows, with statistics of random tokens; a pass's that of a product, an
attention and what is done element by element, in the type that the network will run in. The tuning of a whole model's
scales, and the gradients that guide statistics, are their passes, with the output layer's loss on a few tokens. Disk,
and other trainings of blocks or models, are not counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, scaled_dot_product_attention, silu

from featherweight.errors import FeatherError
from featherweight.methods.calibrate.accumulate import Accumulator
from featherweight.methods.quantize.base import HeldWeight
from featherweight.methods.quantize.decoding import TunableCode
from featherweight.methods.quantize.treatment import scope_of
from featherweight.system.precision import choose_precision
from featherweight.tasks.compress.data import pass_precision
from featherweight.tasks.compress.layer_statistics import gathered_needs
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.solve import InputStatistics, relative_error, solve_layer

FEW, MANY = 32, 160  # rows of the two samples of a layer
WIDEST = 1024  # columns of samples at most: a wider layer's time follows from theirs
TOKENS = 2048  # of samples of passes and statistics
NORM_PASSES = 8  # over the hidden state in a block: two norms, again for every set of layers that is solved
HEADS, HEAD_DIM = 4, 64
SAMPLED_TOKENS = 64  # of the output layer, whose rows are all taken


def estimate_seconds(plan: Plan) -> float:
    """Seconds of computing for a plan on this machine, of its threads."""
    solving = sum(_Solving(plan, job).seconds for job in _distinct(plan))
    if not plan.recipe.calibrated:
        return solving
    return solving + _Passes(plan).seconds + _Guiding(plan).seconds + _Tuning(plan).seconds


def tuning_seconds(plan: Plan) -> list[tuple[str, float]]:
    """(kind, seconds) of the trainings of a whole model that a plan ends with, as far as they can be foretold."""
    found = [one for one in plan.recipe.corrections if plan.recipe.calibrated and _tunes_model(one)]
    return [(one.kind, _Tuning(plan).seconds_of(one)) for one in found]


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
        return tokens * (streams * self.forward_token(self._dtype) + self._statistics_token)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, pass_precision(self.plan.recipe))  # type: ignore[no-any-return]

    @property
    def _hidden(self) -> int:
        return min(job.layer.shape[1] for job in self.plan.jobs)

    def forward_token(self, dtype: torch.dtype) -> float:
        """Seconds of a forward pass of all blocks for one token."""
        length = self.plan.recipe.calibration.length
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
                guided = self.plan.recipe.calibration.guidance  # every layer has statistics of its own then
                wanted[job.layer.name if guided else job.layer.input_group] = job.layer.shape[1], needs
        costs: dict[tuple[int, tuple[str, ...]], float] = {}
        seconds = 0.0
        for columns, needs in wanted.values():
            width, key = min(columns, WIDEST), (min(columns, WIDEST), needs)
            if key not in costs:
                guided = self.plan.recipe.calibration.guidance
                accumulator = Accumulator(width, needs, torch.device("cpu"), guided)
                tokens = _random(TOKENS, width).to(dtype)
                weights = torch.rand(guided, TOKENS, device="cpu") if guided else None
                difference = 0.01 * tokens.float() if "cross" in needs else None
                costs[key] = _timed(lambda a=accumulator, t=tokens, w=weights, d=difference: a.add(t, w, d)) / TOKENS  # type: ignore[misc]
            seconds += costs[key] * (columns / width) ** 2
        return seconds


def _head_token(plan: Plan, learns: bool) -> float:
    """Seconds of the output layer's divergence for one token; 0 for models without predictions."""
    anatomy = plan.anatomy
    layer = anatomy.embedding if anatomy.tied_head else anatomy.head
    if layer is None:
        return 0.0
    head, wanted = _random(*layer.shape).mul_(0.02), _random(SAMPLED_TOKENS, layer.shape[1])
    own = (wanted + 0.1).requires_grad_(learns)

    def work() -> None:
        with torch.set_grad_enabled(learns):
            ours = linear(own, head.requires_grad_(learns)).log_softmax(-1)
            loss = kl_div(ours, linear(wanted, head.detach()).log_softmax(-1), reduction="sum", log_target=True)
        if learns:
            loss.backward()  # type: ignore[no-untyped-call]

    return _timed(work) / SAMPLED_TOKENS


@dataclass(frozen=True)
class _Guiding:
    """What the backward pass takes that weighs tokens, or gives factors of the loss's Fisher information."""

    plan: Plan

    @property
    def seconds(self) -> float:
        settings, passes = self.plan.recipe.calibration, _Passes(self.plan)
        if not settings.guidance and "output_gram" not in self.plan.needs:
            return 0.0
        tokens = settings.sequences * settings.length * settings.expansion
        once = passes.forward_token(getattr(torch, pass_precision(self.plan.recipe)))
        return tokens * (3 * once + _head_token(self.plan, True))  # forwards, again, and back to the inputs alone


@dataclass(frozen=True)
class _Tuning:
    """What training the scales of the whole model against the original's predictions takes."""

    plan: Plan

    @property
    def seconds(self) -> float:
        return sum(self.seconds_of(one) for one in self.plan.recipe.corrections if _tunes_model(one))

    def seconds_of(self, tuning: Any) -> float:
        """Of one of them."""
        settings, passes = self.plan.recipe.calibration, _Passes(self.plan)
        held_out = settings.held_out_of(settings.sequences) if settings.held_out and settings.sequences > 1 else 0
        work = tuning.model_work(settings.sequences - held_out, held_out)
        exact = passes.forward_token(torch.float32)
        trained = passes.forward_token(getattr(torch, choose_precision(tuning.precision)))
        learning, measuring = (tuning.token_share * _head_token(self.plan, learns) for learns in (True, False))
        once = 3 * trained + learning  # backwards is twice forwards
        decoding = tuning.steps * self._decoding
        tokens = work.learned * once + work.measured * (exact + measuring) + work.original * exact
        return float(decoding + settings.length * tokens)

    @property
    def _decoding(self) -> float:
        """Seconds of decoding all codes for a step, and of what its gradients take on the way back."""
        weight = _random(2 * MANY, WIDEST).mul_(0.02)
        job = max(self.plan.jobs, key=lambda job: job.layer.parameters)
        treatment = job.treatment.without_data()
        code = treatment.rounding.quantize_source(HeldWeight(weight), treatment.grid, {}, self.plan.options)
        tuned = TunableCode(code)

        def work() -> None:
            leaves = {path: value.clone().requires_grad_() for path, value in tuned.parameters.items()}
            tuned.decode(leaves).sum().backward()  # type: ignore[no-untyped-call]

        return _timed(work) / weight.numel() * self.plan.weights


def _tunes_model(choice: Any) -> bool:
    return scope_of(choice) == "model" and hasattr(choice, "model_work")


def left_out(plan: Plan) -> list[str]:
    """Kinds of the choices whose trainings the estimate does not count."""
    return [choice.kind for choice in plan.recipe.choices if scope_of(choice) != "layer" and not _tunes_model(choice)]
