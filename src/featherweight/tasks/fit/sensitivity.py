"""How much of the model's predictions hangs on each layer: the divergence when one alone is changed, per error.

    s_l = KL(original || layer l alone replaced) / e_l

e_l the relative squared error of the layer's output with the code that replaces it. To second order the divergence is
quadratic in the change, so s_l is the same for all ways, and that of a whole model about the sum of s_l e_l: the linear
model of the divergence by which bytes are given out. How far sums are from the truth is measured on true models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint

TEACHER_BYTES = 1 << 29
"""Most memory that the original's log-probabilities take."""
ROWS = 256
"""Tokens whose distributions are compared at a time."""


class Network:
    """The original in memory, whose predictions on a few windows are compared with those of changed copies.

    Parameters
    ----------
    windows : token ids int64 [n, T]; as many of them are used as TEACHER_BYTES allow, one at least
    outside : names of the matrices outside the blocks that may be changed
    """

    def __init__(self, whole: WholeModel, windows: Tensor, vocabulary: int) -> None:
        self.whole = whole
        fit = max(1, TEACHER_BYTES // (4 * vocabulary * windows.shape[1]))
        self.windows = windows[:fit]
        self.teacher = [self._log_probabilities(ids) for ids in self.windows]

    @property
    def tokens(self) -> int:
        """Whose predictions are compared."""
        return self.windows.numel()

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.whole.hidden(ids.unsqueeze(0))[0]
            return torch.cat([self._of_states(states[i : i + ROWS]) for i in range(0, len(states), ROWS)])

    def _of_states(self, states: Tensor) -> Tensor:
        return torch.log_softmax(self.whole.head(states).float(), -1)

    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """Mean KL(original || changed) in nats a token, with these matrices [out, in] in place of the original's."""
        total, count = 0.0, 0
        with torch.no_grad(), self.whole.overridden(weights):
            for ids, teacher in zip(self.windows, self.teacher, strict=True):
                states = self.whole.hidden(ids.unsqueeze(0))[0]
                for first in range(0, len(states), ROWS):
                    log_p = teacher[first : first + ROWS]
                    log_q = self._of_states(states[first : first + ROWS])
                    total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
                    count += len(log_p)
        return max(0.0, total / count)


@contextlib.contextmanager
def network_of(
    checkpoint: Checkpoint, anatomy: Anatomy, windows: Tensor, settings: CalibrationSettings, outside: Sequence[str]
) -> Iterator[Network]:
    """The original, all of it in memory, for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        opened = Calibration.open(checkpoint, anatomy, windows, settings, (), head=True, outside=outside)
        whole = stack.enter_context(stack.enter_context(opened).whole_model())
        yield Network(whole, windows, vocabulary_of(checkpoint.config, anatomy))


def vocabulary_of(config: Mapping[str, Any], anatomy: Anatomy) -> int:
    """Size of the vocabulary: rows of the embedding, or what config.json says."""
    if anatomy.embedding is not None:
        return anatomy.embedding.shape[0]
    found = config.get("vocab_size")
    return found if isinstance(found, int) else 1 << 18
