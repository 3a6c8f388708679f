"""One linear layer's weight as a `WeightSource`: rows [out, in] however the checkpoint stores them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featherweight.checkpoint.anatomy import LinearLayer
from featherweight.checkpoint.checkpoint import Checkpoint
from featherweight.errors import CheckpointError, NonFiniteError

FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class LayerWeight:
    """Rows of a layer, zero-copy from the mapped file where the layout allows; transposed tensors are gathered.

    shape : (out_features, in_features)
    largest : max |w|, found by `scan`
    """

    def __init__(self, checkpoint: Checkpoint, layer: LinearLayer) -> None:
        self.checkpoint, self.layer = checkpoint, layer
        self.shape: tuple[int, int] = layer.shape
        self.dtype = checkpoint.entry(layer.tensor).torch_dtype
        self.largest = 0.0
        if self.dtype not in FLOATING:
            raise CheckpointError(
                f"tensor {layer.tensor} is stored as {self.dtype}, expected bfloat16, float16, float32 or float64: "
                "the model seems to be quantised already; start from its original weights"
            )

    def rows(self, first: int, last: int) -> Tensor:
        layer = self.layer
        if not layer.transposed and not layer.fused_slice:
            return self.checkpoint.rows(layer.tensor, first, last)
        matrix = self.checkpoint.tensor(layer.tensor)
        if layer.fused_slice:
            assert layer.expert is not None
            matrix = matrix[layer.expert]
        return (matrix[:, first:last].t() if layer.transposed else matrix[first:last]).contiguous()

    def release(self, first: int, last: int) -> None:
        """Plain layers give back these rows; others share pages between rows and give back all with the last row."""
        layer = self.layer
        if not layer.transposed and not layer.fused_slice:
            self.checkpoint.release(layer.tensor, first, last)
        elif last == self.shape[0]:
            slices = (layer.expert, layer.expert + 1) if layer.fused_slice and layer.expert is not None else ()
            self.checkpoint.release(layer.tensor, *slices)

    def scan(self, window_rows: int) -> None:
        """Find `largest`; NonFiniteError naming the tensor and the index of the first NaN or infinity."""
        for first in range(0, self.shape[0], window_rows):
            last = min(self.shape[0], first + window_rows)
            window = self.rows(first, last)
            self.largest = max(self.largest, _largest(window, self.layer.name, first))
            self.release(first, last)


def scan_tensor(checkpoint: Checkpoint, name: str, window_bytes: int = 16 << 20) -> None:
    """NonFiniteError if a tensor that is to be copied holds NaN or infinity."""
    entry = checkpoint.entry(name)
    if entry.torch_dtype not in FLOATING or entry.elements == 0:
        return
    if len(entry.shape) < 2:
        _largest(checkpoint.tensor(name).view(1, -1), name, 0)
        return
    row_bytes = entry.nbytes // entry.shape[0]
    step = max(1, window_bytes // max(1, row_bytes))
    for first in range(0, entry.shape[0], step):
        last = min(entry.shape[0], first + step)
        _largest(checkpoint.rows(name, first, last), name, first)
        checkpoint.release(name, first, last)


def _largest(window: Tensor, name: str, first: int) -> float:
    low, high = (float(x) for x in torch.aminmax(window))
    if math.isfinite(low) and math.isfinite(high):
        return max(-low, high)
    place = (~torch.isfinite(window)).nonzero()[0].tolist()
    value = float(window[tuple(place)])
    place[0] += first
    raise NonFiniteError(
        f"tensor {name} holds {value} at index {place}: the checkpoint is damaged or was saved after a diverged "
        "training step; repair that tensor and run the command again"
    )
