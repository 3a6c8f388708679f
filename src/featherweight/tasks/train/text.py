"""The text of a training: windows of tokens, some of them held out, in an order that a step's number gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featherweight.errors import CalibrationError, FeatherError
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.model.text.windows import Wanted, check_vocabulary, windows
from featherweight.tasks.train.settings import TrainSettings

MOST_WINDOWS = 1 << 17
"""That are made of a text; a longer training goes over them again, in another order."""


class TrainText(NamedTuple):
    """Token ids int64: `trained` [windows, length], `held_out` [windows, length]."""

    trained: Tensor
    held_out: Tensor

    def batch(self, seed: int, first: int, count: int) -> Tensor:
        """Windows number `first` to `first + count - 1` of the training, [count, length].

        Each time over the text has an order of its own, which depends on the seed and its number alone.
        """
        total, rows = len(self.trained), []
        for number in range(first, first + count):
            rows.append(int(order(seed, number // total, total)[number % total]))
        return self.trained[rows]


_orders: dict[tuple[int, int, int], Tensor] = {}


def order(seed: int, epoch: int, total: int) -> Tensor:
    """A permutation of `total` windows for a time over the text; the last one is kept."""
    key = (seed, epoch, total)
    if key not in _orders:
        _orders.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _orders[key] = torch.randperm(total, generator=generator, device="cpu")
    return _orders[key]


def read_text(
    tokenizer: Tokenizer, text: Any, held_out: str | Path | None, settings: TrainSettings, config: dict[str, Any]
) -> TrainText:
    """Windows of a text as calibration reads it, a mixture or a source; and those of another that are held out.

    Raises
    ------
    FeatherError
        The text cannot be read, or is shorter than a window and what is held out.
    """
    from featherweight.model.text.windows import context_of, vocabulary_of

    length = min(settings.length, context_of(config) or settings.length)
    wanted = min(MOST_WINDOWS, settings.steps * settings.windows_a_step)
    apart = settings.held_out_windows if held_out is None else 0
    ids = _windows(tokenizer, text, Wanted(wanted + apart, length, settings.seed), "training text")
    if held_out is not None:
        wanted_apart = Wanted(settings.held_out_windows, length, settings.seed)
        other = _windows(tokenizer, held_out, wanted_apart, "held-out text")
    else:
        apart = min(apart, len(ids) // 2)
        ids, other = ids[: len(ids) - apart], ids[len(ids) - apart :]
    for one in (ids, other):
        check_vocabulary(one, vocabulary_of(config))
    return TrainText(ids, other)


def _windows(tokenizer: Tokenizer, text: Any, wanted: Wanted, what: str) -> Tensor:
    try:
        return windows(tokenizer, text, wanted)
    except CalibrationError as error:
        words = str(error).replace("the calibration text", f"the {what}").replace("calibration file", f"{what} file")
        words = words.replace(" or calibration.length", "").replace("lower calibration.sequences", "lower --length")
        raise FeatherError(words.replace("calibration.sequences", "--steps")) from None
