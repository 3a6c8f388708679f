"""llama.cpp's quantiser with an importance matrix, through the C interface of llama-cpp-python.

The model goes in as a float32 GGUF; `llama_model_quantize` writes a file of the given type, mixed types as
`llama-quantize` would choose them; gguf decodes its tensors. Embedding and output layer stay float32, the subject here
being the blocks. The importance matrix is what `llama-imatrix` gathers, the mean square of every input column.
"""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from dense import Clock, Compressed, Job, linear_names, run
from gguf.quants import dequantize
from safetensors.numpy import load_file

PLAIN = "-plain"  # suffix of a variant without importance matrix


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from halves (Hugging Face) to neighbouring pairs (GGUF): row h, half, i becomes h, i, half."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def undo_rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rotary_heads(name: str, config: dict[str, Any]) -> int | None:
    """Number of heads of a layer whose rows are reordered; None for the others."""
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".k_proj." in name else None


def gguf_names(weights: dict[str, np.ndarray], blocks: int) -> dict[str, str]:
    """Name in the GGUF by name in the checkpoint."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    return {name: str(table.get_name(name, try_suffixes=(".weight",))) for name in weights}


def write_gguf(path: Path, weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    head = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim", head))
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, stored in gguf_names(weights, config["num_hidden_layers"]).items():
        heads = rotary_heads(name, config)
        writer.add_tensor(stored, weights[name] if heads is None else rotary_order(weights[name], heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance_matrix(columns: dict[str, np.ndarray]) -> ctypes.Array[Any]:
    """The C array that ends with a nameless entry; `columns` must outlive it."""
    entry = llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [entry(n.encode(), c.ctypes.data_as(pointer), c.size) for n, c in columns.items()]
    return (entry * (len(entries) + 1))(*entries, entry(None, None, 0))


def quantize(job: Job, variant: str) -> Compressed:
    weights = job.weights()
    config = json.loads((job.model / "config.json").read_text())
    names = gguf_names(weights, config["num_hidden_layers"])
    source, target = job.out / "original.gguf", job.out / f"{variant}.gguf"
    write_gguf(source, weights, config)
    squares = load_file(job.squares)
    columns = {names[n]: np.ascontiguousarray(squares[n], dtype=np.float32) for n in linear_names(weights)}
    matrix = importance_matrix(columns)

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = job.threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.removesuffix(PLAIN)}")
    params.token_embedding_type = gguf.GGMLQuantizationType.F32
    params.quantize_output_tensor = False
    if not variant.endswith(PLAIN):
        params.imatrix = matrix
    llama_cpp.llama_backend_init()
    with Clock() as clock:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    source.unlink()
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed}")
    try:
        return decode(target, weights, config, clock.seconds)
    finally:
        target.unlink()


def decode(path: Path, weights: dict[str, np.ndarray], config: dict[str, Any], seconds: float) -> Compressed:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf_names(weights, config["num_hidden_layers"])
    decoded, total, kinds = {}, 0, Counter[str]()
    for name in linear_names(weights):
        tensor = stored[names[name]]
        heads = rotary_heads(name, config)
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(weights[name].shape)
        decoded[name] = weight if heads is None else undo_rotary_order(weight, heads)
        total += int(tensor.n_bytes)
        kinds[tensor.tensor_type.name] += weight.size
    shares = {kind: count / sum(kinds.values()) for kind, count in kinds.most_common()}
    note = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    return Compressed(decoded, total, seconds, note, details={"types": shares})


if __name__ == "__main__":
    run(quantize, ("llama-cpp-python", "gguf"))
