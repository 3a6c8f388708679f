"""Bytes of a tensor, some rows at a time, with what the encoding changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import OutputError
from featherweight.interop.gguf_writing.block_types import TYPES, BlockType, Bytes, decode_blocks, pack_blocks
from featherweight.interop.gguf_writing.choice import PLAIN, Choice
from featherweight.interop.gguf_writing.ggml_library import encode_rows
from featherweight.interop.gguf_writing.integers import Form, window_rows
from featherweight.interop.stored import StoredTensor
from featherweight.storage.checkpoint.format import module_layout
from featherweight.system.threads import thread_count

COPIED_BYTES = 16 << 20
OWN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "BF16")
"""Types to which the `gguf` package rounds values."""


@dataclass
class Loss:
    """Squares, summed: of what the encoding changes, and of the values."""

    changed: float = 0.0
    all: float = 0.0

    def add(self, written: NDArray[np.float32], values: Tensor) -> None:
        difference = torch.from_numpy(written) - values
        self.changed += float(difference.square_().sum(dtype=torch.float64))
        self.all += float(values.square().sum(dtype=torch.float64))

    @property
    def error(self) -> float:
        """|W' - W| / |W|."""
        return (self.changed / self.all) ** 0.5 if self.all else 0.0


def encoded_rows(
    tensor: StoredTensor, choice: Choice, loss: Loss, importance: NDArray[np.float32] | None = None
) -> Iterator[Bytes]:
    """Rows uint8 [n, bytes of a row] of a matrix, in the order of the model."""
    if choice.form is not None:
        yield from _taken_over(tensor, choice, choice.form, loss)
        release(tensor)
        return
    kind = choice.type
    if tensor.spec is None and kind.name == PLAIN.get(tensor.dtype):
        yield from _copied(tensor)
        return
    for first, _, values in tensor.windows():
        if kind.name in ("F16", "Q8_0", "Q4_0") and not bool(values.isfinite().all()):
            raise OutputError(f"{tensor.name} has values that are not finite, near row {first}")
        made = _encode(kind, values, tensor, importance)
        if choice.fate != "exact":
            loss.add(_decoded(kind, made), values)
        yield made
    release(tensor)


def release(tensor: StoredTensor) -> None:
    """Give back the pages behind a code that is done with."""
    if tensor.spec is not None:
        for name in module_layout(tensor.module, tensor.spec):
            tensor.checkpoint.release(f"{tensor.module}.{name}")


def _copied(tensor: StoredTensor) -> Iterator[Bytes]:
    """Rows as they are stored; pages behind them are given back."""
    rows, columns = tensor.shape
    step = max(1, COPIED_BYTES // max(1, columns * tensor.dtype.itemsize))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        yield tensor.checkpoint.rows(tensor.name, first, last).contiguous().view(torch.uint8).numpy()
        tensor.checkpoint.release(tensor.name, first, last)


def _taken_over(tensor: StoredTensor, choice: Choice, form: Form, loss: Loss) -> Iterator[Bytes]:
    """By as many threads as there are for it, in the order of rows."""
    rows, columns = tensor.shape
    sign = -1.0 if choice.negated else 1.0
    packer = _Packer(choice, form, columns, (form.scales * sign).half())
    step = window_rows(columns)
    windows = [(first, min(rows, first + step)) for first in range(0, rows, step)]
    for (first, last), made in zip(windows, _in_order(packer.window, windows), strict=True):
        if choice.fate != "exact":
            values = _values(form, first, last, columns)
            blocks = made.reshape(-1, choice.type.nbytes)
            loss.add(decode_blocks(choice.type, blocks).reshape(values.shape), values)
        yield made


def _in_order(make: Callable[[int, int], Bytes], windows: list[tuple[int, int]]) -> Iterator[Bytes]:
    """What `make` gives for each window; threads are ahead by as many windows as there are threads."""
    threads = thread_count()
    if threads < 2 or len(windows) < 2:
        yield from (make(*window) for window in windows)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Bytes]] = deque()
        for window in windows:
            waiting.append(pool.submit(make, *window))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class _Packer:
    """Blocks of windows of rows; scales : fp16 [out, groups]"""

    choice: Choice
    form: Form
    columns: int
    scales: Tensor

    def window(self, first: int, last: int) -> Bytes:
        """Bytes of rows [first, last)."""
        kind, form = self.choice.type, self.form
        integers = form.rows(first, last).numpy()
        blocks = (-integers if self.choice.negated else integers).reshape(-1, kind.weights)
        if kind.name == "Q2_K":
            own = self._spread(form.scales[first:last].float(), 16).reshape(-1, 16).numpy()
        else:
            own = self._spread(self.scales[first:last], kind.weights).reshape(-1).numpy()
        moved = own
        if form.offsets is not None:
            moved = self._spread(form.offsets[first:last].half(), kind.weights).reshape(-1).numpy()
        return pack_blocks(kind, blocks, own, moved).reshape(last - first, -1)

    def _spread(self, values: Tensor, size: int) -> Tensor:
        """A value a group [n, groups] to one for every `size` columns."""
        place = torch.arange(0, self.columns, size) // self.form.group_size
        return values.index_select(1, place)


def _values(form: Form, first: int, last: int, columns: int) -> Tensor:
    spread = torch.arange(columns) // form.group_size
    values = form.rows(first, last).float() * form.scales[first:last].float().index_select(1, spread)
    return values if form.offsets is None else values + form.offsets[first:last].index_select(1, spread)


def _encode(kind: BlockType, values: Tensor, tensor: StoredTensor, importance: NDArray[np.float32] | None) -> Bytes:
    """A window of values as a type; its rows are whole blocks."""
    rows = len(values)
    if kind.name == "F32":
        return values.contiguous().numpy().view(np.uint8).reshape(rows, -1)
    if kind.name in ("F16", "BF16"):
        halves = values.to(torch.float16 if kind.name == "F16" else torch.bfloat16)
        if not bool(halves.isfinite().all()) and bool(values.isfinite().all()):
            raise OutputError(f"{tensor.name} has values beyond those of {kind.name}: choose bf16 or f32 (other, type)")
        return halves.contiguous().view(torch.uint8).numpy().reshape(rows, -1)
    if kind.name == "Q8_0":
        return _eight_bits(values, tensor)
    if kind.name not in OWN or importance is not None:
        return encode_rows(kind, values.numpy(), importance)
    import gguf

    made: Bytes = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType(kind.number))
    return made.reshape(rows, -1)


def _eight_bits(values: Tensor, tensor: StoredTensor) -> Bytes:
    """Q8_0 of values: a step is a 127th of the largest of 32, as ggml has it; weights of columns change nothing."""
    blocks = values.reshape(-1, 32)
    steps = blocks.abs().amax(dim=1, keepdim=True) / 127
    halves = steps.half()
    if not bool(halves.isfinite().all()):
        raise OutputError(f"{tensor.name} has values beyond those of Q8_0: choose bf16 or f32 (other, type)")
    integers = (blocks * torch.where(steps > 0, 1 / steps, 0.0)).round_().to(torch.int8)
    made = pack_blocks(TYPES["Q8_0"], integers.numpy(), halves.view(-1).numpy(), halves.view(-1).numpy())
    return made.reshape(len(values), -1)


def _decoded(kind: BlockType, made: Bytes) -> NDArray[np.float32]:
    if kind.name == "BF16":
        return (made.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    size = kind.nbytes if kind.name != "F16" else made.shape[1]
    return decode_blocks(kind, made.reshape(-1, size)).reshape(len(made), -1)
