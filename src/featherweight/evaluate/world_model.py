"""What quantisation does to a world model that is used recursively and ranks plans.

An Empirical Study of World Model Quantization (arXiv 2602.02110): planning feeds a predictor of latents its own output
and only compares candidates, so the error of a layer, or of one step, says little. Measured here instead: how
roll-outs drift, whether candidates keep their order, whether the planner's cost still goes with success, and which
module is to blame at how many bytes. Models are callables; nothing here knows an architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.codes import Code
from featherweight.quantize.grids.uniform import UniformGrid

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(latents [n, ...], actions [n, a]) -> the next latents [n, ...]."""

FULL_BITS = 16  # of a module that is left as it is


def rollout(predictor: Predictor, start: Tensor, actions: Tensor) -> Tensor:
    """Latents [n, H, ...] after each of the actions [n, H, a], the predictor fed with its own output."""
    latents, visited = start, []
    for action in actions.unbind(1):
        latents = predictor(latents, action)
        visited.append(latents)
    return torch.stack(visited, 1)


@dataclass(frozen=True)
class Drift:
    """`relative` [H]: mean over roll-outs of |z'_h - z_h|^2 / |z_h|^2; `growth` [H - 1]: the ratios of neighbours."""

    relative: Tensor
    growth: Tensor


def drift(original: Tensor, quantised: Tensor) -> Drift:
    """How far roll-outs [n, H, ...] over the same actions part, step by step; in float64."""
    z, other = original.double().flatten(2), quantised.double().flatten(2)
    missed, size = (other - z).square().sum(-1), z.square().sum(-1)
    relative = (missed / size.where(size > 0, 1.0)).mean(0)
    before = relative[:-1]
    return Drift(relative, relative[1:] / before.where(before > 0, torch.nan))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 of values [n], float64; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values.double(), sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    shared: Tensor = ends - (counts + 1) / 2
    return shared[place]


def spearman(left: Tensor, right: Tensor) -> float:
    """Rank correlation of two lists [n]; 0 where one of them is constant and it is undefined."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (left, right))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def kendall(left: Tensor, right: Tensor) -> float:
    """Kendall's tau-b of two lists [n]: agreeing minus disagreeing pairs; 0 where it is undefined."""
    upper = torch.triu_indices(len(left), len(left), 1)
    a, b = ((values.double()[upper[0]] - values.double()[upper[1]]).sign() for values in (left, right))
    scale = math.sqrt(float(a.abs().sum()) * float(b.abs().sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def top_overlap(left: Tensor, right: Tensor, count: int) -> float:
    """Share of the `count` cheapest candidates of one list of costs [n] that are among those of the other.

    Of equal costs the first come first; a constant list says nothing and shares nothing.
    """
    if bool((left == left[0]).all()) or bool((right == right[0]).all()):
        return 0.0
    chosen = [set(costs.argsort(stable=True)[:count].tolist()) for costs in (left, right)]
    return len(chosen[0] & chosen[1]) / min(count, len(left))


@dataclass(frozen=True)
class Ranking:
    """How alike two models rank the same candidates: 1 for the same order, about 0 (overlap: k / n) for chance."""

    spearman: float
    kendall: float
    overlap: float


def ranking(original: Tensor, quantised: Tensor, elite: int = 30) -> Ranking:
    """Agreement of the costs [n] that two models give the same candidates; `elite` is how many a planner keeps.

    Anything that is not finite makes the quantised model's order undefined: all 0.
    """
    if not bool(torch.isfinite(quantised).all()):
        return Ranking(0.0, 0.0, 0.0)
    return Ranking(spearman(original, quantised), kendall(original, quantised), top_overlap(original, quantised, elite))


@dataclass(frozen=True)
class Coupling:
    """Whether low planner cost still means success.

    `agreement`: minus the rank correlation of final cost and success, 1 for a cost that orders episodes as success
    does, 0 where undefined; `constant`: the cost does not vary; `decoupled`: constant, or agreement below the limit.
    """

    agreement: float
    success: float
    constant: bool
    decoupled: bool


def coupling(costs: Tensor, success: Tensor, limit: float = 0.3) -> Coupling:
    """Of final planner costs [n] and success [n] (true or false, or a degree), an episode each."""
    constant = bool((costs == costs[0]).all())
    agreement = -spearman(costs, success.double()) + 0.0
    return Coupling(agreement, float(success.double().mean()), constant, constant or agreement < limit)


@dataclass(frozen=True)
class CrossEntropyPlanner:
    """Planning by the cross-entropy method: draw candidates, keep the cheapest, fit a Gaussian to them, repeat.

    Defaults are the study's. Give both models generators of the same seed: without common random numbers their
    difference is mostly noise.
    """

    horizon: int = 5
    candidates: int = 300
    elite: int = 30
    iterations: int = 10
    variance: float = 1.0

    def plan(
        self, cost: Callable[[Tensor], Tensor], action_size: int, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """The mean action sequence [H, a] of the last elite, and its cost.

        cost : action sequences [n, H, a] -> costs [n]
        """
        mean = torch.zeros(self.horizon, action_size)
        spread = torch.full_like(mean, math.sqrt(self.variance))
        for _ in range(self.iterations):
            drawn = mean + spread * torch.randn(self.candidates, *mean.shape, generator=generator)
            kept = drawn[cost(drawn).argsort(stable=True)[: self.elite]]
            mean, spread = kept.mean(0), kept.std(0, correction=0)
        return mean, float(cost(mean.unsqueeze(0))[0])


@dataclass(frozen=True)
class Sensitivity:
    """A measurement with some modules quantised: their bits (16: as they are), all bytes, and what was measured."""

    bits: dict[str, int]
    nbytes: int
    value: float


def quantize_omse(weight: Tensor, bits: int) -> Code:
    """The study's symmetric quantiser with the clip of least squared error, in groups of 128."""
    return UniformGrid(bits=bits, symmetric=True, clip="omse", group_size=128).quantize(weight)


@contextmanager
def quantised(module: nn.Module, bits: int, quantize: Callable[[Tensor, int], Code] = quantize_omse) -> Iterator[int]:
    """The linear layers of a module rounded to `bits` bits while the context lasts; gives the module's bytes then.

    With 16 bits nothing is touched.
    """
    total = sum(p.numel() * p.element_size() for p in module.parameters())
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)] if bits < FULL_BITS else []
    kept = [layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            code = quantize(weight.float(), bits)
            layer.weight.data = code.decode().to(weight.dtype)
            total += code.nbytes - weight.numel() * weight.element_size()
        yield total
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight


def module_sensitivity(
    modules: Mapping[str, nn.Module],
    measure: Callable[[], float],
    bits: Sequence[int] = (3, 4, 6, 8),
    quantize: Callable[[Tensor, int], Code] = quantize_omse,
) -> list[Sensitivity]:
    """`measure` with each module alone, then all of them, quantised to each number of bits; by rising bytes.

    The modules must not share layers. Compare entries of about equal bytes: that is what protecting one module costs.
    """
    names = list(modules)
    subsets = [[name] for name in names] + ([names] if len(names) > 1 else [])
    found = []
    for width in bits:
        for subset in subsets:
            chosen = {name: width if name in subset else FULL_BITS for name in names}
            found.append(measured(modules, chosen, measure, quantize))
    return sorted(found, key=lambda entry: entry.nbytes)


def measured(
    modules: Mapping[str, nn.Module],
    bits: Mapping[str, int],
    measure: Callable[[], float],
    quantize: Callable[[Tensor, int], Code] = quantize_omse,
) -> Sensitivity:
    """`measure` with the modules quantised to these bits."""
    with ExitStack() as stack:
        nbytes = sum(stack.enter_context(quantised(modules[name], bits[name], quantize)) for name in modules)
        return Sensitivity(dict(bits), nbytes, measure())
