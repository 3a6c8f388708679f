"""What a program that will run the result lets layers become, and how processes can share them.

vLLM's own kernels (see `interop.targets.vllm`) take integers of four bits in groups, and want layers alike that it
puts into one. Processes of a tensor-parallel run share the inputs of layers that write into the stream,
and the outputs of others: groups, and the blocks that a rotation mixes, must not be cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from featherweight.errors import FeatherError
from featherweight.interop.targets.vllm import BITS, BY_COLUMNS, SIDE
from featherweight.methods.quantize.transforms.hadamard import HadamardTransform, block_for
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.tasks.fit.ways import Way

VLLM_GROUPS = (32, 128)


def vllm_ways() -> tuple[Way, ...]:
    """What its kernels read: four bits in groups of either size."""
    found = []
    for group in VLLM_GROUPS:
        grid = {"kind": "uniform", "bits": BITS, "group_size": group, "symmetric": True, "clip": "mse"}
        found.append(
            Way(f"{BITS} bits, groups of {group}", (), grid, {"kind": "hessian", "alpha": 1.0, "damping": 0.1})
        )
    return tuple(found)


def vllm_ways_named(names: Sequence[str]) -> tuple[Way, ...]:
    """Those of these names; all of them for none. FeatherError for a name that its kernels do not read."""
    known = {way.name: way for way in vllm_ways()}
    for name in names:
        if name not in known:
            raise FeatherError(f"vLLM's own kernels do not read {name!r}; choices for it: {'; '.join(known)}")
    return tuple(known[name] for name in names) if names else tuple(known.values())


def readable(layer: LinearLayer, ways: tuple[Way, ...]) -> tuple[Way, ...]:
    """Those that vLLM's kernels take of a layer: sides that are multiples of 32, and whole groups."""
    rows, columns = layer.shape
    return tuple(way for way in ways if rows % SIDE == columns % SIDE == 0 and columns % way.grid["group_size"] == 0)


def shareable(layer: LinearLayer, ways: tuple[Way, ...], processes: int) -> tuple[Way, ...]:
    """The ways of a layer that so many processes can share. FeatherError where there is none."""
    if processes == 1 or layer.block is None:
        return ways
    rows, columns = layer.shape
    if not layer.name.endswith(BY_COLUMNS):
        if rows % processes:
            raise FeatherError(f"--tensor-parallel {processes}: the {rows} outputs of {layer.name} cannot be shared so")
        return ways
    found = tuple(way for way in ways if columns % (processes * _step(way, columns)) == 0)
    if not found:
        raise FeatherError(
            f"--tensor-parallel {processes}: no choice cuts the {columns} inputs of {layer.name} into as many parts of "
            "whole groups: name other --choices, or fewer processes"
        )
    return found


def _step(way: Way, columns: int) -> int:
    """Inputs that have to stay together."""
    treatment = way.treatment(data=False)
    found = 1
    for choice in treatment.transforms:
        if isinstance(choice, HadamardTransform):
            found = math.lcm(found, block_for(columns, choice.block))
        elif choice.kind != "identity":
            return columns  # what else mixes or orders inputs is of all of them
    group = getattr(treatment.grid, "group_size", None)
    return math.lcm(found, group if isinstance(group, int) and group > 0 else 1)
