"""Column scales of a layer's code move into the code of the layer that produces its input.

D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs (arXiv 2602.02546): down_proj's levels carry a
scale c_j of each input column; down's input is act(gate) up and up enters linearly, so row j of the *already quantised*
up_proj has its group scales multiplied by c_j (digits and zero points unchanged), and down stores no c. Likewise v_proj
takes those of o_proj where their shapes agree. Exact but for the rounding of the producer's scales as they are stored.

Scales further than `range` from their median would carry the producer's scales out of the range of float16, and an
MLP without a gate (no producer in the family file) cannot absorb any: there they stay stored, which is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from featherweight.events import Observer, silent
from featherweight.methods.quantize.base import Correction, Scope
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.codes import Code
from featherweight.storage.codes.column_scaled import ColumnScaled


@register("correction", "absorb")
class AbsorbColumnScales(Correction):
    """Fold stored column scales into the producing layer's code (see the module)."""

    scope: ClassVar[Scope] = "block"

    range: float = Field(1e3, gt=1, description="scales further than this factor from their median stay where they are")

    def correct_block(
        self, session: BlockAccess, codes: Mapping[str, Code], notify: Observer = silent, seed: int = 0
    ) -> dict[str, Code]:
        found = dict(codes)
        for name, code in codes.items():
            if not isinstance(code, ColumnScaled):
                continue
            layer = session.layers[name]
            factors = code.column_scales.float()
            reason = self._refusal(session, layer, found, factors)
            scaled = None if reason else found[str(layer.producer)].rows_scaled(factors)
            if scaled is None:
                notify({"event": "absorb", "layer": name, "stored": reason or "the producer's code cannot take them"})
                continue
            found |= {str(layer.producer): scaled, name: code.inner}
            bias = session.layers[str(layer.producer)].bias
            if bias is not None:
                session.set_tensor(bias, session.tensor(bias) * factors)
        return {name: code for name, code in found.items() if code is not codes[name]}

    def _refusal(
        self, session: BlockAccess, layer: LinearLayer, codes: Mapping[str, Code], factors: Tensor
    ) -> str | None:
        """Why the scales of a layer must stay, or None."""
        if layer.producer is None:
            return "no layer before enters its input linearly"
        readers = [other for other in session.layers.values() if other.producer == layer.producer]
        if layer.producer not in codes or len(readers) != 1:
            return "the producer is not compressed"
        if session.layers[layer.producer].shape[0] != layer.shape[1]:
            return "one channel of the producer serves several columns"
        median = float(factors.abs().median())
        if not median > 0 or float(factors.amin()) < median / self.range or float(factors.amax()) > median * self.range:
            return "the scales differ too much"
        return None
