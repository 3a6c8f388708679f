"""vLLM: which layers its own kernels take, by way of compressed-tensors, and what our plugin runs instead.

Its kernels for weights of few bits want four bits on CPUs, sides that are multiples of 32, layers that it fuses (query,
key and value; gate and up) stored alike, and groups and heads that can be shared among the processes of a
tensor-parallel run. The plugin (integrations/vllm.py) multiplies with our own packed layouts, on CPUs, in one process.
"""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.interop.engines import Answer, Target
from featherweight.interop.exporters.compressed_tensors import CompressedTensorsExporter
from featherweight.interop.exports import Verdict
from featherweight.interop.fused import FUSED, grids_of, unlike
from featherweight.interop.integers import Grid
from featherweight.interop.quantised_export import model_dtype
from featherweight.interop.stored import StoredModel
from featherweight.registry import register
from featherweight.storage.codes.base import dtype_name

PLUGIN = "as it is, on CPUs, by the plugin that featherweight brings for vLLM"
BY_COLUMNS = ("o_proj", "down_proj", "out_proj", "dense_4h_to_h", "fc2")
"""Layers whose input, not output, is shared among processes."""
ROLES = (*(part for parts in FUSED for part in parts), *BY_COLUMNS)
SIDE, BITS = 32, 4
"""Of the kernels on CPUs."""


@register("target", "vllm")
class Vllm(Target):
    """Exported where its own kernels take every layer, else by the plugin."""

    title = "vLLM"

    @classmethod
    def ask(cls, model: StoredModel, tensor_parallel: int = 1) -> Answer:
        shared = tuple(_heads(model, tensor_parallel))
        if not model.coded:
            return Answer(not shared, "as it is", shared)
        verdicts = CompressedTensorsExporter().verdicts(model)
        reasons = (*_kernels(model, verdicts), *shared, *_shares(model, tensor_parallel))
        if not reasons:
            return Answer(
                True, f"feather export {model.folder} --to compressed-tensors --out OUT", _lost(model, verdicts)
            )
        if tensor_parallel == 1:
            return Answer(True, PLUGIN, tuple(f"not by its own kernels: {reason}" for reason in reasons))
        return Answer(False, f"feather export {model.folder} --to dense --out OUT", reasons)


def _lost(model: StoredModel, verdicts: tuple[Verdict, ...]) -> tuple[str, ...]:
    """What an export changes, and what vLLM rounds when it loads it."""
    found = [f"{verdict.tensor} becomes plain {verdict.becomes}: {verdict.why}" for verdict in verdicts if verdict.why]
    scales = next((grid for grid in _grids(model).values() if grid is not None), None)
    dtype = model_dtype(model)
    if scales is not None and scales.scale_dtype != dtype:
        found.append(
            f"scales are {dtype_name(scales.scale_dtype)}, and vLLM rounds them to the type in which the model "
            f"computes, {dtype_name(dtype)}: with --dtype {dtype_name(scales.scale_dtype)} it does not"
        )
    return tuple(found)


def _grids(model: StoredModel) -> dict[str, Grid | None]:
    """The grids of coded linear layers."""
    return {module: grid for module, grid in grids_of(model).items() if module.endswith(ROLES)}


def _kernels(model: StoredModel, verdicts: tuple[Verdict, ...]) -> Iterator[str]:
    """What keeps its own kernels from the exported folder: the first of each kind."""
    lost = next((verdict for verdict in verdicts if verdict.fate == "impossible"), None)
    if lost is not None:
        yield f"{lost.tensor}: {lost.why}"
    grids = {module: grid for module, grid in _grids(model).items() if grid is not None}
    odd = next(((module, grid) for module, grid in grids.items() if grid.bits != BITS), None)
    if odd is not None:
        yield f"{odd[0]} has {odd[1].bits} bits, and its kernels on CPUs take {BITS}"
    for module, grid in grids.items():
        if any(side % SIDE for side in grid.shape):
            yield f"{module} is {grid.shape[0]} x {grid.shape[1]}, and its kernels take multiples of {SIDE}"
            break
    yield from sorted(said for _, said in unlike(model))[:1]


def _heads(model: StoredModel, processes: int) -> Iterator[str]:
    heads, kept = (model.config.get(f"num_{name}_heads") for name in ("attention", "key_value"))
    if isinstance(heads, int) and heads % processes:
        yield f"its {heads} attention heads cannot be shared among {processes} processes"
    elif isinstance(kept, int) and kept > 0 and kept % processes and processes % kept:
        yield f"its {kept} heads of keys and values cannot be shared among {processes} processes"


def _shares(model: StoredModel, processes: int) -> Iterator[str]:
    """The first layer of each way of sharing whose part is no whole groups or steps."""
    if processes == 1:
        return
    told: set[bool] = set()
    for module, grid in _grids(model).items():
        if grid is None:
            continue
        by_columns = module.endswith(BY_COLUMNS)
        side = grid.shape[1 if by_columns else 0]
        step = grid.group_size if by_columns and grid.groups > 1 else SIDE
        if by_columns not in told and side % (processes * step):
            told.add(by_columns)
            what = f"groups of {step} inputs" if step == grid.group_size and by_columns else f"steps of {SIDE}"
            yield f"{module}: {side} {'inputs' if by_columns else 'outputs'} are not {processes} times whole {what}"
