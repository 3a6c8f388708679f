"""Stretched rotary positions of models in GGUF as transformers writes them.

A file names a way of stretching (linear, YaRN) with its numbers, or has what every frequency is divided by as a tensor:
Llama 3's bands, whose four settings are recovered from it, and the two lists of long contexts (LongRoPE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.file import GGUFModel

Doubles = npt.NDArray[np.float64]
USUAL_BANDS = (1.0, 4.0, 8192)
"""Llama 3's low_freq_factor, high_freq_factor and original context."""
CLOSE = 1e-5
"""Relative: the divisors are float32 numbers that a converter has computed."""


class Metadata(Protocol):
    """What is asked of a model's metadata, names without the architecture."""

    path: Any

    def whole(self, key: str, default: int | None = None, low: int = 1) -> int: ...
    def real(self, key: str, default: float | None = None) -> float: ...
    def has(self, key: str) -> bool: ...


def factors_of(model: GGUFModel, name: str, count: int) -> Doubles | None:
    """What frequencies are divided by, from a tensor; None where the model has none."""
    stored = model.tensors.get(name)
    if stored is None:
        return None
    if stored.info.shape != (count,) or stored.info.type.name != "F32":
        raise CheckpointError(
            f"{model.path} has {name} as {stored.info.type.name} {list(stored.info.shape)}, and its heads ask for F32 "
            f"[{count}]"
        )
    found: Doubles = np.ascontiguousarray(stored.rows(0, 1)).view(np.float32)[0].astype(np.float64)
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise CheckpointError(f"{model.path} has numbers in {name} that no frequency can be divided by")
    return found


def rope_scaling(
    settings: Metadata, config: Mapping[str, Any], factors: Doubles | tuple[Doubles, Doubles] | None, kind: str
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, None where nothing is stretched.

    factors : of `rope_freqs`, or those for long and for short contexts
    kind : what the metadata says, "none", "linear", "yarn", "longrope"
    """
    if isinstance(factors, tuple):
        return _long_and_short(settings, config, *factors)
    if kind == "none" and settings.has("rope.scale_linear"):  # as files of 2023 have it
        kind = "linear"
    if kind == "linear":
        older = settings.real("rope.scale_linear", 1.0)
        factor = settings.real("rope.scaling.factor", older)
        stretched = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        stretched = _yarn(settings, config)
    elif kind in ("none", ""):
        stretched = None
    else:
        raise CheckpointError(f"{settings.path} stretches rotary positions by {shown(kind)}, which is not read")
    if factors is None or bool((factors == 1).all()):
        return stretched
    if stretched is not None:
        raise CheckpointError(f"{settings.path} stretches rotary positions in two ways at once, which is not read")
    return _bands(factors, config) or {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def _yarn(settings: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": settings.real("rope.scaling.factor"),
        "original_max_position_embeddings": settings.whole(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }
    for name in ("beta_fast", "beta_slow"):
        if settings.has(f"rope.scaling.yarn_{name}"):
            found[name] = settings.real(f"rope.scaling.yarn_{name}")
    if settings.has("rope.scaling.attn_factor"):  # on top of what YaRN has by itself
        usual = 0.1 * math.log(found["factor"]) + 1 if found["factor"] > 1 else 1.0
        found["attention_factor"] = settings.real("rope.scaling.attn_factor") * usual
    return found


def _long_and_short(settings: Metadata, config: Mapping[str, Any], long: Doubles, short: Doubles) -> dict[str, Any]:
    original = config["original_max_position_embeddings"]
    found: dict[str, Any] = {"type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
    ratio = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    scale = settings.real("rope.scaling.attn_factor", usual)
    if not math.isclose(scale, usual, rel_tol=1e-4):
        found["attention_factor"] = scale
    return found


def _bands(factors: Doubles, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3's settings whose divisors these are, None where there are none such.

    Between the bands the divisor is 1 / ((1 - s) / factor + s), and s is linear in the frequency: two unknowns, as
    settings in the same proportions give the same divisors.
    """
    frequencies = config["rope_theta"] ** -(np.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    factor = float(factors.max())
    candidates = [USUAL_BANDS]
    between = (factors > 1 + CLOSE) & (factors < factor * (1 - CLOSE))
    if int(between.sum()) >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, below = np.polyfit(frequencies[between] / (2 * math.pi), smooth, 1)
        if below < 0 < slope:  # s = original / (high - low) / wavelength - low / (high - low), low = 1
            candidates.append((1.0, 1 - 1 / float(below), round(-float(slope / below))))
    for low, high, original in candidates:
        wavelengths = 2 * math.pi / frequencies
        smooth = ((original / wavelengths - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=CLOSE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None
