"""A model for a measurement: loaded, put on its device, its compressed layers decoded once where there is room."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import EvaluationError
from featherweight.model.layers.modules import CodedModule
from featherweight.system.devices import free_bytes

ModelLike = str | Path | tuple[Any, Any]
"""A folder, file or hub id, or a model and its tokenizer."""
KEPT_SHARE = 2
"""The part of a device's free memory that is one over this may be filled with decoded matrices."""


def open_model(
    source: ModelLike, dtype: str, device: torch.device, trust_remote_code: bool = False, needed: bool = True
) -> tuple[Any, Any]:
    """A model and its tokenizer, which is `needed` or may be None. One from a folder is put on `device`.

    dtype : "auto" is float32 on the CPU, and what config.json says elsewhere
    Raises EvaluationError where the device is too small, and what `featherweight.load` raises.
    """
    if isinstance(source, tuple):
        return source
    from featherweight.integrations.load import load

    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "auto"
    model, tokenizer = load(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if tokenizer is None and needed:
        raise EvaluationError(f"{source} has no tokenizer: copy the tokenizer files of the original beside the weights")
    if device.type != "cpu":
        try:
            model.to(device)
        except torch.OutOfMemoryError:
            raise EvaluationError(
                f"{source} does not fit into the memory of {device}: free some of it, or take --device cpu"
            ) from None
        keep_decoded(model, free_bytes(device) // KEPT_SHARE)
    return model, tokenizer


def keep_decoded(model: torch.nn.Module, room: int) -> int:
    """Let compressed layers keep their matrices from the first product on, as far as `room` bytes reach; bytes taken.

    Decoding is work of the CPU's, and a matrix that was decoded has to be moved to the device. Products of two factors
    stay as they are: their product whole is another sum.
    """
    taken = 0
    for module in model.modules():
        if isinstance(module, CodedModule) and not module.factored:
            size = module.compute_dtype.itemsize * math.prod(module.spec["shape"])
            if taken + size <= room:
                module.cache = True
                taken += size
    return taken


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; then every module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
