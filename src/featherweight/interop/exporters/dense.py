"""A plain folder: every weight decoded, as any program reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from featherweight.interop.exports import Exporter, Told, Verdict
from featherweight.interop.folder_writing import (
    NO_BIAS,
    STACKED,
    Rounding,
    given_bias,
    places_of,
    plain_part,
    with_error,
    write_config,
    write_folder,
)
from featherweight.interop.quantised_export import short_name
from featherweight.interop.stored import StoredModel, StoredTensor
from featherweight.registry import register

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@register("exporter", "dense")
class DenseExporter(Exporter):
    """Exact in float32, which codes decode to; in 16 bits each weight is rounded, and the error stated."""

    title = "a plain folder"
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="type of all values")

    def verdicts(self, model: StoredModel) -> tuple[Verdict, ...]:
        biased = given_bias(model)
        return tuple(self._verdict(tensor, name in biased) for name, tensor in model.tensors.items())

    def write(self, model: StoredModel, out: Path, told: Told) -> Sequence[Verdict]:
        transposed = places_of(model).transposed
        roundings = {name: Rounding() for name in model.tensors}
        parts = []
        for name, tensor in model.tensors.items():
            turned = tensor.spec is not None and name in transposed
            part = plain_part(tensor, self._dtype(tensor), roundings[name], turned)
            parts.append((tensor.elements * tensor.dtype.itemsize, [part]))
        write_folder(model, out, parts, told)
        write_config(model, out, {"dtype" if "dtype" in model.config else "torch_dtype": self.dtype})
        return [with_error(verdict, roundings[verdict.tensor]) for verdict in self.verdicts(model)]

    def _dtype(self, tensor: StoredTensor) -> torch.dtype:
        return TYPES[self.dtype] if tensor.spec is not None or tensor.dtype.is_floating_point else tensor.dtype

    def _verdict(self, tensor: StoredTensor, biased: bool) -> Verdict:
        dtype = self._dtype(tensor)
        name, bits = short_name(dtype), 8 * dtype.itemsize
        if biased or "[" in tensor.module:
            return Verdict(tensor.name, "nothing", "impossible", 0.0, NO_BIAS if biased else STACKED)
        if dtype in (tensor.dtype, torch.float32) and tensor.dtype != torch.float64:
            return Verdict(tensor.name, name, "exact", bits)
        return Verdict(tensor.name, name, "rounded", bits, f"decoded values are {short_name(tensor.dtype)}")
