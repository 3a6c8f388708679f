"""What `generate` of transformers is told of sampling."""

from __future__ import annotations

from typing import Any

from featherweight.model.decoder.sampling import Sampling

COLDEST = 1e-6
"""Temperatures down to here divide logits within float32; below, only the likeliest token is left anyway."""


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """Keywords of `generate` for one answer; those that do not apply are set, too, over the folder's."""
    chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    if sampling.temperature > COLDEST:
        chosen = {
            "do_sample": True,
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k,
            "top_p": float(sampling.top_p),
            "min_p": float(sampling.min_p) or None,
        }
    return chosen | {"repetition_penalty": float(sampling.repetition_penalty), "num_return_sequences": 1}
