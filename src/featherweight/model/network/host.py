"""What a calibration needs to know about a network, wherever its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from featherweight.model.network.placement import Slot
from featherweight.storage.checkpoint.anatomy import LinearLayer


class Host(Protocol):
    """A network whose blocks are loaded and dropped; `Skeleton` and `ModuleHost` are the two there are."""

    dtype: torch.dtype
    device: torch.device

    @property
    def model(self) -> nn.Module: ...
    @property
    def blocks(self) -> list[nn.Module]: ...
    @property
    def layers(self) -> dict[str, LinearLayer]: ...
    @property
    def slots(self) -> dict[str, Slot]: ...

    def tensor_slot(self, name: str) -> Slot:
        """Where a tensor other than a layer's weight is."""
        ...

    @property
    def replaced(self) -> dict[str, Tensor]:
        """Tensors by name in the checkpoint that blocks are loaded with instead of the checkpoint's."""
        ...

    def untie(self, name: str) -> None:
        """Give a tensor that the checkpoint lacks, being tied to another, its own memory."""
        ...

    def as_stored(self, tensor_name: str, value: Tensor) -> Tensor:
        """A value rounded to the dtype in which the finished model will hold a tensor of the checkpoint."""
        ...

    def revert(self, replaced: Mapping[str, Tensor]) -> None:
        """Go back to `replaced`, an earlier state of the property; tensors outside of it are the checkpoint's again."""
        ...

    def owners(self, path: str) -> list[tuple[nn.Module, str]]:
        """All (module, attribute) that hold the parameter at `path`."""
        ...

    def load_block(self, number: int) -> nn.Module: ...
    def drop_block(self, number: int) -> None: ...

    def close(self) -> None:
        """Leave the network as it was found, but for its weights."""
        ...


def parameter_of(host: Host, path: str) -> Tensor:
    """The data of a parameter."""
    module, leaf = host.owners(path)[0]
    found = module._parameters[leaf]
    assert found is not None
    return found.data
