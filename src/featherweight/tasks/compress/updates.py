"""What fine-tuning changed in a whole model: |W - W_base| of many layers, streamed from two mapped checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.quantize.transforms.quantlrm import update_range
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight


def updates_of(
    tuned: Checkpoint, base: Checkpoint, layers: Sequence[LinearLayer], options: SolveOptions
) -> Iterator[Tensor]:
    """|W - W_base| of the layers, float32, in windows of rows whose pages are given back."""
    for layer in layers:
        known = base.entry(layer.tensor).shape if base.has(layer.tensor) else None
        if known != tuned.entry(layer.tensor).shape:
            there = "no such tensor" if known is None else f"one of {list(known)}"
            raise RecipeError(
                f"{layer.tensor} is {list(tuned.entry(layer.tensor).shape)}, but the base model {base.folder} has "
                f"{there}: name the one it was fine-tuned from with base_model= (on the command line --base-model)"
            )
        pair = LayerWeight(tuned, layer), LayerWeight(base, layer)
        step = options.window_rows(layer.shape, 4, 1)
        for first in range(0, layer.shape[0], step):
            last = min(layer.shape[0], first + step)
            after, before = (weight.rows(first, last).float() for weight in pair)
            yield (after - before).abs()
            for weight in pair:
                weight.release(first, last)


def model_update_range(
    tuned: Checkpoint,
    base: Checkpoint,
    layers: Sequence[LinearLayer],
    options: SolveOptions,
    notify: Callable[[dict[str, Any]], None],
) -> Tensor:
    """`update_range` of all the layers together: least, median and largest change, float32 [3].

    Tells these and the share of weights that did not change at all, which is large for checkpoints in bfloat16.
    """
    total, changed = 0, 0

    def counted() -> Iterator[Tensor]:
        nonlocal total, changed
        total, changed = 0, 0
        for update in updates_of(tuned, base, layers, options):
            total += update.numel()
            changed += int(update.count_nonzero())
            yield update

    found = update_range(counted)
    range_told = {name: float(value) for name, value in zip(("least", "median", "largest"), found, strict=True)}
    notify({"event": "updates", "layers": len(layers), "unchanged": 1 - changed / max(1, total), **range_told})
    return found
