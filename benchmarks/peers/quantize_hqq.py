"""HQQ (data-free). Variants are `<bits>bit-g<group>`, groups along the input (axis 1, HQQ's default in transformers),
and `<bits>bit-g<group>-axis0`, groups across the output rows. Codes count as HQQ packs them, scales and zero points in
float16.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from dense import Clock, Compressed, Job, linear_names, run
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

VARIANT = re.compile(r"(\d)bit-g(\d+)(-axis0)?")


def quantize(job: Job, variant: str) -> Compressed:
    found = VARIANT.fullmatch(variant)
    if found is None:
        raise ValueError(f"{variant} is not <bits>bit-g<group> or <bits>bit-g<group>-axis0")
    torch.set_num_threads(job.threads)
    config = BaseQuantizeConfig(nbits=int(found[1]), group_size=int(found[2]), axis=0 if found[3] else 1)
    weights = job.weights()
    decoded: dict[str, np.ndarray] = {}
    total, seconds = 0, 0.0
    for name in linear_names(weights):
        out_features, in_features = weights[name].shape
        layer = torch.nn.Linear(in_features, out_features, bias=False)
        layer.weight.data = torch.from_numpy(weights[name].copy())
        with Clock() as clock:
            packed = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
        seconds += clock.seconds
        stored = (packed.W_q, packed.meta["scale"], packed.meta["zero"])
        total += sum(tensor.numel() * tensor.element_size() for tensor in stored)
        decoded[name] = packed.dequantize().float().numpy()
    return Compressed(decoded, total, seconds)


if __name__ == "__main__":
    run(quantize, ("hqq", "torch"))
