"""One layer through the recipe's axes: transforms, split, rounding, corrections, and what came of it.

Pure but for its inputs: a weight, statistics (empty for data-free recipes) and settings give a code and its record. A
layer whose calibrated code turns out worse on held-out data than the code the same grid gives without data keeps the
latter, and says so.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.statistics import NO_STATISTICS, Statistics
from featherweight.methods.quantize.base import (
    HeldWeight,
    LayerTransform,
    Rounding,
    SolveOptions,
    Transform,
    WeightSource,
)
from featherweight.methods.recipe import Recipe
from featherweight.native.squared_errors import squared_errors
from featherweight.storage.codes import Code, describe_code
from featherweight.storage.codes.sum import Sum
from featherweight.tasks.compress.plan import Job

ERROR_ROWS = 40  # whole bytes of every packing
ERROR_WINDOW = 4 << 20  # bytes
HELD_OUT = "held_out_gram"
OWN = ("base", "fisher")  # statistics of a layer, not of its input
MARGIN = 1.02  # a calibrated code may miss held-out data by this much more than a data-free one before it is dropped


@dataclass(frozen=True)
class Solved:
    """A layer's code; `notes` goes into its record (output errors, what a method reported, why it fell back)."""

    code: Code
    notes: dict[str, Any] = field(default_factory=dict)


class InputGroup:
    """What layers with the same input share: statistics, and these carried over into transformed spaces.

    Carrying a gram over costs as much as a sweep's matrix products, and roundings factorise it once per tensor.
    """

    def __init__(self, statistics: Statistics, seed: int) -> None:
        self.statistics = statistics
        self.seed = seed
        self._carried: dict[tuple[int, Any], tuple[Statistics, dict[str, Tensor]]] = {}

    def having(self, own: Statistics) -> InputGroup:
        """The same group with statistics of one layer's own beside; what was carried over is shared."""
        group = InputGroup({**self.statistics, **own}, self.seed)
        group._carried = self._carried
        return group

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
    recipe: Recipe,
    job: Job,
    source: WeightSource,
    group: InputGroup,
    options: SolveOptions,
    fixed: tuple[LayerTransform, ...] = (),
    rounding: Rounding | None = None,
) -> Solved:
    """The code of a layer. `fixed` are transforms found for it at block scope, applied before the recipe's own.

    Raises RecipeError naming the layer where the recipe cannot treat it.
    """
    rounding = rounding or recipe.rounding
    transforms = [t for t in recipe.transforms if t.scope == "layer"]
    corrections = [c for c in recipe.corrections if c.scope == "layer"]
    statistics = {name: value for name, value in group.statistics.items() if name != HELD_OUT}
    try:
        if not transforms and not corrections and not fixed and not statistics:
            return Solved(rounding.quantize_source(source, job.grid, statistics, options))
        weight = source.rows(0, source.shape[0]).float()
        solved = _solve(weight, job, group, rounding, transforms, corrections, options, fixed, statistics)
        held_out = group.statistics.get(HELD_OUT)
        if held_out is None or not statistics:
            return solved
        return _guarded(solved, weight, job, group, rounding, transforms, corrections, options, fixed, held_out)
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"layer {job.layer.name} cannot be compressed: {error}") from error


def _solve(
    weight: Tensor,
    job: Job,
    group: InputGroup,
    rounding: Rounding,
    transforms: list[Transform],
    corrections: list[Any],
    options: SolveOptions,
    fixed: tuple[LayerTransform, ...],
    statistics: Statistics,
) -> Solved:
    made: list[LayerTransform] = []
    steps: list[Transform | LayerTransform] = [*fixed, *transforms]
    for step in steps:
        one = step.for_layer(weight, statistics, group.seed, job.layer.role) if isinstance(step, Transform) else step
        made.append(one)
        weight = one.apply(weight)
        statistics = group.carried(one, statistics)
    parts: list[tuple[Any, Tensor, Code | None]] = []
    rest = weight
    for correction in corrections:
        whole = rest
        rest, term = correction.split(whole, statistics)
        parts.append((correction, whole, term))
    code, notes = rounding.quantize_reported(HeldWeight(rest), job.grid, statistics, options)
    for correction, whole, term in reversed(parts):  # inside out: each makes of its rest's code that of what it split
        code = code if term is None else Sum.of(code, term)
        code = correction.correct(whole, code, statistics)
    for one in reversed(made):
        code = one.wrap(code)
    return Solved(code, notes)


def _guarded(
    solved: Solved,
    weight: Tensor,
    job: Job,
    group: InputGroup,
    rounding: Rounding,
    transforms: list[Transform],
    corrections: list[Any],
    options: SolveOptions,
    fixed: tuple[LayerTransform, ...],
    held_out: Tensor,
) -> Solved:
    """`solved`, or the code of the same recipe without data where that one serves unseen inputs better.

    Where a method aims at the original network's outputs (`cross`), both codes are judged by these.
    """
    from featherweight.methods.quantize.rounding.nearest import Nearest

    notes = {**solved.notes, "held_out_error": output_error(weight, solved.code, held_out)}
    if not any(choice.needs for choice in (*transforms, job.grid, rounding, *corrections)):
        return Solved(solved.code, notes)  # this is the code without data: what was done before is judged by the block
    plain = _solve(weight, job, group, Nearest(), transforms, corrections, options, fixed, NO_STATISTICS)
    notes["held_out_error_data_free"] = output_error(weight, plain.code, held_out)
    found, without = notes["held_out_error"], notes["held_out_error_data_free"]
    allowed = (MARGIN - 1) * without
    cross = group.statistics.get("cross")
    if cross is not None:
        found += drift_error(weight, solved.code, held_out, cross)
        without += drift_error(weight, plain.code, held_out, cross)
    if math.isfinite(found) and found <= without + allowed:
        return Solved(solved.code, notes)
    against = "the output" if cross is None else "the original output, up to a constant"
    reason = f"on held-out text it misses {found:.4g} of {against}, the same grid without data {without:.4g}"
    return Solved(plain.code, {**notes, "fallback": "data-free", "reason": reason})


def output_error(weight: Tensor, code: Code, gram: Tensor) -> float:
    """tr((W - Q) H (W - Q)') / tr(W H W'), the relative squared error of the layer's output; 0 where there is none."""
    missed = weight - code.decode()
    total = float(((weight @ gram).double() * weight).sum())
    return float(((missed @ gram).double() * missed).sum()) / total if total > 0 else 0.0


def drift_error(weight: Tensor, code: Code, gram: Tensor, cross: Tensor) -> float:
    """2 tr(W D (W - Q)') / tr(W H W'): with `output_error`, the error against what the layer puts out in the original
    network, W x~, D = E[(x~ - x) x'], but for a part in which the code does not come."""
    missed = weight - code.decode()
    total = float(((weight @ gram).double() * weight).sum())
    return 2 * float(((weight @ cross).double() * missed).sum()) / total if total > 0 else 0.0


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
