"""The structs and functions of native/decoder.h in ctypes."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.sampling import Sampling
from featherweight.model.products import ready
from featherweight.native import library

CACHES = {"float16": 2, "int8": 5}
PRECISIONS = {"int8": 0, "float": 1}

_i32, _i64, _f64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class LayerStruct(ctypes.Structure):
    """fw_layer."""

    _fields_ = [
        *[(name, _pointer) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")],
        *[(name, _pointer) for name in ("query", "key", "value", "output", "gate", "up", "down")],
        ("window", _i64),
    ]


class SettingsStruct(ctypes.Structure):
    """fw_decoder_settings."""

    _fields_ = [
        *[(name, _i64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary")],
        *[(name, _i64) for name in ("context", "sequences", "chunk")],
        *[(name, _pointer) for name in ("layer", "embedding", "norm", "head", "frequencies")],
        *[(name, _f64) for name in ("rope_scale", "dynamic_base", "dynamic_factor")],
        ("dynamic_length", _i64),
        ("epsilon", _f64),
        *[(name, _i32) for name in ("cache", "precision", "threads", "reserved")],
    ]


class SamplingStruct(ctypes.Structure):
    """fw_sampling."""

    _fields_ = [
        *[(name, _f64) for name in ("temperature", "top_p", "min_p", "repetition_penalty")],
        ("top_k", _i64),
        ("seed", ctypes.c_uint64),
    ]


class StatsStruct(ctypes.Structure):
    """fw_decoder_stats."""

    _fields_ = [
        *[(name, _i64) for name in ("prompt_tokens", "reused_tokens", "new_tokens", "passes")],
        *[(name, _f64) for name in ("prompt_seconds", "decode_seconds", "linear_seconds", "attention_seconds")],
        ("cache_bytes", _i64),
    ]


OnTokens = ctypes.CFUNCTYPE(_i32, ctypes.POINTER(_i32), _pointer)


class GenerationStruct(ctypes.Structure):
    """fw_generation."""

    _fields_ = [
        ("count", _i64),
        *[(name, _pointer) for name in ("prompts", "lengths", "sampling", "stops")],
        *[(name, _i64) for name in ("stop_count", "most")],
        *[(name, _pointer) for name in ("made", "made_lengths")],
        ("on_tokens", OnTokens),
        ("context", _pointer),
    ]


@dataclass(frozen=True)
class Stats:
    """Counts and wall times since the last reset.

    prompt_tokens were computed, reused_tokens found in the cache; linear_seconds (matrix products) and
    attention_seconds are parts of prompt_seconds + decode_seconds; cache_bytes are held for keys and values.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    passes: int
    prompt_seconds: float
    decode_seconds: float
    linear_seconds: float
    attention_seconds: float
    cache_bytes: int


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "fw_decoder_new": (_i32, [_pointer, _pointer]),
    "fw_decoder_free": (None, [_pointer]),
    "fw_decoder_length": (_i64, [_pointer, _i64]),
    "fw_decoder_truncate": (_i32, [_pointer, _i64, _i64]),
    "fw_decoder_keep_prefix": (_i64, [_pointer, _i64, _pointer, _i64]),
    "fw_decoder_feed": (_i32, [_pointer, _i64, _pointer, _i64, _pointer, _i32]),
    "fw_decoder_step": (_i32, [_pointer, _pointer, _pointer, _i64, _pointer]),
    "fw_decoder_generate": (_i32, [_pointer, _pointer]),
    "fw_decoder_stop": (None, [_pointer, _i32]),
    "fw_decoder_get_stats": (None, [_pointer, _pointer, _i32]),
    "fw_sample": (_i32, [_pointer, _i64, _pointer, _i64, _pointer, ctypes.c_uint64]),
}


def functions() -> Any:
    """The decoder's functions. UnsupportedModelError where the native library is missing, lacks them, or computes wrong
    products on this processor with every instruction set."""
    found = library.get()
    loaded = None if found is None else _functions(str(found.path))
    if loaded is None:
        raise UnsupportedModelError(f"the native decoder needs featherweight's native library, but {library.why_not()}")
    if not ready():
        raise UnsupportedModelError(
            "the native decoder is not used: the products of featherweight's native library are wrong on this processor"
        )
    return loaded


@functools.lru_cache(maxsize=4)
def _functions(path: str) -> Any:
    loaded = ctypes.CDLL(path)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
    return loaded


def sampling_struct(sampling: Sampling) -> SamplingStruct:
    return SamplingStruct(
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.top_k,
        (sampling.seed or 0) % 2**64,
    )
