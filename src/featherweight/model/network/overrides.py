"""Other weights for a network, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from featherweight.model.network.host import parameter_of


@contextlib.contextmanager
def overridden(host: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the network computes with these weights [out, in], by layer, and tensors, by name in the checkpoint.

    Gradients flow into them.
    """
    with contextlib.ExitStack() as stack:
        for path, value in override_values(host, weights).items():
            for module, leaf in host.owners(path):
                stack.callback(module._parameters.__setitem__, leaf, module._parameters[leaf])
                module._parameters[leaf] = value
        yield


def override_values(host: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, by path, with the given weights in them, differentiable in the weights."""
    values: dict[str, Tensor] = {}
    for name, weight in weights.items():
        slot = host.slots[name] if name in host.slots else host.tensor_slot(name)
        data = parameter_of(host, slot.parameter)
        weight = weight.to(data.device, data.dtype)
        weight = weight.reshape(data.shape) if slot.matrix else weight
        if slot.expert is None and slot.rows is None:
            values[slot.parameter] = weight.t() if slot.transposed else weight
            continue
        if slot.parameter not in values:
            values[slot.parameter] = data.clone()
        slot.view(values[slot.parameter]).copy_(weight)
    return values
