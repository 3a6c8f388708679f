"""Rotary positions (Su et al., arXiv:2104.09864) and the ways of stretching them over longer contexts.

What counts is what transformers computes from a config, down to the order of the float32 operations, so that logits
agree: `linear` (Chen et al., arXiv:2306.15595), `dynamic` (NTK-aware, with the length of the sequence), `llama3`
(Llama 3.1's bands of wavelengths), `yarn` (Peng et al., arXiv:2309.00071). Settings are `rope_parameters`
(transformers 5) or `rope_scaling` and `rope_theta` (transformers 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.model.decoder.architectures import UnsupportedModelError

DEFAULT_BASE = 10000.0
NEEDED = ("rope_theta", "low_freq_factor", "high_freq_factor")
NUMBERS = (
    *NEEDED,
    "factor",
    *("original_max_position_embeddings", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim"),
)
"""Settings that are numbers; anything else is left to transformers to make sense of."""


@dataclass(frozen=True)
class Dynamic:
    """Beyond `length` tokens the base is multiplied by (factor n / length - (factor - 1))^(d / (d - 2))."""

    base: float
    factor: float
    length: int


@dataclass(frozen=True, eq=False)
class Rope:
    """frequencies: float32 [head_dim / 2], radians a position; scale: of cosines and sines."""

    frequencies: Tensor
    scale: float = 1.0
    dynamic: Dynamic | None = None


def rope_of(config: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """The rotation a config.json asks for; `context` is its max_position_embeddings.

    Raises
    ------
    UnsupportedModelError
        a kind that the native decoder lacks.
    CheckpointError
        a setting is missing or makes no sense.
    """
    settings = _settings(config, context)
    kind = settings["rope_type"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedModelError(f"the native decoder has no rotary positions of the kind {str(kind)[:40]!r}")
    if settings.get("partial_rotary_factor", 1.0) not in (None, 1.0, 1):
        raise UnsupportedModelError("the native decoder rotates whole heads, not a part of each")
    try:
        rope = _KINDS[kind](settings, head_dim, context)
    except KeyError as error:
        raise CheckpointError(f"rotary positions of the kind {kind!r} need {error} in config.json") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"the settings of rotary positions in config.json make no sense ({error})") from None
    if not (torch.isfinite(rope.frequencies).all() and math.isfinite(rope.scale)):
        raise CheckpointError("the settings of rotary positions in config.json make no sense (they give no numbers)")
    return rope


def _settings(config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """One dictionary from both ways of writing them."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise CheckpointError("rope_scaling in config.json is not an object")
    if any(isinstance(value, dict) for value in found.values()):
        raise UnsupportedModelError("the native decoder rotates all layers alike, this model's layers differ")
    settings = dict(found)
    settings.setdefault("rope_theta", config.get("rope_theta", DEFAULT_BASE))
    settings.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    settings.setdefault("rope_type", settings.get("type", "default"))
    if settings["rope_type"] in ("llama3", "yarn"):
        original = config.get("original_max_position_embeddings")
        settings["original_max_position_embeddings"] = (
            original or settings.get("original_max_position_embeddings") or context
        )
    for name, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in NUMBERS and not number and not (value is None and name not in NEEDED):
            raise UnsupportedModelError(
                f"{name} of the rotary positions in config.json is {str(value)[:40]!r}, where a number is expected"
            )
    return settings


def _powers(base: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    return torch.pow(base, exponents)


def _default(settings: dict[str, Any], head_dim: int, context: int) -> Rope:
    return Rope(1.0 / _powers(float(settings["rope_theta"]), head_dim))


def _linear(settings: dict[str, Any], head_dim: int, context: int) -> Rope:
    return Rope(1.0 / _powers(float(settings["rope_theta"]), head_dim) / float(settings["factor"]))


def _dynamic(settings: dict[str, Any], head_dim: int, context: int) -> Rope:
    base, factor = float(settings["rope_theta"]), float(settings["factor"])
    return Rope(1.0 / _powers(base, head_dim), dynamic=Dynamic(base, factor, context))


def _llama3(settings: dict[str, Any], head_dim: int, context: int) -> Rope:
    frequencies = 1.0 / _powers(float(settings["rope_theta"]), head_dim)
    factor, original = float(settings["factor"]), settings["original_max_position_embeddings"]
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    wavelengths = 2 * math.pi / frequencies
    long, short = wavelengths > original / low, wavelengths < original / high
    slowed = torch.where(long, frequencies / factor, frequencies)
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * slowed / factor + smooth * slowed
    return Rope(torch.where(~short & ~long, between, slowed))


def _yarn(settings: dict[str, Any], head_dim: int, context: int) -> Rope:
    base, original = float(settings["rope_theta"]), settings["original_max_position_embeddings"]
    factor = float(settings["factor"]) if settings.get("factor") is not None else context / original
    powers = _powers(base, head_dim)

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns so many times over the original context."""
        return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return Rope(frequencies, _yarn_scale(settings, factor))


def _yarn_scale(settings: dict[str, Any], factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    return scale(over) / scale(under) if over and under else scale(1.0)


_KINDS: dict[str, Callable[[dict[str, Any], int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
