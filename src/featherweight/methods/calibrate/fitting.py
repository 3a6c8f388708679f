"""Batches that fit into a device's memory: where one does not, all are halved and the pass begins again.

What is halved is everything that is kept by batch: the samples, both streams, masks, the arguments of the blocks, and
what a session has found of them. Statistics are sums over tokens, so only the order of adding up changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.feed import Feed
from featherweight.model.network.streams import Capture, to_host
from featherweight.system.devices import give_back

T = TypeVar("T")
REMEDY = (
    "shorten them with calibration.length (`feather plan` with --device and --max-device-memory says what fits), free "
    "memory of the device, or take --device cpu"
)


def fitting(feed: Feed, action: Callable[[], T], halved: Callable[[list[list[int]]], None] | None = None) -> T:
    """What `action` gives, which is begun again with smaller batches as often as it runs out of memory.

    Parameters
    ----------
    halved : is told how every batch was split, as sizes of its parts, before `action` is called again

    Raises
    ------
    CalibrationError
        The memory does not suffice for one window.
    """
    while True:
        try:
            return action()
        except torch.OutOfMemoryError:
            pass  # what its frames hold is free outside of this block only
        parts = halve(feed)
        if halved is not None:
            halved(parts)


def move_through(feed: Feed, session: Any, hidden: list[Any]) -> None:
    """Put what a session's block makes of each of these hidden states in its place."""
    done = 0

    def halved(parts: list[list[int]]) -> None:
        nonlocal done
        done = sum(map(len, parts[:done]))
        session.halved(parts)

    def move() -> None:
        nonlocal done
        while done < len(hidden):
            hidden[done] = to_host(session.run(hidden[done], done).detach())
            done += 1

    fitting(feed, move, halved)


def halve(feed: Feed) -> list[list[int]]:
    """Split every batch of more than one window in two; the sizes of the parts of each."""
    sizes = [len(batch["input_ids"]) for batch in feed.batches] if feed.length is not None else [1]
    if max(sizes) == 1:
        one = "one window" if feed.length is not None else "a batch"
        raise CalibrationError(
            f"the memory of {feed.host.device} does not suffice for {one} of the calibration: {REMEDY}"
        )
    parts = [[size] if size == 1 else [(size + 1) // 2, size // 2] for size in sizes]
    feed.batches_seen = sum(map(len, parts[: feed.batches_seen]))
    feed.planned = [number for number, of in zip(feed.planned, parts, strict=True) for _ in of]
    spread = [dict.fromkeys(batch) for batch, of in zip(feed.batches, parts, strict=True) for _ in of]
    for name in feed.batches[0]:
        pieces = split([batch[name] for batch in feed.batches], parts)
        for batch, piece in zip(spread, pieces, strict=True):
            batch[name] = piece
    feed.batches = spread
    if feed.masks is not None:
        feed.masks = split(feed.masks, parts)
    for stream in (feed.hidden,) if feed.original_hidden is feed.hidden else (feed.hidden, feed.original_hidden):
        if len(stream) == len(parts):
            stream[:] = spread if feed.whole else split(stream, parts)
    give_back(feed.host.device)
    if feed.capture is not None and len(feed.capture.arguments) == len(parts):
        feed.capture = Capture(feed.forward, feed.host.blocks, feed.capture.in_tuple)
        for batch in feed.batches:
            feed.capture.add(batch)
    _say(feed, "batches are of", max(size for of in parts for size in of))
    return parts


def halve_training(feed: Feed, windows: int) -> int:
    """The number of windows of the whole model that a training runs at once, after it was too much.

    Raises
    ------
    CalibrationError
        It was one.
    """
    if windows == 1:
        raise CalibrationError(
            f"the memory of {feed.host.device} does not suffice for a training of the whole model with one window: "
            f"{REMEDY}; recipes like trit-2-blockwise train a block at a time"
        )
    feed.windows_a_pass = (windows + 1) // 2
    give_back(feed.host.device)
    _say(feed, "gradients are added up over parts of", feed.windows_a_pass)
    return feed.windows_a_pass


def _say(feed: Feed, what: str, windows: int) -> None:
    text = f"{feed.host.device} ran out of memory: {what} {windows} window{'s' * (windows != 1)} from here on"
    feed.notify({"event": "note", "text": text})


def split(values: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Any]:
    """Tensors [B, ...] of all batches in parts of these sizes."""
    return [piece for value, sizes in zip(values, parts, strict=True) for piece in torch.split(value, list(sizes))]
