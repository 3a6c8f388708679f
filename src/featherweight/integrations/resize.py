"""`featherweight.resize`: a loaded stack grows and shrinks, block by block, without being loaded again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.errors import FeatherError

if TYPE_CHECKING:
    from pathlib import Path

    from featherweight.storage.stack.stack import Stack

PLACE = "_featherweight_stack"
"""Attribute of a model that was loaded from a stack: its folder and how many blocks are there."""


def remember(model: Any, folder: str | Path, blocks: int) -> None:
    """Note on a model of which stack it is a prefix."""
    setattr(model, PLACE, (folder, blocks))


def resize(model: Any, size: int | str) -> int:
    """Make a model that was loaded with a size larger or smaller: blocks at the top are added or removed.

    What is loaded already stays where it is. The model is then the same as one that is loaded with this size.

    Parameters
    ----------
    model : torch.nn.Module
        Of `featherweight.load(stack, size=...)`.
    size : int or str
        Most bytes of the weight file that the model would be: 80_000_000 or "80MB".

    Returns
    -------
    int
        Blocks of the stack that are loaded now.

    Raises
    ------
    FeatherError
        The model comes from no stack, or the size is less than its smallest model; nothing was changed then.
    CheckpointError
        The stack's folder is gone or damaged.
    """
    from featherweight.model.layers.modules import CodedModule
    from featherweight.storage.stack.stack import Stack

    place = getattr(model, PLACE, None)
    if place is None:
        raise FeatherError(
            'this model was not loaded from a stack with a size: load it with featherweight.load(DIR, size="60MB")'
        )
    folder, before = place
    with Stack.open(folder) as stack:
        blocks = stack.prefix(size)
        levels, old = stack.levels(blocks), stack.levels(before)
        specs = stack.prefix_specs(blocks)
        for module in model.modules():
            if isinstance(module, CodedModule) and levels.get(module.name) != old.get(module.name):
                _to_level(stack, module, specs[module.name], old[module.name], levels[module.name])
        _note_specs(model, levels, old, specs)
    remember(model, folder, blocks)
    return blocks


def _to_level(stack: Stack, module: Any, spec: dict[str, Any], before: int, level: int) -> None:
    """Exchange what a module stores: tensors that both levels have are kept, others are read or dropped."""
    from torch import nn

    from featherweight.storage.codes import code_layout

    kept = {stored: module._parameters.pop(name) for name, stored in stack.stored(module.name, before).items()}
    device = next(iter(kept.values())).device
    for name, stored in stack.stored(module.name, level).items():
        if stored not in kept:
            tensor = stack.checkpoint.tensor(f"{module.name}.{stored}")
            kept[stored] = nn.Parameter(tensor.to(device, copy=True), requires_grad=False)
        module._parameters[name] = kept[stored]
    module.spec, module.layout = dict(spec), code_layout(spec)
    module.release()


def _note_specs(model: Any, levels: dict[str, int], old: dict[str, int], specs: dict[str, dict[str, Any]]) -> None:
    """What the model says of itself when it is saved."""
    from featherweight.storage.checkpoint.format import quantization_config

    config = getattr(model.config, "quantization_config", None)
    if config is None or not hasattr(config, "stored"):
        return
    changed = {name: specs[name] for name in levels if levels[name] != old[name]}
    now = {name: changed.get(name, spec) for name, spec in config.specs.items()}
    config.stored["codes"] = quantization_config(now, config.stored.get("recipe", {}))["codes"]
    config.specs = now
