"""Mean shift: biases behind norms make up for what quantised layers before them did to the mean of their output.

D2Quant's deviation-aware correction (arXiv 2602.02546; reconstructed from a later package, the paper's text was not at
hand). Once attention is quantised and before the MLP is: teacher y = output of the post-attention norm of the block
with its original weights, student y' = the same with quantised attention, both fed with the stream quantised so far.
mu = mean over tokens of y - y', per channel, clipped to `largest`; the norm's output becomes norm(x) + mu.

A norm without a bias cannot hold mu: the layers that read it get the biases W mu instead. W is the float weight, so
mu itself suffers no rounding, and the statistics of these layers, taken without it, stay right; the published form
rounds W first and takes the statistics with mu. `skip_first` leaves out the first tokens of a window, whose attention
sinks would dominate the mean (published: 0).

Behind the last block the final norm is shifted likewise: the teacher is that block with quantised attention and the
corrected norm, but the MLP's float weights; the student has all layers quantised. The output layer gets W mu as bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.events import Observer, silent
from featherweight.methods.quantize.base import Correction, Scope
from featherweight.methods.quantize.scale_search import submodule
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register
from featherweight.storage.codes import Code


@register("correction", "mean-shift")
class MeanShift(Correction):
    """Shift the inputs of MLPs and output layer by the mean deviation that rounding causes (see the module)."""

    scope: ClassVar[Scope] = "block"

    largest: float = Field(10.0, gt=0, description="the shift of a channel is clipped to this")
    skip_first: int = Field(0, ge=0, description="tokens at the start of each window that are left out of the mean")

    final: bool = Field(True, description="also shift the final norm, by a bias of the output layer")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("targets",)

    @property
    def alters(self) -> bool:
        return True

    def correct_block(
        self, session: BlockAccess, codes: Mapping[str, Code], notify: Observer = silent, seed: int = 0
    ) -> dict[str, Code]:
        """Behind the last block: the final norm's shift, a bias of the output layer. Codes stay as they are."""
        output_layer = session.output_layer if self.final else None
        if output_layer is None:
            return {}
        student = self._mean_output(session)
        with session.original():
            floats = {name: session.weight(name) for name in session.names if session.layers[name].kind != "attention"}
        with session.overridden(floats):
            teacher = self._mean_output(session)
        shift = self._shift(teacher, student, output_layer, notify)
        session.add_bias(output_layer, session.output_weight() @ shift)
        return {}

    def after_group(
        self, session: BlockAccess, group: Sequence[str], codes: Mapping[str, Code], notify: Observer = silent
    ) -> dict[str, Code]:
        """After the last layer of the attention: find the shift and set the biases of the MLP's first layers."""
        readers = self._readers(session, group)
        if not readers:
            return {}
        norm = session.layers[readers[0]].norm
        assert norm is not None
        if norm in session.changed:
            notify({"event": "mean-shift", "norm": norm, "skipped": "the norm was changed by another choice"})
            return {}
        student = self._mean_input(session, readers[0])
        with session.original():
            teacher = self._mean_input(session, readers[0])
        self._apply(session, norm, readers, self._shift(teacher, student, norm, notify))
        return {}

    def _shift(self, teacher: Tensor, student: Tensor, place: str, notify: Observer) -> Tensor:
        shift = (teacher - student).clamp(-self.largest, self.largest).float()
        notify({"event": "mean-shift", "place": place, "norm_of_shift": float(shift.norm())})
        return shift

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
        mean = _Mean(self.skip_first)

        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            mean.add(arguments[0])

        handle = submodule(session, name).register_forward_pre_hook(add)
        try:
            with torch.no_grad():
                for index, hidden in enumerate(session.inputs):
                    session.run(hidden, index)
        finally:
            handle.remove()
        return mean.finish()

    def _mean_output(self, session: BlockAccess) -> Tensor:
        """Mean over tokens of what the output layer reads: float64 [hidden]."""
        mean = _Mean(self.skip_first)
        with torch.no_grad():
            for index, hidden in enumerate(session.inputs):
                mean.add(session.output_inputs(session.run(hidden, index), index))
        return mean.finish()


class _Mean:
    """Of rows [..., in] over tokens; the first `skipped` tokens of windows [batch, tokens, in] do not count."""

    def __init__(self, skipped: int) -> None:
        self.skipped, self.count = skipped, 0
        self.total = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor) -> None:
        rows = rows[:, self.skipped :] if rows.dim() == 3 else rows
        rows = rows.reshape(-1, rows.shape[-1])
        self.total = self.total + rows.double().sum(0).cpu()
        self.count += len(rows)

    def finish(self) -> Tensor:
        return self.total / max(1, self.count)
