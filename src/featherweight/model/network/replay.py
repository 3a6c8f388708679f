"""Passes over one block that do not compute again what an earlier pass has computed.

A block's layers are solved set after set, and each set is preceded by a pass up to it, so that attention would run once
for every set behind it. Most blocks are a few children (attention, MLP) whose output is that of their last linear layer
and nothing more. Once all that stands before such a layer is final, its input is kept, batch by batch; later passes
take the child's output from there. Whether a child is of this kind is not assumed but compared, to the bit, on a batch.
What is kept is dropped as soon as something it depends on changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.model.network.streams import replaced_forwards

Key = tuple[str, int]
"""With whose weights and on which stream, and the number of the batch."""

PRESENT = "present"
"""Such keys are of weights that change."""


@dataclass
class _Child:
    """A child of the block: its path, its last linear layer, and what is kept of them by stream and batch.

    sound : whether its output was found to be that of `last`; None before anyone has looked
    later : paths of parameters on which neither the input nor the output of `last` depends
    rest : what stands behind the output where the child gives a tuple, None where it gives the tensor alone
    """

    path: str
    module: nn.Module
    last: nn.Module
    last_path: str
    later: frozenset[str]
    sound: bool | None = None
    rest: tuple[Any, ...] | None = None
    inputs: dict[Key, Tensor] = field(default_factory=dict)
    outputs: dict[Key, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop everything."""
        self.inputs.clear()
        self.outputs.clear()


class Replay:
    """What is kept of one block.

    Parameters
    ----------
    block : the module
    root : its path in the network
    stages : paths of the layers' parameters, by what is solved together, in order of execution
    budget : bytes that may be kept
    """

    def __init__(self, block: nn.Module, root: str, stages: Sequence[Collection[str]], budget: int) -> None:
        self.budget, self.kept = budget, 0
        self.children: list[_Child] = []
        order = [path for stage in stages for path in stage]
        for stage in stages:
            if len(stage) != 1:  # several layers read that input: none of them is the last
                continue
            (path,) = stage
            inner = path.removeprefix(f"{root}.").rpartition(".")[0].split(".")
            if len(inner) != 2 or not path.startswith(f"{root}."):
                continue
            module, last = block.get_submodule(inner[0]), block.get_submodule(".".join(inner))
            if type(last) is nn.Linear:
                later = frozenset(order[order.index(path) + 1 :])
                self.children.append(_Child(f"{root}.{inner[0]}", module, last, path.rpartition(".")[0], later))

    def changed(self, path: str) -> None:
        """A parameter has another value: what was computed with the former one is dropped."""
        for child in self.children:
            if path.rpartition(".")[0] == child.last_path:
                self._drop(child.outputs)
            elif path not in child.later:
                self._drop(child.inputs)
                self._drop(child.outputs)

    def clear(self) -> None:
        """Drop everything."""
        for child in self.children:
            child.clear()
        self.kept = 0

    @contextlib.contextmanager
    def running(self, key: Key, probed: Collection[str] = ()) -> Iterator[None]:
        """Within, the block runs once, and children take from what is kept, or add to it.

        probed : paths of modules that somebody watches: they run
        """
        with contextlib.ExitStack() as stack:
            for child in self.children:
                if child.sound is False:
                    continue
                seen = any(path.startswith(f"{child.path}.") for path in probed)
                if child.sound and not seen and (key in child.outputs or key in child.inputs):
                    stack.enter_context(replaced_forwards([child.module], [self._answer(child, key)]))
                elif child.sound is None or key not in child.inputs:
                    stack.enter_context(self._watched(child, key))
            yield

    def _answer(self, child: _Child, key: Key) -> Any:
        def forward(*_: Any, **__: Any) -> Any:
            out = child.outputs.get(key)
            if out is None:
                inputs = child.inputs[key]
                out = child.last(inputs)
                if self.kept + _nbytes(out) <= self.budget:
                    child.outputs[key] = out.detach()
                    self.kept += _nbytes(out)
            return out if child.rest is None else (out, *child.rest)

        return forward

    @contextlib.contextmanager
    def _watched(self, child: _Child, key: Key) -> Iterator[None]:
        """Keep the input of the last layer; compare the child's output with what that layer gives, if not yet known."""
        products: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            wanted = key not in child.inputs and args and isinstance(args[0], Tensor)
            if wanted and self.kept + _nbytes(args[0]) <= self.budget:
                child.inputs[key] = args[0].detach()
                self.kept += _nbytes(args[0])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            products.append(output)

        def of_child(_: nn.Module, args: Any, output: Any) -> None:
            first, *rest = output if isinstance(output, tuple) else (output,)
            child.rest = tuple(rest) if isinstance(output, tuple) else None
            alone = isinstance(first, Tensor) and len(products) == 1 and all(other is None for other in rest)
            child.sound = alone and first.shape == products[0].shape and torch.equal(first, products[0])
            if not child.sound:
                self._drop(child.inputs)

        hooks = [child.last.register_forward_pre_hook(before, prepend=True)]  # others may end the pass here
        if child.sound is None:
            hooks.append(child.last.register_forward_hook(after))
            hooks.append(child.module.register_forward_hook(of_child))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _drop(self, kept: dict[Key, Tensor]) -> None:
        """What was computed with weights that change."""
        for key in [key for key in kept if key[0].startswith(PRESENT)]:
            self.kept -= _nbytes(kept.pop(key))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
