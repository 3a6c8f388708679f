"""From windows of tokens to batches: how many sequences each, which are held out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.model.network.skeleton import Skeleton

ATTENTION_BYTES = 256 << 20
"""Attention probabilities of one batch, where they can only be had whole."""


def expanded(windows: Tensor, mask: Tensor | None, settings: CalibrationSettings) -> tuple[Tensor, Tensor | None]:
    """RSQ's dataset expansion: every window rolled cyclically, so that tokens are seen at several positions."""
    if windows.dim() != 2 or 0 in windows.shape or windows.is_floating_point():
        raise CalibrationError(
            f"windows must be token ids [sequences, length], not {windows.dtype} {list(windows.shape)}"
        )
    times = settings.expansion
    if times == 1:
        return windows, mask
    steps = [i * windows.shape[1] // times for i in range(times)]
    rolled = torch.stack([windows.roll(step, 1) for step in steps], 1).flatten(0, 1)
    return rolled, None if mask is None else torch.stack([mask.roll(step, 1) for step in steps], 1).flatten(0, 1)


def check_ids(windows: Tensor, host: Skeleton) -> None:
    """CalibrationError where the network has no row for a token."""
    rows = host.model.get_input_embeddings().weight.shape[0]
    if int(windows.min()) < 0 or int(windows.max()) >= rows:
        raise CalibrationError(
            f"the calibration windows hold token {int(windows.max())}, but the model has {rows} tokens: "
            "they were made with another tokenizer"
        )


def batch_size(windows: Tensor, settings: CalibrationSettings, attends: Skeleton | None) -> int:
    """Sequences a batch. attends : the network whose attention probabilities are wanted whole, else None"""
    length = windows.shape[1]
    size = max(1, settings.batch_tokens // length)
    if attends is not None:
        heads = int(getattr(attends.model.config.get_text_config(), "num_attention_heads", 1) or 1)
        size = min(size, max(1, ATTENTION_BYTES // (4 * heads * length * length)))
    return size


def batch_bounds(count: int, held_out: int, size: int) -> list[tuple[int, int]]:
    """First and last sequence of every batch; no batch holds both seen and held-out ones."""
    seen = count - held_out
    parts = ((0, seen), (seen, count))
    return [(a, min(a + size, stop)) for start, stop in parts for a in range(start, stop, size)]


def split_bounds(bounds: Sequence[tuple[int, int]], most: int | None) -> tuple[list[tuple[int, int]], list[int]]:
    """Batches of at most so many sequences, as even as can be, and the number of the batch that each is a part of."""
    found: list[tuple[int, int]] = []
    numbers: list[int] = []
    for number, (first, last) in enumerate(bounds):
        pieces = 1 if most is None else -(-(last - first) // most)
        edges = [first + (last - first) * i // pieces for i in range(pieces + 1)]
        found += zip(edges[:-1], edges[1:], strict=True)
        numbers += [number] * pieces
    return found, numbers
