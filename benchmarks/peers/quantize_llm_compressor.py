"""llm-compressor's GPTQ, AWQ and round-to-nearest, one-shot with the given calibration tokens.

Variants are `<method>-w<bits>-g<group>[-asym]`. The folder it saves is read back: packed codes, scales and zero points
are counted and decoded with compressed-tensors.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from dense import EMBEDDINGS, Clock, Compressed, Job, linear_names, run
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

VARIANT = re.compile(r"(gptq|awq|rtn)-w(\d)-g(\d+)(-asym)?")
if not torch.accelerator.is_available():
    # AWQ pins its cache whatever the device, which torch refuses without an accelerator; nothing is computed by it.
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
DTYPE = torch.bfloat16  # of model and scales while it works: 16-bit scales, as it stores for any published checkpoint.
# Not float16, which few CPUs multiply themselves: a run then takes half an hour instead of minutes.


def quantize(job: Job, variant: str) -> Compressed:
    found = VARIANT.fullmatch(variant)
    if found is None:
        raise ValueError(f"{variant} is not <gptq|awq|rtn>-w<bits>-g<group>[-asym]")
    method, bits, group, symmetric = found[1], int(found[2]), int(found[3]), not found[4]
    torch.set_num_threads(job.threads)
    arguments = QuantizationArgs(num_bits=bits, group_size=group, symmetric=symmetric, strategy="group", type="int")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    settings = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipes = {
        "gptq": lambda: [GPTQModifier(**settings)],
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**settings)],
        "rtn": lambda: [QuantizationModifier(**settings)],
    }
    ids = load_file(job.calibration)["input_ids"]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    folder = job.out / f"{variant}.saved"
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPE, local_files_only=True)
    with Clock() as clock:
        oneshot(
            model=model,
            tokenizer=str(job.model),
            dataset=Dataset.from_list(rows),
            recipe=recipes[method](),
            num_calibration_samples=len(rows),
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(folder, save_compressed=True)
    try:
        return decode(job, folder, scheme, clock.seconds)
    finally:
        shutil.rmtree(folder)


def decode(job: Job, folder: Path, scheme: QuantizationScheme, seconds: float) -> Compressed:
    """What the saved folder holds. AWQ moves its scales into the norms (in float32 a norm costs nothing more)."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = job.weights()
    decoded: dict[str, np.ndarray] = {}
    total = 0
    for name in linear_names(weights):
        module = name.removesuffix("weight")
        parts = {key.removeprefix(module): tensor for key, tensor in stored.items() if key.startswith(module)}
        total += sum(part.numel() * part.element_size() for key, part in parts.items() if key != "weight_shape")
        parts["weight_scale"] = parts["weight_scale"].float()  # so that decoding rounds nothing
        decoded[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].numpy()
    norms = {name: stored[name].float().numpy() for name in weights if "norm" in name}
    changed = {name: norm for name, norm in norms.items() if not np.allclose(norm, weights[name], rtol=1e-3)}
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    heads = [name for name in EMBEDDINGS if name in stored]
    note = "stores the tied output layer beside the embedding" if len(heads) > sum(n in weights for n in heads) else ""
    return Compressed(decoded, total, seconds, note, file_bytes, others=changed)


if __name__ == "__main__":
    run(quantize, ("llmcompressor", "compressed-tensors", "torch", "transformers"))
