"""Mean shift: a bias behind the norm before the MLP makes up for what quantised attention did to its mean output.

D2Quant's deviation-aware correction (arXiv 2602.02546; reconstructed from a later package, the paper's text was not at
hand). Once attention is quantised and before the MLP is: teacher y = output of the post-attention norm of the block
with its original weights, student y' = the same with quantised attention, both fed with the stream quantised so far.
mu = mean over tokens of y - y', per channel, clipped to `largest`; the norm's output becomes norm(x) + mu.

A norm without a bias cannot hold mu: the layers that read it get the biases W mu instead. W is the float weight, so
mu itself suffers no rounding, and the statistics of these layers, taken without it, stay right; the published form
rounds W first and takes the statistics with mu. The final norm's shift is not made. `skip_first` leaves out the first
tokens of a window, whose attention sinks would dominate the mean (published: 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.codes import Code
from featherweight.errors import FeatherError
from featherweight.quantize.access import BlockAccess, Tell, silent
from featherweight.quantize.base import Correction, Scope
from featherweight.quantize.scale_search import submodule
from featherweight.registry import register


@register("correction", "mean-shift")
class MeanShift(Correction):
    """Shift the input of the MLP by the mean deviation that quantised attention causes (see the module)."""

    scope: ClassVar[Scope] = "block"

    largest: float = Field(10.0, gt=0, description="the shift of a channel is clipped to this")
    skip_first: int = Field(0, ge=0, description="tokens at the start of each window that are left out of the mean")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("targets",)

    def correct_block(
        self, session: BlockAccess, codes: Mapping[str, Code], tell: Tell = silent, seed: int = 0
    ) -> dict[str, Code]:
        """Nothing: the work is done between attention and MLP, by `after_group`."""
        return {}

    def after_group(
        self, session: BlockAccess, group: Sequence[str], codes: Mapping[str, Code], tell: Tell = silent
    ) -> dict[str, Code]:
        """After the last layer of the attention: find the shift and set the biases of the MLP's first layers."""
        readers = self._readers(session, group)
        if not readers:
            return {}
        norm = session.layers[readers[0]].norm
        assert norm is not None
        if norm in session.changed:
            tell({"event": "mean-shift", "norm": norm, "skipped": "the norm was changed by another choice"})
            return {}
        student = self._mean_input(session, readers[0])
        with session.original():
            teacher = self._mean_input(session, readers[0])
        shift = (teacher - student).clamp(-self.largest, self.largest).float()
        tell({"event": "mean-shift", "norm": norm, "norm_of_shift": float(shift.norm())})
        self._apply(session, norm, readers, shift)
        return {}

    def _readers(self, session: BlockAccess, group: Sequence[str]) -> list[str]:
        """The layers that read the norm behind the attention, if `group` is the attention's last."""
        places = [list(g) for g in session.groups]
        place = next((i for i, members in enumerate(places) if set(group) <= set(members)), len(places))
        if place + 1 >= len(places) or session.layers[group[0]].kind != "attention":
            return []
        following = places[place + 1]
        first = session.layers[following[0]]
        return following if first.kind != "attention" and first.norm is not None and first.expert is None else []

    def _apply(self, session: BlockAccess, norm: str, readers: Sequence[str], shift: Tensor) -> None:
        bias = norm.removesuffix("weight") + "bias"
        try:
            session.set_tensor(bias, session.tensor(bias) + shift)
        except (KeyError, AttributeError, FeatherError):
            for name in readers:
                session.add_bias(name, session.weight(name) @ shift)

    def _mean_input(self, session: BlockAccess, name: str) -> Tensor:
        """Mean over tokens of what a layer reads: float64 [in]."""
        total, count = torch.zeros(session.layers[name].shape[1], dtype=torch.float64), 0

        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal count
            rows = arguments[0]
            rows = rows[:, self.skip_first :] if rows.dim() == 3 else rows
            total.add_(rows.reshape(-1, rows.shape[-1]).double().sum(0).cpu())
            count += rows.numel() // rows.shape[-1]

        handle = submodule(session, name).register_forward_pre_hook(add)
        try:
            with torch.no_grad():
                for index, hidden in enumerate(session.inputs):
                    session.run(hidden, index)
        finally:
            handle.remove()
        return total / max(1, count)
