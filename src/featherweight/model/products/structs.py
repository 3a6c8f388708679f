"""The structs and functions of native/product.h in ctypes, with the tensors they point to kept alive."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.native import library
from featherweight.system.threads import chosen_threads

KINDS = {"trit-planes": 0, "uniform": 1, "codebook": 2, "dense": 3, "sherry": 4}
LAYOUTS = {"auto": -1, "fields": 0, "trits": 1, "tables": 2, "plain": 3, "quartets": 4}
LAYOUT_NAMES = {number: name for name, number in LAYOUTS.items()}
STEPS = {"permute": 1, "scale": 2, "hadamard": 3, "round": 4}
TERMS = {"operand": 0, "low-rank": 1, "sparse": 2}
PRECISIONS = {"int8": 0, "float": 1}
LOG8_SCALES = 4

ALIGNMENT = 64
MAPPED = 1 << 21  # bytes from which an operand gets a mapping of its own

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class CodeStruct(ctypes.Structure):
    """fw_code."""

    _fields_ = [
        *[(name, _i32) for name in ("kind", "planes", "packing", "bits", "tied")],
        ("weights", _i32 * 3),
        *[(name, _i32) for name in ("scale_dtype", "scale_exponent", "lane_stride")],
        *[(name, _i64) for name in ("rows", "cols", "group_size", "scale_rows")],
        ("codes", _pointer),
        ("plane_bytes", _i64),
        *[(name, _pointer) for name in ("scales", "zero_points", "signs")],
        *[(name, _i64) for name in ("segment", "codes_bytes", "scales_bytes", "zero_bytes", "sign_bytes")],
        ("offsets", _pointer),
        ("offset_bytes", _i64),
    ]


class Header(ctypes.Structure):
    """fw_operand: what an operand begins with."""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        *[(name, _i32) for name in ("layout", "planes", "bits", "tied")],
        ("weights", _i32 * 4),
        *[(name, _i32) for name in ("scale_dtype", "scale_exponent", "offset", "has_zeros")],
        *[(name, _i64) for name in ("rows", "cols", "tiles", "segment", "segments", "steps")],
        *[(name, _i64) for name in ("segments_per_group", "groups")],
        *[(name, _i64) for name in ("codes_at", "codes_per_tile", "scales_at", "scales_per_tile")],
        *[(name, _i64) for name in ("zeros_at", "zeros_per_tile", "bytes", "weight_bytes")],
        *[(name, _i32) for name in ("lane_stride", "last_steps", "has_offsets", "reserved")],
    ]


class StepStruct(ctypes.Structure):
    """fw_step."""

    _fields_ = [
        *[(name, _i32) for name in ("kind", "block", "bits", "reserved")],
        ("count", _i64),
        ("order", _pointer),
        ("values", _pointer),
    ]


class TermStruct(ctypes.Structure):
    """fw_term."""

    _fields_ = [
        *[(name, _i32) for name in ("kind", "steps")],
        *[(name, _pointer) for name in ("step", "operand", "right")],
        *[(name, _i64) for name in ("operand_bytes", "right_bytes")],
        *[(name, _pointer) for name in ("row_pointers", "columns", "values")],
        *[(name, _i64) for name in ("pointers", "entries")],
    ]


class LinearStruct(ctypes.Structure):
    """fw_linear."""

    _fields_ = [
        *[(name, _i64) for name in ("rows", "cols", "terms")],
        ("term", _pointer),
        ("bias", _pointer),
    ]


_rows = [_pointer, _i64, _i64, _i64]  # memory, its elements, tokens, stride
_out = [_pointer, _i64, _i64]

SIGNATURES = {
    "fw_operand_bytes": [_pointer, _i32],
    "fw_operand_pack": [_pointer, _i32, _pointer, _i64, _i32, _pointer],
    "fw_operand_check": [_pointer, _i64],
    "fw_product": [_pointer, _i64, *_rows, *_out, _i32, _i32, _i32],
    "fw_product_int8": [_pointer, _i64, _pointer, _i64, _pointer, _i64, _i64, *_out, _i32],
    "fw_operand_rows": [_pointer, _i64, _i64, _i64, _pointer, _i64],
    "fw_linear_check": [_pointer],
    "fw_linear_apply": [_pointer, *_rows, *_out, _i32, _i32],
    "fw_apply_step": [_pointer, _pointer, _i64, _i64, _pointer, _i32],
    "fw_quantize": [_pointer, _i64, _i64, _i64, _pointer, _pointer, _pointer, _pointer, _i32],
}


class Native:
    """The functions of product.h; a status other than FW_OK becomes an exception."""

    def __init__(self, path: str) -> None:
        c = ctypes.CDLL(path)
        for name, arguments in SIGNATURES.items():
            function = getattr(c, name)
            function.argtypes = arguments
            function.restype = _i64 if name == "fw_operand_bytes" else _i32
        self.operand_bytes: Callable[[int, int], int] = c.fw_operand_bytes
        self.operand_pack: Callable[..., int] = c.fw_operand_pack
        self.operand_check: Callable[[int, int], int] = c.fw_operand_check
        self.operand_rows: Callable[..., int] = c.fw_operand_rows
        self.product: Callable[..., int] = c.fw_product
        self.product_int8: Callable[..., int] = c.fw_product_int8
        self.linear_check: Callable[[int], int] = c.fw_linear_check
        self.linear_apply: Callable[..., int] = c.fw_linear_apply
        self.apply_step: Callable[..., int] = c.fw_apply_step
        self.quantize: Callable[..., int] = c.fw_quantize


def native() -> Native | None:
    """The products of the native library; None without it."""
    found = library.get()
    return None if found is None else _native(str(found.path))


@functools.lru_cache(maxsize=4)
def _native(path: str) -> Native | None:
    try:
        return Native(path)
    except AttributeError:  # a library built without them
        return None


def needed() -> Native:
    """`native()`, or a FeatherError."""
    found = native()
    if found is None:
        raise FeatherError(
            f"packed operands need featherweight's native library: {library.why_not()}; or leave the layers to PyTorch"
        )
    return found


def check(status: int, what: str) -> None:
    """Turn a status of the native library into an exception."""
    if status == library.OK:
        return
    if status == library.NO_MEMORY:
        raise MemoryError(f"the native library could not get memory for {what}")
    raise ValueError(f"the native library refused {what}")


def threads_of(threads: int | None = None) -> int:
    """Threads of an operator: those that somebody has chosen (`system.threads`), else PyTorch's number."""
    chosen = chosen_threads(threads)
    return torch.get_num_threads() if chosen is None else chosen


def aligned(count: int) -> Tensor:
    """Zeroed memory uint8 [count] that begins at a multiple of 64 bytes; large ones are given back when they are freed.

    Huge pages are not asked for: where memory is in pieces, finding them can take a fresh process seconds a gigabyte,
    and products, which read along memory, are not measurably faster with them.
    """
    if count >= MAPPED:
        # Private: a page of shared memory, the default, costs about half as much again. Windows knows no such flags.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        return torch.frombuffer(mmap.mmap(-1, count, **private), dtype=torch.uint8)
    # torch.zeros would wake PyTorch's threads, which then wait in a loop and take processors from those that pack.
    slack = torch.frombuffer(bytearray(count + ALIGNMENT), dtype=torch.uint8)
    first = -slack.data_ptr() % ALIGNMENT
    return slack[first : first + count]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def size_of(tensor: Tensor | None) -> int:
    """Bytes of a contiguous tensor."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


@dataclass(frozen=True, eq=False)
class Operand:
    """A packed matrix: `memory` uint8 [bytes], 64-byte aligned, begins with a `Header`."""

    memory: Tensor
    kind: str

    @property
    def header(self) -> Header:
        return header_of(self.memory)

    @property
    def layout(self) -> str:
        return LAYOUT_NAMES.get(int(self.header.layout), "unknown")

    @property
    def weight_bytes(self) -> int:
        """Bytes that one matrix-vector product reads."""
        return int(self.header.weight_bytes)


def header_of(memory: Tensor) -> Header:
    """The header of an operand uint8 [bytes] on the CPU. ValueError if it is too short for one."""
    if memory.dtype != torch.uint8 or memory.dim() != 1 or memory.numel() < ctypes.sizeof(Header):
        raise ValueError(f"an operand is uint8 [bytes], not {memory.dtype} {list(memory.shape)}")
    if not memory.is_contiguous():
        raise ValueError("an operand is contiguous memory, this one has strides")
    return Header.from_buffer_copy(ctypes.string_at(memory.data_ptr(), ctypes.sizeof(Header)))


def check_operand(memory: Tensor) -> None:
    """ValueError unless `memory` is a complete, consistent operand of the loaded library."""
    header_of(memory)
    if needed().operand_check(memory.data_ptr(), memory.numel()) != library.OK:
        raise ValueError(f"these {memory.numel()} bytes are no operand of this library, or a damaged one")
