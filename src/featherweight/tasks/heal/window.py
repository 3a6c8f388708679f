"""Several neighbouring blocks as one that is trained: each window against the original's outputs of the same blocks.

Input is the stream of the network as healed so far, target the original's output on the original's stream; only the
window's blocks are in memory (sliding windows as in CAT-Q, arXiv 2606.26650).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.session import BlockSession
from featherweight.model.network.host import parameter_of
from featherweight.model.network.overrides import overridden
from featherweight.model.network.streams import to_host


class BlockWindow:
    """Blocks `first` to `last` of a network that is being walked, for `BlockObjective`.

    Made when the walk has come to `first` and nothing in these blocks was set: they compute with original weights, and
    the trained ones are put over them. `close` gives back the blocks behind the first.
    """

    def __init__(self, calibration: Calibration, session: BlockSession, last: int) -> None:
        self.calibration, self.session = calibration, session
        self.index, self.last = session.index, last
        self.module: nn.Module = session.module
        for number in range(self.index + 1, last + 1):
            calibration.host.load_block(number)
        self.names = [name for name, layer in calibration.host.layers.items() if layer.block in self.blocks]
        with torch.no_grad():
            streams = enumerate(calibration.original_hidden)
            self._targets = [to_host(self.run(hidden, number).detach()) for number, hidden in streams]

    def weight(self, name: str) -> Tensor:
        """float32 [out, in] of the original, a copy."""
        slot = self.calibration.host.slots[name]
        part = slot.view(parameter_of(self.calibration.host, slot.parameter))
        return part.to("cpu", torch.float32, copy=True).contiguous()

    @property
    def blocks(self) -> range:
        """Their numbers."""
        return range(self.index, self.last + 1)

    @property
    def device(self) -> torch.device:
        """Where they run."""
        return self.calibration.host.device

    @property
    def inputs(self) -> list[Tensor]:
        """Hidden states in front of the first block, of the batches that are learned from."""
        return self.session.inputs

    @property
    def held_out_inputs(self) -> list[Tensor]:
        """The same of the others."""
        return self.session.held_out_inputs

    @property
    def targets(self) -> list[Tensor]:
        """What the original makes of them behind the last block."""
        return self._targets[: self.calibration.batches_seen]

    @property
    def held_out_targets(self) -> list[Tensor]:
        """The same of the others."""
        return self._targets[self.calibration.batches_seen :]

    def run(self, hidden: Any, batch_index: int) -> Tensor:
        """Hidden states behind the last block; differentiable."""
        for number in self.blocks:
            hidden = self.calibration.call(number, hidden, batch_index)
        found: Tensor = hidden
        return found

    @contextlib.contextmanager
    def overridden(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, the blocks compute with these weights, by layer, and tensors, by name; gradients flow into them."""
        with overridden(self.calibration.host, weights):
            yield

    def close(self) -> None:
        """Drop the blocks behind the first; the walk loads them again when it comes to them."""
        for number in self.blocks[1:]:
            self.calibration.host.drop_block(number)


def starts(blocks: int, window: int) -> list[tuple[int, int]]:
    """First and last block of every window: each begins half a window behind the one before it, one block at least.

    The last window ends with the last block, and no window lies within another.
    """
    step = max(1, window // 2)
    found = []
    for first in range(0, blocks, step):
        last = min(first + window, blocks) - 1
        found.append((first, last))
        if last == blocks - 1:
            break
    return found
