"""One layer through the axes of its treatment: transforms, split, rounding, corrections, and what came of it.

Pure but for its inputs: a weight, statistics (empty for data-free recipes) and settings give a code and its record. A
layer whose calibrated code turns out worse on held-out data than the code the same grid gives without data keeps the
latter, and says so.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import (
    Correction,
    HeldWeight,
    LayerTransform,
    SolveOptions,
    Transform,
    WeightSource,
)
from featherweight.native.squared_errors import squared_errors
from featherweight.storage.codes import Code, describe_code
from featherweight.storage.codes.sum import Sum
from featherweight.tasks.compress.plan import Job

ERROR_ROWS = 40  # whole bytes of every packing
ERROR_WINDOW = 4 << 20  # bytes
HELD_OUT = "held_out_gram"
OWN = ("base", "fisher", "output_gram")  # statistics of a layer, not of its input
MARGIN = 1.02  # a calibrated code may miss held-out data by this much more than a data-free one before it is dropped


@dataclass(frozen=True)
class Solved:
    """A layer's code; `notes` goes into its record (output errors, what a method reported, why it fell back)."""

    code: Code
    notes: dict[str, Any] = field(default_factory=dict)


class InputStatistics:
    """What layers with the same input share: statistics, and these carried over into transformed spaces.

    Carrying a gram over costs as much as a sweep's matrix products, and roundings factorise it once per tensor.
    """

    def __init__(self, statistics: Statistics, seed: int) -> None:
        self.statistics = statistics
        self.seed = seed
        self._carried: dict[tuple[int, Any], tuple[Statistics, dict[str, Tensor]]] = {}
        self._placed: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def having(self, own: Statistics) -> InputStatistics:
        """The same with statistics of one layer's own beside; what was carried over is shared."""
        inputs = InputStatistics({**self.statistics, **own}, self.seed)
        inputs._carried, inputs._placed = self._carried, self._placed
        return inputs

    def placed(self, statistics: Statistics, device: str) -> Statistics:
        """Statistics on a device; what layers share goes there once, and stays as long as this is used."""
        if device == "cpu" or not statistics:
            return statistics
        return {
            name: value.to(device) if name in OWN else self._shared(value, device) for name, value in statistics.items()
        }

    def _shared(self, value: Tensor, device: str) -> Tensor:
        place = (id(value), device)
        if str(value.device) == device:
            return value
        if place not in self._placed:
            self._placed[place] = (value, value.to(device))  # kept alive: its id is the key
        return self._placed[place][1]

    def carried(self, transform: LayerTransform, statistics: Statistics) -> Statistics:
        """`transform.statistics(statistics)`, computed once for transforms with equal keys."""
        key = getattr(transform, "key", None)
        if key is None or not statistics:
            return transform.statistics(statistics) if statistics else statistics
        shared = {name: value for name, value in statistics.items() if name not in OWN}
        own = {name: value for name, value in statistics.items() if name in OWN}
        place = (id(statistics.get("gram")), key)
        if place not in self._carried:
            self._carried[place] = (statistics, transform.statistics(shared))  # kept alive: its id is the key
        return {**self._carried[place][1], **(transform.statistics(own) if own else {})}


def group_seed(seed: int, input_group: str) -> int:
    """The seed of the layers that share an input, 63 bits."""
    digest = hashlib.sha256(f"{seed}:{input_group}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def solve_layer(
    job: Job,
    source: WeightSource,
    inputs: InputStatistics,
    options: SolveOptions,
    fixed: tuple[LayerTransform, ...] = (),
) -> Solved:
    """The code of a layer by its treatment.

    Parameters
    ----------
    job : the layer and its treatment, whose choices of layer scope are applied
    source : the weight [out, in]
    inputs : what is known of the layer's input; statistics are empty for data-free treatments
    options : threads and windows, which change no result
    fixed : transforms found for the layer at block scope, applied before the treatment's own

    Raises
    ------
    RecipeError
        Names the layer where its treatment cannot be applied.
    """
    treatment = job.treatment
    statistics = {name: value for name, value in inputs.statistics.items() if name != HELD_OUT}
    try:
        if not treatment.layer_transforms and not treatment.layer_corrections and not fixed and not statistics:
            placed = PlacedWeight.of(source, device_for(job, options))
            return Solved(treatment.rounding.quantize_source(placed, treatment.grid, statistics, options))
        weight = source.rows(0, source.shape[0]).float()
        steps = _Steps(job, inputs, options, fixed)
        solved = steps.taken(weight, statistics)
        held_out = inputs.statistics.get(HELD_OUT)
        if held_out is None or not statistics:
            return solved
        return _guarded(solved, weight, steps, held_out)
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"layer {job.layer.name} cannot be compressed: {error}") from error


class PlacedWeight:
    """A `WeightSource` whose rows are put on a device as they are read."""

    def __init__(self, source: WeightSource, device: str) -> None:
        self.source, self.device = source, device
        self.shape, self.dtype, self.largest = source.shape, source.dtype, source.largest

    @staticmethod
    def of(source: WeightSource, device: str) -> WeightSource:
        """The source itself where its rows are to stay in main memory."""
        return source if device == "cpu" else PlacedWeight(source, device)

    def rows(self, first: int, last: int) -> Tensor:
        return self.source.rows(first, last).to(self.device)

    def release(self, first: int, last: int) -> None:
        self.source.release(first, last)


def device_for(job: Job, options: SolveOptions) -> str:
    """Where a layer is solved: on the run's device if its grid and its rounding can be, else in main memory."""
    treatment = job.treatment
    return options.device if treatment.rounding.portable and treatment.grid.portable else "cpu"


def code_without_data(job: Job, weight: Tensor, options: SolveOptions, seed: int) -> Code:
    """The code that a layer's treatment gives a weight float32 [out, in] where nothing is known of its input."""
    inputs = InputStatistics({}, group_seed(seed, job.layer.input_group))
    return solve_layer(job.without_data(), HeldWeight(weight), inputs, options).code


@dataclass(frozen=True)
class _Steps:
    """A layer's way through the axes, for a weight and statistics."""

    job: Job
    inputs: InputStatistics
    options: SolveOptions
    fixed: tuple[LayerTransform, ...]

    def taken(self, weight: Tensor, statistics: Statistics) -> Solved:
        """Transform, split, round, correct, wrap. weight : float32 [out, in]."""
        treatment, seed, role = self.job.treatment, self.inputs.seed, self.job.layer.role
        made: list[LayerTransform] = []
        steps: list[Transform | LayerTransform] = [*self.fixed, *treatment.layer_transforms]
        device = device_for(self.job, self.options)
        if all(getattr(one, "portable", False) for one in (*steps, *treatment.layer_corrections)):
            weight, statistics = weight.to(device), self.inputs.placed(statistics, device)
        for step in steps:
            one = step.for_layer(weight, statistics, seed, role) if isinstance(step, Transform) else step
            made.append(one)
            weight = one.apply(weight)
            statistics = self.inputs.carried(one, statistics)
        parts: list[tuple[Correction, Tensor, Code | None]] = []
        rest = weight
        for correction in treatment.layer_corrections:
            whole = rest
            rest, term = correction.split(whole, statistics)
            parts.append((correction, whole, term))
        placed, there = HeldWeight(rest.to(device)), self.inputs.placed(statistics, device)
        code, notes = treatment.rounding.quantize_reported(placed, treatment.grid, there, self.options)
        for correction, whole, term in reversed(parts):  # inside out: each makes of its rest's code that of its whole
            code = code if term is None else Sum.of(code, term)
            code = correction.correct(whole, code, statistics)
        for one in reversed(made):
            code = one.wrap(code)
        return Solved(code, notes)


def _guarded(solved: Solved, weight: Tensor, steps: _Steps, held_out: Tensor) -> Solved:
    """`solved`, or the code of the same treatment without data where that one serves unseen inputs better.

    Where a method aims at the original network's outputs (`cross`), both codes are judged by these.

    Parameters
    ----------
    weight : float32 [out, in], as it was before any step
    held_out : second moment [in, in] of inputs that entered nothing else
    """
    device = steps.options.device
    original, held_out = weight, steps.inputs.placed({HELD_OUT: held_out}, device)[HELD_OUT]
    weight = weight.to(device)
    total = output_energy(weight, held_out)
    notes = {**solved.notes, "held_out_error": output_error(weight, solved.code, held_out, total)}
    if not any(choice.needs for choice in steps.job.treatment.of_layer):
        return Solved(solved.code, notes)  # this is the code without data: what was done before is judged by the block
    plain = replace(steps, job=steps.job.without_data()).taken(original, NO_STATISTICS)
    notes["held_out_error_data_free"] = output_error(weight, plain.code, held_out, total)
    found, without = notes["held_out_error"], notes["held_out_error_data_free"]
    allowed = (MARGIN - 1) * without
    cross = steps.inputs.statistics.get("cross")
    if cross is not None:
        cross = steps.inputs.placed({"cross": cross}, device)["cross"]
        pull = weight @ cross
        found += drift_error(weight, solved.code, held_out, cross, total, pull)
        without += drift_error(weight, plain.code, held_out, cross, total, pull)
    if math.isfinite(found) and found <= without + allowed:
        return Solved(solved.code, notes)
    against = "the output" if cross is None else "the original output, up to a constant"
    reason = f"on held-out text it misses {found:.4g} of {against}, the same grid without data {without:.4g}"
    return Solved(plain.code, {**notes, "fallback": "data-free", "reason": reason})


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """tr(W H W'), the mean squared length of what a layer gives for inputs with this second moment."""
    return float(torch.sum((weight @ gram).mul_(weight), dtype=torch.float64))


def output_error(weight: Tensor, code: Code, gram: Tensor, total: float | None = None) -> float:
    """tr((W - Q) H (W - Q)') / tr(W H W'), the relative squared error of the layer's output; 0 where there is none.

    total : `output_energy`, if it is known
    """
    total = output_energy(weight, gram) if total is None else total
    return output_energy(weight - code.decode().to(weight.device), gram) / total if total > 0 else 0.0


def drift_error(
    weight: Tensor, code: Code, gram: Tensor, cross: Tensor, total: float | None = None, pull: Tensor | None = None
) -> float:
    """2 tr(W D (W - Q)') / tr(W H W'): with `output_error`, the error against what the layer puts out in the original
    network, W x~, D = E[(x~ - x) x'], but for a part in which the code does not come.

    total, pull : `output_energy` and W D, if they are known
    """
    total = output_energy(weight, gram) if total is None else total
    pull = weight @ cross if pull is None else pull
    if not total > 0:
        return 0.0
    return 2 * float(torch.sum(pull * (weight - code.decode().to(weight.device)), dtype=torch.float64)) / total


def record_of(job: Job, source: WeightSource, solved: Solved, threads: int | None) -> dict[str, Any]:
    """What is known of a finished layer; RecipeError if its code is not finite."""
    code = solved.code
    missed = relative_error(source, code, threads)
    if not math.isfinite(missed):
        raise RecipeError(
            f"the code of layer {job.layer.name} is not finite: its weights reach {source.largest:.3g}, which is more "
            "than the recipe can store; set scale_dtype (value_dtype of dense-and-sparse) to auto or float32, or "
            "skip the layer"
        )
    return {
        "name": job.layer.name,
        "role": job.layer.role,
        "block": job.layer.block,
        "code": describe_code(code.spec),
        "spec": code.spec,
        "bits_per_weight": code.bits_per_weight,
        "nbytes": code.nbytes,
        "relative_error": missed,
        **solved.notes,
    }


def relative_error(source: WeightSource, code: Code, threads: int | None = None) -> float:
    """||W - decode(code)|| / ||W|| (Frobenius); 0 for a zero matrix.

    Sums of rows in float64 and an exact sum of these, so that it depends on neither windows nor threads.
    """
    rows = source.shape[0]
    step = SolveOptions(window_bytes=ERROR_WINDOW).window_rows(source.shape, 4, ERROR_ROWS)
    missed: list[float] = []
    total: list[float] = []
    for first in range(0, rows, step):
        last = min(rows, first + step)
        far, all_of_it = squared_errors(source.rows(first, last), code.decode_rows(first, last), threads)
        missed += far.tolist()
        total += all_of_it.tolist()
        source.release(first, last)
    source.release(0, rows)  # the system maps some pages around each fault, also behind the window
    norm = math.fsum(total)
    return math.sqrt(math.fsum(missed) / norm) if norm else 0.0
