"""Layers that servers such as vLLM put into one, and which therefore have to be stored alike."""

from __future__ import annotations

from collections.abc import Iterator

from featherweight.interop.integers import Grid, grid_of
from featherweight.interop.stored import StoredModel

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""By the last part of their names."""


def grids_of(model: StoredModel) -> dict[str, Grid | None]:
    """The grids of coded matrices by module, None of those that are no integers with scales."""
    return {
        tensor.module: grid_of({key: value for key, value in tensor.spec.items() if key != "bias"})
        for tensor in model.tensors.values()
        if tensor.spec is not None and "[" not in tensor.module
    }


def unlike(model: StoredModel) -> Iterator[tuple[tuple[str, ...], str]]:
    """Modules that are put into one and are not stored alike, with a sentence on how they differ."""
    grids = grids_of(model)
    modules = {name.removesuffix(".weight") for name in model.tensors if name.endswith(".weight")}
    for first in modules:
        prefix, _, role = first.rpartition(".")
        for parts in FUSED:
            found = [f"{prefix}.{part}" for part in parts if role == parts[0] and f"{prefix}.{part}" in modules]
            kinds = [_kind(grids, module) for module in found]
            if len(set(kinds)) > 1:
                told = ", ".join(f"{part} {kind}" for part, kind in zip(parts, kinds, strict=False))
                yield tuple(found), f"{prefix} has {told}, and vLLM puts them into one layer: store them alike"


def _kind(grids: dict[str, Grid | None], module: str) -> str:
    if module not in grids:
        return "plain"
    grid = grids[module]
    if grid is None:
        return "of another code"
    return f"{grid.text} {'symmetric' if grid.symmetric else 'asymmetric'}{'' if grid.ordered else ' reordered'}"
