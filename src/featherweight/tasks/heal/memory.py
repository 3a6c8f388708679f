"""What a healing takes of memory, planned before it begins; the parts are what was measured of such trainings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from featherweight.errors import FeatherError
from featherweight.methods.learn.objectives import CACHE_BYTES, CHUNK_ELEMENTS
from featherweight.methods.quantize.corrections.cat_q import CatQ
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.devices import free_bytes
from featherweight.system.memory import available_bytes
from featherweight.system.units import size_text
from featherweight.tasks.heal.settings import HealSettings

RANK = CatQ.model_fields["rank"].default
TRAINED = 44
"""Bytes a weight whose digits are trained: its start, its change with gradient, two moments and the best so far, the
value with its gradients, digits."""
TUNED = 20
"""The same where digits stay: value, gradient, digits, a temporary matrix in turn."""
A_TOKEN = 12
"""Bytes a token, of a layer's inputs and outputs, that a pass forwards keeps for the one back."""
LOGITS = 4 * 4 * CHUNK_ELEMENTS
A_FACTOR = 24
"""Bytes a value of the low-rank change that cat-q learns: its start, its change with gradient, moments, the best."""
STORED = 6
"""Bytes a weight in main memory where values are trained on a device: the code, its digits, and as it decodes for a
check."""


@dataclass(frozen=True)
class Need:
    """Most bytes that a healing takes beside what the process has when it begins.

    main : of main memory; on_device : of the memory of the device where values are trained, 0 on the CPU
    """

    main: int
    on_device: int = 0


def planned(anatomy: Anatomy, original: Checkpoint, settings: HealSettings, windows: int, device: torch.device) -> Need:
    """What a healing takes where the networks run on `device`.

    On a device batches are halved, down to one window, and what is kept of the original's states is given up, before
    its memory is short.
    """
    layers = anatomy.layers
    per_block: dict[int | None, int] = {}
    for layer in layers:
        per_block[layer.block] = per_block.get(layer.block, 0) + layer.parameters
    inside = sum(per_block.values())
    hidden = min((min(layer.shape) for layer in layers), default=1)
    here = device.type == "cpu"
    tokens = settings.length * (settings.batch if here else 1)
    touched = sum(sum(layer.shape) for layer in layers)
    factors = sum(min(RANK, *layer.shape) * sum(layer.shape) for layer in layers) if settings.training == "cat-q" else 0
    if settings.level == "blocks":
        together = min(settings.window, len(per_block))
        trained = together * max(per_block.values(), default=0)
        touched, factors = (total * together // max(1, len(per_block)) for total in (touched, factors))
        streams = 3 * 4 * windows * settings.length * hidden
        held = 4 * (original.parameters - inside) + 4 * trained
        work = held + TRAINED * trained + A_FACTOR * factors + tokens * A_TOKEN * touched
        beside = STORED * trained
    else:
        each = TUNED if settings.level == "scales" else TRAINED
        streams = 0
        states = min(CACHE_BYTES, 4 * windows * settings.length * hidden) if here else 0
        ends = 4 * (original.parameters - inside)  # as the original has them, and as they are decoded
        held = 4 * original.parameters + ends + states + LOGITS
        work = held + each * inside + A_FACTOR * factors + tokens * A_TOKEN * touched
        beside = STORED * inside + ends
    return Need(work + streams) if here else Need(beside + streams, work)


def check_room(need: Need, settings: HealSettings, device: torch.device) -> None:
    """FeatherError where that is not free now."""
    less = (
        "a smaller --window, or fewer windows of text"
        if settings.level == "blocks"
        else "--level blocks, which holds a few blocks at a time"
    )
    for wanted, free, where in (
        (need.main, available_bytes(), "memory"),
        (need.on_device, free_bytes(device), f"memory on {device}"),
    ):
        if free and wanted > free:
            raise FeatherError(
                f"this healing needs about {size_text(wanted)} of {where}, and {size_text(free)} are free: try {less}"
            )
