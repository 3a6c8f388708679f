"""The arguments with which a network calls its blocks, captured without running a block.

Every block is replaced by one that passes its input on. What the network hands to it beside the hidden states (masks,
positions, rotary tables) is kept once for all batches where it is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError
from featherweight.system.transformers_calls import Leaving

Forward = Callable[[Any], Any]
"""Runs the whole network on one batch."""


@dataclass(frozen=True)
class Arguments:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, block: nn.Module, hidden: Tensor) -> Any:
        return block(hidden, *self.args, **self.kwargs)


class Captured(Leaving):
    """All blocks have been called: the rest of the forward pass is not needed."""


@contextlib.contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The blocks compute these functions instead; what an instance had of its own (accelerate's hooks) comes back."""
    own = [block.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        for block, forward in reversed(list(zip(blocks, own, strict=True))):  # one block may be there twice
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Arguments]:
    if args:
        return args[0], Arguments(args[1:], dict(kwargs))
    rest = dict(kwargs)
    for name in ("hidden_states", "x", "input"):
        if name in rest:
            return rest.pop(name), Arguments((), rest)
    raise CalibrationError("the network calls its blocks without hidden states as first argument: give a whole forward")


def capture_first(forward: Forward, block: nn.Module, batch: Any) -> tuple[Any, Arguments]:
    """Input and further arguments of the first block."""
    found: list[tuple[Any, Arguments]] = []

    def replacement(*args: Any, **kwargs: Any) -> Any:
        found.append(split_hidden(args, kwargs))
        raise Captured

    with replaced_forwards([block], [replacement]), contextlib.suppress(Captured), torch.no_grad():
        forward(batch)
    if not found:
        raise CalibrationError("the network does not call its first block on the given batch")
    return found[0]


class Capture:
    """Hidden states in front of the first block, and the arguments of all blocks, batch by batch.

    in_tuple : whether blocks give their output as first element of a tuple
    """

    def __init__(self, forward: Forward, blocks: Sequence[nn.Module], in_tuple: bool) -> None:
        self.forward, self.blocks, self.in_tuple = forward, list(blocks), in_tuple
        self.arguments: list[list[Arguments]] = []
        self._pool: dict[tuple[Any, ...], list[Tensor]] = {}

    def add(self, batch: Any) -> Tensor:
        """Run one batch; the hidden states before the first block."""
        found: list[tuple[Tensor, Arguments]] = []

        def replacement(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = split_hidden(args, kwargs)
            if found and not same_values(hidden, found[0][0]):
                raise CalibrationError(
                    "the network changes the hidden states between its blocks, which block-by-block calibration "
                    "cannot follow; calibrate it as one whole module"
                )
            found.append((hidden, rest))
            if len(found) == len(self.blocks):
                raise Captured
            return (hidden,) if self.in_tuple else hidden

        forwards = [replacement] * len(self.blocks)
        with replaced_forwards(self.blocks, forwards), contextlib.suppress(Captured), torch.no_grad():
            self.forward(batch)
        if len(found) != len(self.blocks):
            raise CalibrationError(f"the network calls {len(found)} of its {len(self.blocks)} blocks on a batch")
        self.arguments.append([self._pooled_arguments(rest) for _, rest in found])
        return found[0][0].detach()

    def after(self, batch: Any, hidden: Tensor) -> Any:
        """What the network makes of `hidden` as output of its last block."""
        calls = 0

        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            out = hidden if calls == len(self.blocks) else split_hidden(args, kwargs)[0]
            return (out,) if self.in_tuple else out

        with replaced_forwards(self.blocks, [replacement] * len(self.blocks)):
            return self.forward(batch)

    def _pooled_arguments(self, arguments: Arguments) -> Arguments:
        kwargs = {name: self._pooled(value) for name, value in arguments.kwargs.items()}
        return Arguments(tuple(self._pooled(value) for value in arguments.args), kwargs)

    def _pooled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            pool = self._pool.setdefault((value.dtype, value.shape, value.device), [])
            for other in pool:
                if other is value or torch.equal(other, value):
                    return other
            pool.append(value.detach())
            return pool[-1]
        if type(value) in (tuple, list):
            return type(value)(self._pooled(v) for v in value)
        if type(value) is dict:
            return {k: self._pooled(v) for k, v in value.items()}
        # a key-value cache would grow with every call
        return None if type(value).__name__.endswith("Cache") else value


def to_host(hidden: Tensor, copy: bool = False) -> Tensor:
    """Hidden states in main memory; page-locked if they come from CUDA, which reads that at the bus's speed."""
    if hidden.device.type != "cuda":
        return hidden.to("cpu", copy=copy)
    return torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=True).copy_(hidden)


def to_device(hidden: Tensor, device: torch.device) -> Tensor:
    """Hidden states where the network is; the CPU does not wait for those that are page-locked."""
    return hidden.to(device, non_blocking=device.type == "cuda")


def same_values(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN to NaN too."""
    return one is other or (one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    if isinstance(output, tuple | list):
        output = output[0]
    if isinstance(output, dict):
        output = next(iter(output.values()))
    if not isinstance(output, Tensor):
        raise CalibrationError(f"a block gives {type(output).__name__}, not hidden states")
    return output
