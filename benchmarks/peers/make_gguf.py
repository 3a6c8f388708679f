"""Random Llama models as GGUF, f16 and the types that llama.cpp quantises them to.

    python make_gguf.py JOB.json

The job: `shape` (hidden, ffn, blocks, heads, key_value_heads, vocabulary), `files` by type name ("F16", "Q4_0", ...),
`threads`. Files that exist are kept. Mixed types (Q4_K_M) are chosen as `llama-quantize` would, embedding and output
layer included.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

DEVIATION = 0.02


def write_f16(path: Path, shape: dict[str, int]) -> None:
    hidden, ffn, vocabulary = shape["hidden"], shape["ffn"], shape["vocabulary"]
    head = hidden // shape["heads"]
    random = np.random.default_rng(0)

    def matrix(*dims: int) -> np.ndarray:
        return (random.standard_normal(dims, dtype=np.float32) * DEVIATION).astype(np.float16)

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["blocks"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tensor("token_embd.weight", matrix(vocabulary, hidden))
    for block in range(shape["blocks"]):
        key_value = head * shape["key_value_heads"]
        sizes = {
            "attn_q": (hidden, hidden),
            "attn_k": (key_value, hidden),
            "attn_v": (key_value, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(hidden, np.float32))
        for name, size in sizes.items():
            writer.add_tensor(f"blk.{block}.{name}.weight", matrix(*size))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output.weight", matrix(vocabulary, hidden))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, name: str, threads: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = threads
    part = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize refused {name}")
    part.rename(target)


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    files = {name: Path(path) for name, path in job["files"].items()}
    llama_cpp.llama_backend_init()
    if not files["F16"].is_file():
        part = files["F16"].with_suffix(".part")
        write_f16(part, job["shape"])
        part.rename(files["F16"])
    for name, path in files.items():
        if not path.is_file():
            quantise(files["F16"], path, name, job["threads"])


if __name__ == "__main__":
    main()
