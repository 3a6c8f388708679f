"""How a compressed predictor that is used recursively differs from the original: drift, ranking, sensitivity.

An Empirical Study of World Model Quantization (arXiv 2602.02110): a world model predicts the next latent state from the
present one and an action, and a planner ranks candidate action sequences by the cost of rolling them out. The error of
one step says little about either. Anything that maps (states [N, ...], actions [N, ...]) to next states will do. The
original and the compressed rollouts must see the same actions, or the differences are noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import EvaluationError
from featherweight.methods.quantize.base import Grid

Predictor = Callable[[Tensor, Tensor], Tensor]
"""Next states [N, ...] from states [N, ...] and actions [N, ...]."""


@dataclass(frozen=True)
class Drift:
    """Mean over rollouts of ||z' - z||^2 / ||z||^2 after 1, 2, ... steps, and the ratio of each to the one before.

    relative : float64 [H]
    growth : float64 [H - 1]; 1 where neither drifted
    """

    relative: Tensor
    growth: Tensor


@dataclass(frozen=True)
class Ranking:
    """Agreement of the candidates' costs: rank correlations (0 where a ranking is undefined), share of the k best."""

    spearman: float
    kendall: float
    top_k_overlap: float
    defined: bool


def rollout(predictor: Predictor, start: Tensor, actions: Tensor) -> Tensor:
    """States after every step [N, H, ...], for start states [N, ...] and actions [N, H, ...]."""
    states, state = [], start
    with torch.no_grad():
        for step in range(actions.shape[1]):
            state = predictor(state, actions[:, step])
            states.append(state)
    return torch.stack(states, 1)


def drift(original: Tensor, compressed: Tensor) -> Drift:
    """Of two rollouts [N, H, ...] over the same actions. EvaluationError if they are not alike or not finite."""
    if original.shape != compressed.shape or original.dim() < 3:
        raise EvaluationError(
            f"drift needs two rollouts of one shape [N, H, ...], found {list(original.shape)} and "
            f"{list(compressed.shape)}"
        )
    first, second = (t.cpu().double().flatten(2) for t in (original, compressed))
    if not bool(first.isfinite().all()):
        raise EvaluationError("the original model's rollout is not finite; shorten the horizon")
    size = first.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    relative = ((second - first).square().sum(-1) / size).mean(0)
    before, after = relative[:-1], relative[1:]
    growth = torch.where(before > 0, after / before, torch.where(after > 0, torch.inf, 1.0))
    return Drift(relative, growth)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64 [n]; equal values share the mean of theirs."""
    flat = values.detach().cpu().double().flatten()
    _, place, counts = torch.unique(flat, return_inverse=True, return_counts=True)
    last: Tensor = counts.cumsum(0).double()
    middle: Tensor = (last - (counts.double() - 1) / 2)[place]
    return middle


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation, ties averaged; 0 where one of the two does not vary or is not finite."""
    if not _comparable(one, other):
        return 0.0
    first, second = (r - r.mean() for r in (ranks(one), ranks(other)))
    return float((first @ second) / (first.norm() * second.norm()))


def kendall(one: Tensor, other: Tensor) -> float:
    """Kendall's tau-b; 0 where one of the two does not vary or is not finite. Memory grows with n^2."""
    if not _comparable(one, other):
        return 0.0
    first, second = (
        (v.unsqueeze(1) - v).sign() for v in (one.cpu().double().flatten(), other.cpu().double().flatten())
    )
    return float((first * second).sum() / (first.abs().sum() * second.abs().sum()).sqrt())


def top_k_overlap(one: Tensor, other: Tensor, k: int) -> float:
    """Share of the k cheapest candidates of one that are among the k cheapest of the other."""
    if one.numel() != other.numel() or not 1 <= k <= one.numel():
        raise EvaluationError(
            f"top-k overlap of {one.numel()} and {other.numel()} candidates cannot be had for k = {k}"
        )
    chosen = [set(v.flatten().cpu().double().argsort(stable=True)[:k].tolist()) for v in (one, other)]
    return len(chosen[0] & chosen[1]) / k


def ranking(original: Tensor, compressed: Tensor, k: int = 30) -> Ranking:
    """Agreement of candidate costs [n] of both models; the study's planner keeps 30 of 300.

    A compressed model whose costs do not vary ranks nothing: that is reported as `defined` False and correlations 0.
    """
    defined = _comparable(original, compressed)
    overlap = top_k_overlap(original, compressed, min(k, original.numel())) if defined else 0.0
    return Ranking(spearman(original, compressed), kendall(original, compressed), overlap, defined)


def decoupling(costs: Mapping[str, Tensor], successes: Mapping[str, Tensor]) -> dict[str, float]:
    """Rank correlation, for each variant of a model, between the final cost of plans and whether they succeeded.

    A planner that can be trusted has it well below zero; 0 says that its objective no longer means anything.
    """
    return {name: spearman(cost, successes[name].double()) for name, cost in costs.items()}


def module_sensitivity(
    parts: Mapping[str, nn.Module], grids: Mapping[str, Grid | None], measure: Callable[[], Any]
) -> list[dict[str, Any]]:
    """`measure()` with each part alone, and all parts together, quantised on each grid; weights are put back.

    parts : "encoder", "predictor", ...; their linear layers are quantised
    grids : by name; None leaves the weights alone, bit for bit
    Each row has part, grid, result and bytes, those of all parts' linear layers as stored then.
    """
    rows = []
    together: dict[str, list[str]] = {name: [name] for name in parts}
    if len(parts) > 1:
        together["all"] = list(parts)
    for grid_name, grid in grids.items():
        for label, chosen in together.items():
            with _quantised({name: parts[name] for name in chosen}, grid) as stored:
                rest = sum(_dense_bytes(parts[name]) for name in parts if grid is None or name not in chosen)
                rows.append({"part": label, "grid": grid_name, "result": measure(), "bytes": stored + rest})
    return rows


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _dense_bytes(module: nn.Module) -> int:
    return sum(m.weight.numel() * m.weight.element_size() for m in _linears(module))


@contextmanager
def _quantised(parts: Mapping[str, nn.Module], grid: Grid | None) -> Iterator[int]:
    """Within, the linear layers hold what their codes decode to; gives the bytes of the codes."""
    layers = [m for part in parts.values() for m in _linears(part)] if grid is not None else []
    before = [m.weight.detach().clone() for m in layers]
    stored = 0
    try:
        with torch.no_grad():
            for layer in layers:
                assert grid is not None
                code = grid.quantize(layer.weight.detach().to("cpu", torch.float32))  # solved in main memory
                stored += code.nbytes
                layer.weight.copy_(code.decode())
        yield stored
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)


def _comparable(one: Tensor, other: Tensor) -> bool:
    """Whether both rank their candidates; EvaluationError if they are not equally many."""
    if one.numel() != other.numel() or one.numel() < 2:
        raise EvaluationError(f"{one.numel()} and {other.numel()} values cannot be ranked against each other")
    values = (one.cpu().double().flatten(), other.cpu().double().flatten())
    return all(bool(v.isfinite().all()) and bool((v != v[0]).any()) for v in values)
