"""How far predictions go from the original's when some matrices are replaced: the divergence that a fit is made by.

    KL(original || changed) = sum_v p_v (log p_v - log q_v),  nats a token, mean over tokens

A change in one block leaves what comes before it as it was. So the original's hidden states behind every block are
kept, and a pass begins at the first block that a change touches: over all layers, half the work. That a pass of the
kind gives what a whole one gives is tried on the model when it is opened; where it does not, because blocks hand each
other more than hidden states, all passes are whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.model.network.streams import replaced_forwards, split_hidden
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.memory import available_bytes

TEACHER_BYTES = 1 << 29
"""Most memory that the original's probabilities take."""
STATES_SHARE = 4
"""Hidden states are kept if they take no more than the free memory over this."""
ROWS = 256
"""Tokens whose distributions are compared at a time."""


@dataclass(frozen=True)
class Compared:
    """mean : KL in nats a token; deviation : standard error of the mean; tokens : compared"""

    mean: float
    deviation: float
    tokens: int


class Network:
    """The original in memory, whose predictions on a few windows are compared with those of changed copies.

    Parameters
    ----------
    windows : token ids int64 [n, T]; as many of them are used as TEACHER_BYTES allow, one at least

    Attributes
    ----------
    passes : equivalents of whole passes over all windows that were made, as blocks run over blocks there are
    from_block : whether passes begin at the block that changes
    """

    def __init__(self, whole: WholeModel, windows: Tensor, vocabulary: int) -> None:
        self.whole = whole
        fit = max(1, TEACHER_BYTES // (4 * vocabulary * windows.shape[1]))
        self.windows = windows[:fit]
        self.passes = 0.0
        self._blocks = list(whole.host.blocks)
        self._outputs: list[list[Any]] = []  # of each block, by window
        self.whole.hidden(self.windows[:1, :4])  # looks at the head the first time, with passes of its own
        keep, width = True, 0
        self.teacher: list[Tensor] = []  # probabilities
        self._negentropy: list[Tensor] = []  # sum of p log p, by token
        for ids in self.windows:
            states, outputs = self._recorded(ids) if keep else (self._states(ids, 0, 0), [])
            if keep:
                width = sum(o.numel() * o.element_size() for o in map(_tensor_of, outputs) if o is not None)
                free = available_bytes()
                keep = len(outputs) == len(self._blocks) and (
                    not free or width * len(self.windows) <= free // STATES_SHARE
                )
            if keep:
                self._outputs.append(outputs)
            self._teach(states)
        self.from_block = keep and self._agrees()
        if not self.from_block:
            self._outputs.clear()

    @property
    def tokens(self) -> int:
        """Whose predictions are compared, at most."""
        return self.windows.numel()

    def _teach(self, states: Tensor) -> None:
        parts, sums = [], []
        for first in range(0, len(states), ROWS):
            log_p = torch.log_softmax(self._logits(states[first : first + ROWS]), -1)
            parts.append(log_p.exp())
            sums.append((parts[-1] * log_p).sum(-1, dtype=torch.float64))
        self.teacher.append(torch.cat(parts))
        self._negentropy.append(torch.cat(sums))

    def _logits(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return self.whole.head(states).float()

    def block_states(self) -> Iterator[list[Tensor]]:
        """By window, the original's hidden states [T, hidden] before the first block and behind every block."""
        for ids in self.windows:
            before: list[Tensor] = []

            def note(module: Any, args: Any, kwargs: Any, before: list[Tensor] = before) -> None:
                before.append(split_hidden(args, kwargs)[0])

            hook = self._blocks[0].register_forward_pre_hook(note, with_kwargs=True)
            try:
                _, outputs = self._recorded(ids)
            finally:
                hook.remove()
            states = [before[0], *map(_tensor_of, outputs)]
            yield [state[0] for state in states if state is not None]

    # Passes ---------------------------------------------------------------------------------------------------------

    def _recorded(self, ids: Tensor) -> tuple[Tensor, list[Any]]:
        """Last hidden states of a window, and the output of every block that runs, in order."""
        outputs: list[Any] = []
        hooks = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in self._blocks]
        try:
            return self._states(ids, 0, 0), outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _states(self, ids: Tensor, window: int, first: int) -> Tensor:
        """Last hidden states [T, hidden], with the blocks before `first` taken as the original's."""
        forwards: list[Callable[..., Any]] = []
        for number in range(first):
            forwards.append(_giving(self._outputs[window][number]))
        share = 1 - first / max(1, len(self._blocks))
        self.passes += share / max(1, len(self.windows))
        with torch.no_grad(), replaced_forwards(self._blocks[:first], forwards):
            return self.whole.hidden(ids.unsqueeze(0))[0]

    def _agrees(self) -> bool:
        """Whether passes from a block give the same: from the last and from the middle one."""
        whole = self._states(self.windows[0], 0, 0)
        for first in {len(self._blocks) // 2, len(self._blocks) - 1}:
            try:
                part = self._states(self.windows[0], 0, first)
            except Exception:  # whatever a network of others makes of blocks that do not run
                return False
            if not torch.allclose(part, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max())):
                return False
        return True

    def first_block(self, layers: Iterable[LinearLayer]) -> int:
        """Where a pass may begin that changes these layers: a head by itself is behind all blocks."""
        if not self.from_block:
            return 0
        return min((self._begins(layer) for layer in layers), default=len(self._blocks))

    def _begins(self, layer: LinearLayer) -> int:
        if layer.block is not None:
            return layer.block
        return len(self._blocks) if layer.role == "head" else 0

    def compare(self, weights: Mapping[str, Tensor], first: int = 0) -> Compared:
        """KL(original || changed), with these matrices [out, in] in place of the original's.

        first : nothing before this block is changed, see `first_block`
        """
        found: list[Tensor] = []
        with torch.no_grad(), self.whole.overridden(weights):
            for number, ids in enumerate(self.windows):
                found += self._by_token(number, self._states(ids, number, first))
        return _compared(found)

    def _by_token(self, number: int, states: Tensor) -> list[Tensor]:
        found = []
        for begin in range(0, len(states), ROWS):
            log_q = torch.log_softmax(self._logits(states[begin : begin + ROWS]), -1)
            p = self.teacher[number][begin : begin + ROWS]
            found.append(self._negentropy[number][begin : begin + ROWS] - torch.linalg.vecdot(p, log_q).double())
        return found

    def divergence(self, weights: Mapping[str, Tensor], first: int = 0) -> float:
        """Mean KL over all windows."""
        return self.compare(weights, first).mean


def _compared(found: Sequence[Tensor]) -> Compared:
    every = torch.cat(list(found))
    deviation = float(every.std()) / math.sqrt(len(every)) if len(every) > 1 else math.inf
    return Compared(max(0.0, float(every.mean())), deviation, len(every))


def _tensor_of(output: Any) -> Tensor | None:
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) else None


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


@contextlib.contextmanager
def network_of(
    checkpoint: Checkpoint, anatomy: Anatomy, windows: Tensor, settings: CalibrationSettings, outside: Sequence[str]
) -> Iterator[Network]:
    """The original, all of it in memory, for as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        exact = settings.model_copy(update={"dtype": "float32"})  # rounding to bfloat16 diverges as much as a layer
        opened = Calibration.open(checkpoint, anatomy, windows, exact, (), head=True, outside=outside)
        whole = stack.enter_context(stack.enter_context(opened).whole_model())
        yield Network(whole, windows, vocabulary_of(checkpoint.config, anatomy))


def vocabulary_of(config: Mapping[str, Any], anatomy: Anatomy) -> int:
    """Size of the vocabulary: rows of the embedding, or what config.json says."""
    if anatomy.embedding is not None:
        return anatomy.embedding.shape[0]
    found = config.get("vocab_size")
    return found if isinstance(found, int) else 1 << 18
