"""What a healing takes of memory, planned before it begins; the parts are what was measured of such trainings."""

from __future__ import annotations

from featherweight.errors import FeatherError
from featherweight.methods.learn.objectives import CACHE_BYTES, CHUNK_ELEMENTS
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.memory import available_bytes, resident_bytes
from featherweight.system.units import size_text
from featherweight.tasks.heal.settings import HealSettings

TRAINED = 44
"""Bytes a weight whose digits are trained: its start, its change with gradient, two moments and the best so far, the
value with its gradients, digits."""
TUNED = 20
"""The same where digits stay: value, gradient, digits, a temporary matrix in turn."""
A_TOKEN = 12
"""Bytes a token, of a layer's inputs and outputs, that a pass forwards keeps for the one back."""
SCORES = 3
LOGITS = 4 * 4 * CHUNK_ELEMENTS


def planned_bytes(anatomy: Anatomy, original: Checkpoint, settings: HealSettings, windows: int) -> int:
    """Most bytes of resident memory, beside what the process has when it begins."""
    layers = anatomy.layers
    per_block: dict[int | None, int] = {}
    for layer in layers:
        per_block[layer.block] = per_block.get(layer.block, 0) + layer.parameters
    inside = sum(per_block.values())
    hidden = min((min(layer.shape) for layer in layers), default=1)
    tokens = settings.batch * settings.length
    if settings.level == "blocks":
        together = min(settings.window, len(per_block))
        trained = together * max(per_block.values(), default=0)
        touched = sum(sum(layer.shape) for layer in layers) * together / max(1, len(per_block))
        streams = 3 * 4 * windows * settings.length * hidden
        held = 4 * (original.parameters - inside) + 4 * trained + streams
        return int(held + TRAINED * trained + tokens * A_TOKEN * touched)
    each = TUNED if settings.level == "scales" else TRAINED
    states = min(CACHE_BYTES, 4 * windows * settings.length * hidden)
    touched = sum(sum(layer.shape) for layer in layers)
    ends = 4 * (original.parameters - inside)  # as the original has them, and as they are decoded
    return int(4 * original.parameters + ends + each * inside + states + LOGITS + tokens * A_TOKEN * touched)


def check_room(need: int, settings: HealSettings) -> None:
    """FeatherError where that is not free now."""
    free = available_bytes()
    if free and need > free:
        less = (
            "a smaller --window, or fewer windows of text"
            if settings.level == "blocks"
            else "--level blocks, which holds a few blocks at a time"
        )
        raise FeatherError(
            f"this healing needs about {size_text(need)} of memory, and {size_text(free)} are free: try {less}"
        )


def beside_bytes() -> int:
    """What the process has when it begins."""
    return resident_bytes()
