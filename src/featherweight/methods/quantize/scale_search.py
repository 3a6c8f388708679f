"""The search for per-input-channel scales of AWQ and its relatives, and where their inverse goes.

AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv 2306.00978). Layers that share an
input are a *unit*: they are quantised as Q(W diag(s)) diag(1/s), and 1/s is folded into the tensor the input comes
from. How important a channel is (mean |x| for AWQ) is the caller's; everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.calibrate.statistics import Statistics
from featherweight.methods.quantize.base import Grid
from featherweight.model.network.access import BlockAccess

PRESERVED = 2e-2  # relative change of the output that folding may cause by rounding norms to 16 bits


@dataclass(frozen=True)
class Unit:
    """Layers that share an input, and who can absorb a division of it.

    norm : name of the norm's weight, if nobody else reads it
    producer : name of the layer whose outputs enter linearly
    """

    names: tuple[str, ...]
    norm: str | None
    producer: str | None

    @property
    def absorbed(self) -> bool:
        return self.norm is not None or self.producer is not None


def unit_of(session: BlockAccess, names: Sequence[str]) -> Unit:
    """The unit that the layers `names`, a group or the part of a group that is compressed, are."""
    first = session.layers[names[0]]
    readers = {name for name, layer in session.layers.items() if layer.norm == first.norm}
    sharers = {name for name, layer in session.layers.items() if layer.input_group == first.input_group}
    norm = first.norm if first.norm and readers <= set(names) else None
    producer = first.producer if first.producer in session.layers and sharers <= set(names) else None
    return Unit(tuple(names), norm, producer if norm is None else None)


def scales_from(importance: Tensor, alpha: float, centred: bool) -> Tensor:
    """s = max(importance^alpha, 1e-4), divided by sqrt(max s min s) if `centred`: float32 [in], positive, finite."""
    scales = importance.float().pow(alpha).clamp(min=1e-4)
    if centred:
        scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite() & (scales > 0), scales, torch.ones_like(scales))


def scaled_weight(weight: Tensor, scales: Tensor, grid: Grid, statistics: Statistics = {}) -> Tensor:  # noqa: B006
    """Q(W diag(s)) diag(1/s), float32 [out, in]."""
    return grid.quantize(weight * scales, statistics).decode() / scales


Loss = Callable[[Mapping[str, Tensor]], float]
"""Mean squared difference of the inspected output when these weights take the place of the float ones."""


def layer_loss(weights: Mapping[str, Tensor], gram: Tensor) -> Loss:
    """The output of the layers themselves: tr(D H D'), D = What - W, H = mean of x x'."""

    def loss(trial: Mapping[str, Tensor]) -> float:
        total = 0.0
        for name, weight in weights.items():
            difference = trial[name] - weight
            total += float(((difference @ gram) * difference).sum()) / weight.shape[0]
        return total

    return loss


def module_loss(session: BlockAccess, names: Sequence[str], tokens: int | None) -> Loss:
    """The output of the module that holds the layers, on float inputs of up to `tokens` tokens.

    The module's inputs and float outputs are captured once; a trial then runs this module alone.
    """
    module = common_parent(session, names)
    calls = capture(session, module, tokens)

    def loss(trial: Mapping[str, Tensor]) -> float:
        total, count = 0.0, 0
        with torch.no_grad(), session.overridden(trial):
            for args, kwargs, expected in calls:
                total += float(
                    (first_tensor(module(*args, **kwargs)).float() - expected).square().sum(dtype=torch.float64)
                )
                count += expected.numel()
        return total / max(1, count)

    return loss


def common_parent(session: BlockAccess, names: Sequence[str]) -> nn.Module:
    """The module inside the block that holds all the layers: the attention, or the MLP."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) != 1:
        raise FeatherError(f"the layers {', '.join(names)} share an input but no parent module")
    return submodule(session, parents.pop())


def submodule(session: BlockAccess, name: str) -> nn.Module:
    """A module of the block by its name in the checkpoint, of which the path within the block is a tail."""
    parts = name.split(".")
    for start in range(len(parts)):
        try:
            return session.module.get_submodule(".".join(parts[start:]))
        except AttributeError:
            continue
    raise FeatherError(
        f"layer {name} is not a module of its own in {type(session.module).__name__} (experts are often stacked): "
        "what it puts out cannot be searched over; leave such layers out with layers.skip, or choose a recipe without "
        "a search, like gptq"
    )


class _Stop(Exception):
    pass


def capture(session: BlockAccess, module: nn.Module, tokens: int | None) -> list[tuple[Any, Any, Tensor]]:
    """Arguments and float output of `module` for the first batches, up to `tokens` tokens."""
    calls: list[tuple[Any, Any, Tensor]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args, kwargs, first_tensor(output).detach().float()))
        raise _Stop

    seen = 0
    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        for index, hidden in enumerate(session.inputs):
            if tokens is not None and seen >= tokens:
                break
            seen += hidden.shape[0] * hidden.shape[1] if hidden.dim() > 2 else hidden.shape[0]
            with torch.no_grad():
                try:
                    session.run(hidden, index)
                except _Stop:
                    continue
    finally:
        handle.remove()
    return calls


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first_tensor(output[0])


@dataclass(frozen=True)
class Found:
    """The best scales of a unit, and the losses of the search. `alpha` is None where s = 1 won."""

    scales: Tensor
    alpha: float | None
    loss: float
    start: float


def search(
    weights: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    importance: Tensor,
    loss: Loss,
    points: int,
    centred: bool,
    *,
    tie: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> Found:
    """Try alpha = 0, 1/points, ..., (points - 1)/points and keep the best; s = 1 unless another is strictly better.

    tie : makes scales meet a constraint (equal within the channels that one producer channel serves)
    """
    best: Found | None = None
    for t in range(points):
        alpha = t / points
        scales = tie(scales_from(importance, alpha, centred)) if t else torch.ones_like(importance, dtype=torch.float32)
        found = loss({name: scaled_weight(weight, scales, grids[name]) for name, weight in weights.items()})
        if best is None:
            best = Found(scales, None, found, found)
        elif found < best.loss:
            best = Found(scales, alpha, found, best.start)
    assert best is not None
    return best


def averaged(scales: Tensor, producers: int, heads_shared: int, head_dim: int) -> Tensor:
    """Scales [in] of o_proj, equal for all query heads that share a head of v: their mean.

    producers : rows of v_proj, that is key-value heads times `head_dim`
    """
    heads = producers // head_dim
    return scales.view(heads, heads_shared, head_dim).mean(1, keepdim=True).expand(-1, heads_shared, -1).reshape(-1)


def fold(session: BlockAccess, unit: Unit, scales: Tensor, head_dim: int | None = None) -> Tensor | None:
    """Multiply the unit's columns by s and divide what produces their input; the s used, float64, None if it cannot be.

    The divided weight of a norm is rounded to bfloat16, as it may be stored, and s moved to make up for it. Whether the
    block's function stayed is checked on the first batch, and everything is put back where it did not: a norm that adds
    one to its weight, or a family file's mistake, must not go unnoticed.
    """
    before = _output(session)
    scales = scales.double()
    undo: list[Callable[[], None]] = []
    if unit.norm is not None:
        norm = session.tensor(unit.norm).double()
        divided = (norm / scales).bfloat16().double()
        scales = torch.where((norm != 0) & (divided != 0), norm / divided, scales)
        both = (unit.norm, unit.norm.removesuffix("weight") + "bias")
        undo += [_scale_tensor(session, name, 1 / scales) for name in both]
    elif unit.producer is not None:
        rows = session.layers[unit.producer].shape[0]
        small = scales
        if rows != len(scales):
            assert head_dim is not None
            small = scales.view(rows // head_dim, -1, head_dim)[:, 0].reshape(-1)
        undo.append(_scale_weight(session, unit.producer, (1 / small).unsqueeze(1)))
        bias = session.layers[unit.producer].bias
        if bias is not None:
            undo.append(_scale_tensor(session, bias, 1 / small))
    undo += [_scale_weight(session, name, scales) for name in unit.names]
    after = _output(session)
    change = float((after - before).norm() / before.norm().clamp(min=1e-30))
    if change <= PRESERVED:
        return scales
    for put_back in undo:
        put_back()
    return None


def _output(session: BlockAccess) -> Tensor:
    with torch.no_grad():
        return session.run(session.inputs[0], 0).float()


def _scale_weight(session: BlockAccess, name: str, factor: Tensor) -> Callable[[], None]:
    weight = session.weight(name)
    session.set_weight(name, weight * factor.to(weight.dtype))
    return lambda: session.set_weight(name, weight)


def _scale_tensor(session: BlockAccess, name: str, factor: Tensor) -> Callable[[], None]:
    try:
        value = session.tensor(name).clone()
    except (KeyError, AttributeError, FeatherError):  # a norm without a bias
        return lambda: None
    session.set_tensor(name, (value.double() * factor.double()).to(value.dtype))
    return lambda: session.set_tensor(name, value)


def clip_bounds(
    weight: Tensor, inputs: Tensor, grid: Grid, steps: int = 20, shrink: float = 0.5, rows: int = 256
) -> Tensor:
    """AWQ's clip search: the symmetric bound of every group whose own part of the output is missed least.

    weight : float32 [out, in]; inputs : [tokens, in]. For i = 0 ... steps * shrink - 1 the bound is (1 - i/steps) times
    the group's largest |w|; the error is the mean over tokens of (sum over the group of x (Q(clamp(w)) - w))^2.
    Returns float32 [out, groups].
    """
    out, columns = weight.shape
    size = min(grid.group_size, columns)
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(inputs.float(), (0, groups * size - columns)).view(-1, groups, size)
    grams = torch.einsum("tgi,tgj->gij", padded, padded) / max(1, len(padded))
    largest = _grouped(weight, groups, size).abs().amax(-1)
    best, error = largest, torch.full_like(largest, torch.inf)
    for i in range(int(steps * shrink)):
        bounds = largest * (1 - i / steps)
        quantised = grid.quantize(clamped(weight, bounds, size)).decode()
        difference = _grouped(quantised - weight, groups, size)
        found = torch.cat(
            [
                torch.einsum("ogi,gij,ogj->og", part, grams, part)
                for part in torch.split(difference, rows)
            ]
        )  # fmt: skip
        better = found < error
        error, best = torch.where(better, found, error), torch.where(better, bounds, best)
    return best


def _grouped(weight: Tensor, groups: int, size: int) -> Tensor:
    padded = torch.nn.functional.pad(weight, (0, groups * size - weight.shape[1]))
    return padded.view(weight.shape[0], groups, size)


def clamped(weight: Tensor, bounds: Tensor, group_size: int) -> Tensor:
    """`weight` [out, in] within plus and minus the bound [out, groups] of its group."""
    spread = bounds.to(weight.dtype).repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    return torch.minimum(torch.maximum(weight, -spread), spread)
