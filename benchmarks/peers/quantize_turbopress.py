"""turbopress: rotation, trellis-coded quantisation and error feedback by blocks of columns, with the given tokens.

Variants are `<bits>bit-s<states of the trellis>`. Its own command reads texts from the network and runs the whole model
for every block; here its functions are given the calibration windows, and a block runs on what the compressed blocks
before it put out, which is the same. The artifact counts as it writes it: packed codes, and all else in float16.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from typing import Any

import numpy as np
import torch
from dense import Clock, Compressed, Job, linear_names, run
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from turbopress import pipeline

VARIANT = re.compile(r"(\d)bit-s(\d+)")
BATCH = 8  # windows
DTYPE = torch.bfloat16  # of the network's passes, for its own float16, which few CPUs multiply themselves


class Stop(Exception):
    """The first block has been reached."""


def block_inputs(model: Any, batches: list[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """(states, keyword arguments) that the first block is called with, by batch."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        found.append((inputs[0], keywords))
        raise Stop

    hook = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in batches:
            with contextlib.suppress(Stop):
                model.model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return found


def quantize(job: Job, variant: str) -> Compressed:
    found = VARIANT.fullmatch(variant)
    if found is None:
        raise ValueError(f"{variant} is not <bits>bit-s<states>")
    bits, states = int(found[1]), int(found[2])
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPE, local_files_only=True).eval()
    batches = list(load_file(job.calibration)["input_ids"].split(BATCH))
    with Clock() as clock, torch.inference_mode():
        payloads = compress_blocks(model, batches, bits, states)
    decoded = {name: decode(payload) for name, payload in payloads.items()}
    if sorted(decoded) != linear_names(job.weights()):
        raise ValueError("turbopress compressed other layers than the linear ones of the blocks")
    stored = [value for p in payloads.values() for value in p.values() if isinstance(value, Tensor)]
    artifact = job.out / f"{variant}.pt"
    torch.save({"quantized": payloads, "extra_state": pipeline.extra_state(model, set(payloads))}, artifact)
    file_bytes = artifact.stat().st_size
    artifact.unlink()
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return Compressed(decoded, total, clock.seconds, file_bytes=file_bytes)


def compress_blocks(model: Any, batches: list[Tensor], bits: int, states: int) -> dict[str, dict[str, Any]]:
    """What turbopress stores, by tensor name; the settings are those of its pipeline with error feedback."""
    layers, path = pipeline.decoder_layers(model)
    statistics = pipeline.collect_channel_stats(model.model, layers, batches, "cpu")
    inputs = block_inputs(model, batches)
    payloads: dict[str, dict[str, Any]] = {}
    for number, block in enumerate(layers):
        calls = iter(inputs * 2)

        def forward(input_ids: Tensor, block: Any = block, calls: Any = calls) -> Tensor:
            output = block(input_ids, **next(calls)[1])
            return output if isinstance(output, Tensor) else output[0]

        hessians = pipeline.collect_block_hessians(forward, block, [hidden for hidden, _ in inputs], "cpu")
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                payload, weight = pipeline.quantize_matrix(
                    module.weight,
                    statistics[f"{number}.{name}"],
                    bits,
                    states,
                    seed=7919 * number + zlib.crc32(name.encode()) % 1000,
                    hessian=hessians[name],
                )
                module.weight.data = weight.to(DTYPE)
                payloads[f"{path}.{number}.{name}.weight"] = payload
        inputs = [(forward(hidden), keywords) for hidden, keywords in inputs]
        print(f"block {number} done", flush=True)
    return payloads


def decode(payload: dict[str, Any]) -> np.ndarray:
    """float32 [out, in] from the packed bits."""
    rows, columns, bits = payload["n"], payload["d"], payload["bits"]

    def unpack(name: str, width: int, *shape: int) -> Tensor:
        values = pipeline.unpack_bits(payload[name].numpy(), int(np.prod(shape)), width)
        return torch.from_numpy(values).reshape(shape)

    trellis = pipeline.Trellis(payload["n_states"])
    path, members = unpack("path_bits", 1, rows, columns), unpack("member_bits", bits - 1, rows, columns)
    levels = pipeline.decode_levels(path, members, trellis).long()
    rotated = payload["scales"].float()[:, None] * payload["codebook"].float()[levels]
    signs = unpack("signs", 1, columns).float() * 2 - 1
    weight = pipeline.rotate_inv(rotated, signs, payload["block"]) / payload["equil"].float()[None, :]
    return np.asarray(weight.numpy())


if __name__ == "__main__":
    run(quantize, ("turbopress", "torch", "transformers"))
