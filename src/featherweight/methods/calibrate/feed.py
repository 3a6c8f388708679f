"""What a session sees of the calibration that opened it: samples, settings, and how they go through the network.

`Calibration` (runner.py) is the one that is used. Sessions know no more of it than this, so it can import them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from featherweight.events import Observer
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.model.network.host import Host
from featherweight.model.network.streams import Capture
from featherweight.storage.checkpoint.anatomy import LinearLayer


class Session(Protocol):
    """The block that is worked on."""

    index: int
    host: Host
    module: nn.Module
    layers: dict[str, LinearLayer]
    effective_tokens: float | None

    @property
    def calibration(self) -> Feed:
        """Where its samples come from."""
        ...


class Feed(Protocol):
    """See `Calibration` for the attributes."""

    host: Host
    settings: CalibrationSettings
    batches: list[Any]
    batches_seen: int
    planned: list[int]
    windows_a_pass: int | None
    hidden: list[Any]
    original_hidden: list[Any]
    capture: Capture | None
    ids: Tensor | None
    length: int | None
    head: str | None
    masks: Sequence[Tensor] | None
    whole: bool
    two_streams: bool
    keeps_originals: bool
    stoppable: bool
    spare_bytes: int
    notify: Observer

    def forward(self, batch: Any, /) -> Any:
        """The whole network's output for a batch."""
        ...

    def call(self, index: int, hidden: Any, batch_index: int) -> Tensor:
        """The output of block `index` (or of what follows the last one) for hidden states of a batch."""
        ...

    def move(self, session: Any) -> None:
        """Both streams through a session's block."""
        ...

    def order_groups(self, session: Any, groups: list[list[str]]) -> list[list[str]]:
        """Groups of layers that share an input, in order of execution."""
        ...

    def token_weights(self, session: Any) -> Sequence[Tensor] | None:
        """Weights [B, T] of every batch for a block; None where tokens are equal."""
        ...

    def guidance(self, layer: str) -> tuple[Tensor, float] | None:
        """Weights float32 [g, windows, T] of the tokens for a layer, and their effective number; None without."""
        ...

    def first_window(self, batch: int) -> int:
        """The number of a batch's first window."""
        ...

    def mask_of(self, batch: int) -> Tensor | None:
        """bool [B, T], False for padding; None where there is none."""
        ...

    def batch_tokens(self, batch: int) -> int:
        """B * T of a batch of hidden states."""
        ...

    def place_of(self, batch: int, token: int) -> dict[str, int]:
        """Sequence and token in it, of a token of a batch."""
        ...
