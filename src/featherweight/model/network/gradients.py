"""Sees what goes into linear layers and, in the backward pass, the gradient of what comes out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.model.network.observe import InputRecorder, Probe, Seen, input_of

Take = Callable[[str, Seen, Tensor], None]
"""A layer's name, what it saw, and the loss's gradient at its output [n, out], row by row of what it saw."""


class GradientRecorder(InputRecorder):
    """Tells `take` of every layer that was watched in a forward pass, when the gradient comes by its output."""

    def __init__(
        self, model: nn.Module, probes: Mapping[str, Probe], take: Take, helpers: Sequence[Probe] = ()
    ) -> None:
        super().__init__(model, probes, helpers, stop=False)
        self.take = take

    def called(self, call: Callable[[], Any]) -> Any:
        """What `call` gives; its layers are watched."""
        self.seen, self._mixtures = {}, {}
        with self._watching():
            return call()

    def _watch(self, module: nn.Module, name: str, probe: Probe) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found = input_of(module, args, kwargs)
            if found is not None:
                self._record(name, probe, found, output)

        return module.register_forward_hook(hook, with_kwargs=True)

    def _record(self, name: str, probe: Probe, inputs: Tensor, output: Tensor | None = None) -> None:
        seen = self._seen(probe, inputs)  # of helpers too: experts are known by it
        if not name or not isinstance(output, Tensor) or not output.requires_grad:
            return  # routers give more than a product

        def felt(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            if probe.slot.rows is not None:
                rows = rows[:, probe.slot.rows[0] : probe.slot.rows[1]]
            if seen.tokens is not None and len(rows) != len(seen.tokens):  # all tokens, those of others as zeros
                rows = rows[seen.tokens]
            with torch.no_grad():
                self.take(name, seen, rows)

        output.register_hook(felt)  # type: ignore[no-untyped-call]
