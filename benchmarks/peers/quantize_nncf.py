"""NNCF's weight compression of the OpenVINO model that optimum-intel exports. Runs in an environment of its own.

Variants are `int4-<sym|asym>-g<group>[-awq-se]`: all linear layers of the blocks to 4 bits (ratio 1), embedding and
output layer to 8, which is its backup precision; with AWQ and scale estimation on the given tokens, or without data.
The IR is counted as saved (.xml and .bin). Weights are decoded by OpenVINO itself from the saved constants, and the
dense model must give the logits of the compressed one; OpenVINO's 8-bit activations and bfloat16 are off in that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from dense import EMBEDDINGS, Clock, Compressed, Job, linear_names, run
from optimum.intel import OVModelForCausalLM
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

VARIANT = re.compile(r"int4-(sym|asym)-g(\d+)(-awq-se)?")
MODULE = re.compile(r"(model\.layers\.\d+\.\w+\.\w+_proj|model\.embed_tokens|lm_head)\b")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
TOLERANCE = 0.02  # of the largest logit: scales are float16, and sums run in another order


def inputs_of(model: ov.Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """All inputs of an exported decoder for a window int64 [length] without a past."""
    values = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return {name: values[name] for name in (i.any_name for i in model.inputs)}


def quantize(job: Job, variant: str) -> Compressed:
    found = VARIANT.fullmatch(variant)
    if found is None:
        raise ValueError(f"{variant} is not int4-<sym|asym>-g<group> or int4-<sym|asym>-g<group>-awq-se")
    model = OVModelForCausalLM.from_pretrained(job.model, export=True, compile=False, load_in_8bit=False).model
    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode[f"INT4_{found[1].upper()}"]}
    if found[3]:
        windows = [inputs_of(model, ids) for ids in load_file(job.calibration)["input_ids"]]
        settings |= {"dataset": nncf.Dataset(windows), "subset_size": len(windows)}
        settings |= {"awq": True, "scale_estimation": True}
    with Clock() as clock:
        model = nncf.compress_weights(
            model, ratio=1.0, group_size=int(found[2]), backup_mode=nncf.BackupMode.INT8_ASYM, **settings
        )
    saved = job.out / f"{variant}.xml"
    ov.save_model(model, saved, compress_to_fp16=False)
    try:
        return decode(job, saved, clock.seconds)
    finally:
        if not job.keep:
            saved.unlink()
            saved.with_suffix(".bin").unlink()


def decode(job: Job, saved: Path, seconds: float) -> Compressed:
    core = ov.Core()
    model, weights = core.read_model(saved), job.weights()
    decoded: dict[str, np.ndarray] = {}
    stored: dict[str, int] = {}
    counted: set[str] = set()
    for name, output, factor in weight_outputs(model):
        if name in weights:
            weight = evaluate(core, output).reshape(weights[name].shape)
            decoded[name] = weight if factor is None else weight * factor
        constants = {c.get_friendly_name(): c for c in constants_before(output) if c.get_friendly_name() not in counted}
        stored[name] = sum(byte_size(constant) for constant in constants.values())
        counted |= set(constants)
    linears = linear_names(weights)
    missing = [name for name in linears if name not in decoded]
    if missing:
        raise ValueError(f"no weight of the saved model is that of {missing[0]}")
    check_logits(job, core, model, {**weights, **decoded})
    embeddings = {name: decoded[name] for name in EMBEDDINGS if name in decoded}
    return Compressed(
        {name: decoded[name] for name in linears},
        sum(stored[name] for name in linears),
        seconds,
        file_bytes=saved.stat().st_size + saved.with_suffix(".bin").stat().st_size,
        embedding_bytes=sum(stored.get(name, 0) for name in EMBEDDINGS),
        others=embeddings,
    )


def weight_outputs(model: ov.Model) -> Iterator[tuple[str, Any, np.ndarray | None]]:
    """(name in the checkpoint, decompressed weight, factor of its columns or None): AWQ may put a factor of the inputs
    of `down_proj` behind the activation, which belongs to the columns."""
    for node in model.get_ordered_ops():
        module = MODULE.search(node.get_friendly_name())
        if module is None or node.get_type_name() not in ("MatMul", "Gather"):
            continue
        port = 1 if node.get_type_name() == "MatMul" else 0
        if any(True for _ in constants_before(node.input_value(port))):
            factor = awq_factor(node) if module[1].endswith("down_proj") else None
            yield f"{module[1]}.weight", node.input_value(port), factor


def awq_factor(matmul: Any) -> np.ndarray | None:
    """float32 [in] of a multiplication by a constant between the activation and this layer."""
    product = matmul.input_value(0).get_node()
    for branch in (product, *(product.input_value(i).get_node() for i in range(product.get_input_size()))):
        if branch.get_type_name() != "Multiply":
            continue
        for i in range(2):
            source = branch.input_value(i).get_node()
            if source.get_type_name() == "Convert":
                source = source.input_value(0).get_node()
            if source.get_type_name() == "Constant":
                return np.asarray(source.data, np.float32).reshape(-1)
    return None


def constants_before(output: Any) -> Iterator[Any]:
    """All constants that a value is made of; nothing if anything else goes into it."""
    found, waiting = [], [output.get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Constant":
            found.append(node)
        elif node.get_input_size() == 0:
            return
        waiting += [node.input_value(i).get_node() for i in range(node.get_input_size())]
    yield from found


def byte_size(constant: Any) -> int:
    bits = constant.get_element_type().bitwidth * int(np.prod(list(constant.get_output_shape(0)) or [1]))
    return -(-bits // 8)


def evaluate(core: ov.Core, output: Any) -> np.ndarray:
    result = core.compile_model(ov.Model([output], []), "CPU", EXACT)({})
    return np.array(result[0], dtype=np.float32)


def check_logits(job: Job, core: ov.Core, model: ov.Model, weights: dict[str, np.ndarray]) -> None:
    """ValueError unless the decoded weights give the compressed model's own logits on 64 tokens."""
    ids = load_file(job.calibration)["input_ids"][0, :64]
    found = core.compile_model(model, "CPU", EXACT)(inputs_of(model, ids))[0]
    dense = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, local_files_only=True)
    dense.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=False)
    dense.tie_weights()
    with torch.inference_mode():
        expected = dense(input_ids=torch.from_numpy(ids[None].copy())).logits.numpy()
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"logits differ from OpenVINO's by {error:.2e} of the largest", flush=True)
    if error > TOLERANCE:
        raise ValueError(f"the decoded weights give other logits than OpenVINO, by {error:.3f} of the largest")


if __name__ == "__main__":
    run(quantize, ("nncf", "openvino", "optimum-intel"))
