"""One linear layer's weight as a `WeightSource`: rows [out, in] however the checkpoint stores them."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from featherweight.errors import CheckpointError, NonFiniteError
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint

SAMPLES = 4  # places in a tensor
SAMPLE_BYTES = 256
FLOATING_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class LayerWeight:
    """Rows of a layer, zero-copy from the mapped file where the layout allows; transposed tensors are gathered.

    Rows of a convolution are its kernels, one behind the other.

    shape : (out_features, in_features)
    largest : max |w|, found by `scan`
    """

    def __init__(self, checkpoint: Checkpoint, layer: LinearLayer) -> None:
        self.checkpoint, self.layer = checkpoint, layer
        self.shape: tuple[int, int] = layer.shape
        self.dtype = checkpoint.entry(layer.tensor).torch_dtype
        self.largest = 0.0
        if self.dtype not in FLOATING_DTYPES:
            raise CheckpointError(
                f"tensor {layer.tensor} is stored as {self.dtype}, expected bfloat16, float16, float32 or float64: "
                "the model seems to be quantised already; start from its original weights"
            )

    def rows(self, first: int, last: int) -> Tensor:
        layer = self.layer
        if layer.kernel:
            return self.checkpoint.rows(layer.tensor, first, last).flatten(1)
        if not layer.transposed and not layer.fused_slice:
            return self.checkpoint.rows(layer.tensor, first, last)
        if layer.fused_slice:
            assert layer.expert is not None
            matrix = self.checkpoint.rows(layer.tensor, layer.expert, layer.expert + 1)[0]
        else:
            matrix = self.checkpoint.tensor(layer.tensor)
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
        """Find `largest`; NonFiniteError naming the stored tensor and the index in it of the first NaN or infinity."""
        for first in range(0, self.shape[0], window_rows):
            last = min(self.shape[0], first + window_rows)
            window = self.rows(first, last)
            low, high = _extremes(window)
            if not (math.isfinite(low) and math.isfinite(high)):
                place, value = _first_non_finite(window)
                raise _non_finite(self.layer.tensor, self._stored_index(first + place[0], place[1]), value)
            self.largest = max(self.largest, -low, high)
            self.release(first, last)

    def _stored_index(self, row: int, column: int) -> list[int]:
        index = [column, row] if self.layer.transposed else [row, column]
        if self.layer.kernel:
            place: list[int] = []
            for size in reversed(self.layer.kernel):
                column, inner = divmod(column, size)
                place.insert(0, inner)
            return [row, column, *place]
        return [self.layer.expert, *index] if self.layer.fused_slice and self.layer.expert is not None else index


def scan_tensor(checkpoint: Checkpoint, name: str, window_bytes: int = 16 << 20) -> None:
    """NonFiniteError if a tensor that is to be copied holds NaN or infinity."""
    entry = checkpoint.entry(name)
    if entry.torch_dtype not in FLOATING_DTYPES or entry.elements == 0:
        return
    if not entry.shape:
        _check(checkpoint.tensor(name).view(1), name, None)
        return
    row_bytes = entry.nbytes // entry.shape[0]
    step = max(1, window_bytes // max(1, row_bytes))
    for first in range(0, entry.shape[0], step):
        last = min(entry.shape[0], first + step)
        _check(checkpoint.rows(name, first, last), name, first)
        checkpoint.release(name, first, last)


def sample_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over a few hundred bytes of every tensor.

    Tells apart checkpoints with the same names and shapes, such as two states of one training, without reading them
    whole. A change of single weights can go unnoticed.
    """
    digest = hashlib.sha256()
    for file in checkpoint.files:
        try:
            with file.path.open("rb", buffering=0) as stream:
                for entry in file.entries.values():
                    for place in range(SAMPLES):
                        stream.seek(entry.start + place * max(0, entry.nbytes - SAMPLE_BYTES) // (SAMPLES - 1))
                        digest.update(stream.read(min(SAMPLE_BYTES, entry.nbytes)))
        except OSError as error:
            raise CheckpointError(f"cannot read {file.path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _check(window: Tensor, name: str, first: int | None) -> None:
    if all(math.isfinite(value) for value in _extremes(window)):
        return
    place, value = _first_non_finite(window)
    raise _non_finite(name, [] if first is None else [first + place[0], *place[1:]], value)


def _extremes(window: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(window)
    return float(low), float(high)


def _first_non_finite(window: Tensor) -> tuple[list[int], float]:
    place: list[int] = (~torch.isfinite(window)).nonzero()[0].tolist()
    return place, float(window[tuple(place)])


def _non_finite(name: str, index: list[int], value: float) -> NonFiniteError:
    return NonFiniteError(
        f"tensor {name} holds {value} at index {index}: the checkpoint is damaged or was saved after a diverged "
        "training step; repair that tensor and run the command again"
    )
