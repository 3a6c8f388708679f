"""ggml's own encoder of blocks, `ggml_quantize_chunk`, from the library that llama-cpp-python brings.

For K- and i-types alone, which are searches of ggml's own. FEATHERWEIGHT_GGML names another `libggml-base`, such as
that of a llama.cpp built by hand.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import OutputError
from featherweight.interop.gguf_writing.block_types import BlockType, Bytes

VARIABLE = "FEATHERWEIGHT_GGML"
NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""Types for which llama.cpp's quantiser asks for an importance matrix."""


def library_path() -> Path | None:
    """Where the library is; None if it is not installed."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        return None
    folders = [Path(place) / "lib" for place in found.submodule_search_locations]
    return next((folder / name for folder in folders for name in NAMES if (folder / name).is_file()), None)


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    encode = library.ggml_quantize_chunk
    pointer = ctypes.POINTER(ctypes.c_float)
    encode.argtypes = [
        *(ctypes.c_int, pointer, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        pointer,
    ]
    encode.restype = ctypes.c_size_t
    for name in ("ggml_type_size", "ggml_blck_size"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_int]
        function.restype = ctypes.c_size_t if name == "ggml_type_size" else ctypes.c_int64
    return library


def check_library(kind: BlockType) -> None:
    """OutputError where the library is missing, or knows another block under the type's number."""
    path = library_path()
    if path is None:
        raise OutputError(
            f"{kind.name} is encoded by ggml's own function, which is not here: pip install 'featherweight[gguf]', or "
            f"let {VARIABLE} name a libggml-base"
        )
    try:
        library = _library(path)
        block = int(library.ggml_blck_size(kind.number)), int(library.ggml_type_size(kind.number))
    except (OSError, AttributeError) as error:
        raise OutputError(f"{path} cannot be used to encode {kind.name}: {error}") from None
    if block != (kind.weights, kind.nbytes):
        raise OutputError(
            f"{path} has blocks of {block[0]} weights in {block[1]} bytes for {kind.name}, expected {kind.weights} in "
            f"{kind.nbytes}: take another release"
        )


def encode_rows(kind: BlockType, values: NDArray[np.float32], importance: NDArray[np.float32] | None) -> Bytes:
    """Blocks of rows, as llama.cpp's quantiser makes them.

    values : float32 [n, in], finite, rows whole blocks
    importance : float32 [in], mean squares of the input, or None

    Returns uint8 [n, bytes of a row]. OutputError as of `check_library`, or for values that are not finite.
    """
    check_library(kind)
    path = library_path()
    assert path is not None
    rows, columns = values.shape
    source = np.ascontiguousarray(values, np.float32)
    if not kind.fits_columns(columns) or (importance is not None and importance.shape != (columns,)):
        raise ValueError(f"{columns} columns do not fit {kind.name}, or its importance matrix")
    if not np.isfinite(source).all():
        raise OutputError(f"values that are not finite cannot be encoded as {kind.name}")
    out = np.zeros((rows, columns // kind.weights * kind.nbytes), np.uint8)
    weights = np.ones(columns, np.float32) if importance is None and kind.name in NEED_IMPORTANCE else importance
    weights = None if weights is None else np.ascontiguousarray(weights, np.float32)
    pointer = ctypes.POINTER(ctypes.c_float)
    written = _library(path).ggml_quantize_chunk(
        kind.number,
        source.ctypes.data_as(pointer),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        columns,
        None if weights is None else weights.ctypes.data_as(pointer),
    )
    if written != out.nbytes:
        raise OutputError(f"ggml encoded {written} bytes of {kind.name}, expected {out.nbytes}")
    return out
