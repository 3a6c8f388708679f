"""llama.cpp's quantiser with an importance matrix, through the C interface of llama-cpp-python.

The model goes in as a float32 GGUF with its tokenizer; `llama_model_quantize` writes a file of the given type, mixed
types as `llama-quantize` would choose them, embedding and output layer included; gguf decodes its tensors. Rows that no
super-block of 256 columns fits get the type that llama.cpp falls back to. The importance matrix is what `llama-imatrix`
gathers, the mean square of every input column.
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
from dense import EMBEDDINGS, Clock, Compressed, Job, linear_names, run
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


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> int:
    """Tokens, their types and merges of a byte-level BPE, as any file of llama.cpp holds them; about how many bytes."""
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text()) if file.is_file() else {}
    if definition.get("model", {}).get("type") != "BPE":
        writer.add_tokenizer_model("none")
        return 0
    named = {index: token for token, index in definition["model"]["vocab"].items()}
    added = {token["id"]: token for token in definition.get("added_tokens", ())}
    named |= {index: token["content"] for index, token in added.items()}
    tokens = [named.get(index, f"[PAD{index}]") for index in range(max(named) + 1)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    types = [control if added.get(index, {}).get("special") else normal for index in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True)
    special.add_to_gguf(writer, quiet=True)
    return sum(8 + len(token.encode()) for token in [*tokens, *special.merges]) + 4 * len(types)


def write_gguf(path: Path, weights: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> int:
    """Returns about how many bytes the tokenizer takes."""
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
    tokenizer = add_tokenizer(writer, folder)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, stored in gguf_names(weights, config["num_hidden_layers"]).items():
        heads = rotary_heads(name, config)
        writer.add_tensor(stored, weights[name] if heads is None else rotary_order(weights[name], heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


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
    tokenizer = write_gguf(source, weights, config, job.model)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = job.threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.removesuffix(PLAIN)}")
    if not variant.endswith(PLAIN):
        squares = load_file(job.squares)
        columns = {names[n]: np.ascontiguousarray(squares[n], dtype=np.float32) for n in linear_names(weights)}
        matrix = importance_matrix(columns)
        params.imatrix = matrix
    llama_cpp.llama_backend_init()
    with Clock() as clock:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    source.unlink()
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed}")
    try:
        return decode(target, weights, config, clock.seconds, tokenizer)
    finally:
        if not job.keep:
            target.unlink()


def decode(
    path: Path, weights: dict[str, np.ndarray], config: dict[str, Any], seconds: float, tokenizer: int
) -> Compressed:
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf_names(weights, config["num_hidden_layers"])
    decoded, kinds = {}, Counter[str]()
    linears = linear_names(weights)
    embeddings = [name for name in EMBEDDINGS if name in weights]
    for name in [*linears, *embeddings]:
        tensor = stored[names[name]]
        heads = rotary_heads(name, config)
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(weights[name].shape)
        decoded[name] = weight if heads is None else undo_rotary_order(weight, heads)
        if name not in embeddings:
            kinds[tensor.tensor_type.name] += weight.size
    shares = {kind: count / sum(kinds.values()) for kind, count in kinds.most_common()}
    outside = {name: stored[names[name]].tensor_type.name for name in embeddings}
    note = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    return Compressed(
        {name: decoded[name] for name in linears},
        sum(int(stored[names[name]].n_bytes) for name in linears),
        seconds,
        f"{note}; embedding {', '.join(outside.values())}",
        file_bytes=path.stat().st_size,
        embedding_bytes=sum(int(stored[names[name]].n_bytes) for name in embeddings),
        others={name: decoded[name] for name in embeddings},
        details={"types": shares, "embedding": outside, "tokenizer_bytes": tokenizer},
    )


if __name__ == "__main__":
    run(quantize, ("llama-cpp-python", "gguf"))
