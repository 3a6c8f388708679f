"""llama.cpp on one GGUF, through the C interface of llama-cpp-python, timed turn by turn as its caller asks.

    python time_llama_cpp.py JOB.json

The job: `file`, `threads`, `prompt`, `context`, `generate`, `cache_bytes`. The first line of output is a JSON object
about the model; then each line of input, "prompt" or "decode", is answered by the seconds it took. As `llama-bench`
does, prompts are processed in one batch from an empty cache; tokens are decoded one by one after a short context,
which is not timed. `bytes_per_token` are the tensors that a token reads (the embedding gives one row) and the fp16
cache in the middle of the generation.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
from turn_by_turn import Timed, answer


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, user: ctypes.c_void_p) -> None:
    pass


def weight_bytes(path: Path) -> tuple[int, int, float, dict[str, int]]:
    """Bytes read for a token, bytes in all, bits a weight of the blocks' matrices, and how many are of which type."""
    tensors = gguf.GGUFReader(path).tensors
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
    types = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    read = sum(size for name, size in sizes.items() if tied or name != "token_embd.weight")
    matrices = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    bits = 8 * sum(sizes[tensor.name] for tensor in matrices) / sum(int(tensor.n_elements) for tensor in matrices)
    return read, sum(sizes.values()), bits, dict(types)


class Model(Timed):
    def __init__(self, job: dict[str, Any]) -> None:
        self.model = llama_cpp.llama_model_load_from_file(job["file"].encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        length = max(job["prompt"], job["context"] + job["generate"])
        params.n_ctx = -(-length // 256) * 256
        params.n_batch = params.n_ubatch = max(512, job["prompt"])
        params.n_threads = params.n_threads_batch = job["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def process(self, first: int, count: int) -> None:
        tokens = (llama_cpp.llama_token * count)(*[(first + 37 * i) % self.vocabulary for i in range(count)])
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    begun = time.perf_counter()
    model = Model(job)
    load = time.perf_counter() - begun
    model.generate(job["context"], 1)
    read, total, bits, types = weight_bytes(Path(job["file"]))
    report = {
        "bytes_per_token": read + job["cache_bytes"] * (job["context"] + job["generate"] // 2),
        "stored_bytes": total,
        "bits": bits,
        "types": types,
        "load_seconds": load,
    }
    answer(model, job, report)


if __name__ == "__main__":
    main()
