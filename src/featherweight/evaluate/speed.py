"""Speed of a loaded model beside the limit of the machine it runs on.

Generating one token reads every stored weight once, so memory bandwidth bounds the rate: the share reached is
bytes per token x tokens per second / bandwidth. The bandwidth is measured in the same run, by summing a buffer far
larger than any cache with all threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import EvaluationError
from featherweight.evaluate.evaluation import _open, own_context
from featherweight.evaluate.size import bytes_per_token
from featherweight.memory import peak_memory_bytes, reset_peak_memory

BUFFER_BYTES = 3 << 29  # 1.5 GiB: caches of servers reach half a gibibyte
REPEATS = 3
"""Each figure is the best of so many runs; interference only ever makes a run slower."""


def measure_speed(
    folder: str | Path, prompt_tokens: int = 512, new_tokens: int = 64, dtype: str = "auto"
) -> dict[str, Any]:
    """Prompt processing, greedy generation with a KV cache (tokens a second), and the read bandwidth (1e9 bytes/s).

    `bytes_per_token` counts what is stored and read for a token: all weights but the input embedding (of which one
    row is read, unless the output layer shares it) and the experts a token is not sent to.
    """
    reset_peak_memory()
    begun = time.perf_counter()
    model, _ = _open(folder, dtype)
    load_seconds = time.perf_counter() - begun
    device = next(model.parameters()).device
    prompt_tokens, new_tokens = _fitting(own_context(model), prompt_tokens, new_tokens)
    prompt = torch.arange(prompt_tokens, device=device).remainder_(model.get_input_embeddings().num_embeddings)[None]
    with torch.inference_mode():
        prefill = _best(lambda: model(input_ids=prompt, use_cache=True), device)
        decode = min(_decode_seconds(model, prompt, new_tokens, device) for _ in range(REPEATS))
    peak = peak_memory_bytes()
    bytes_read = bytes_per_token(folder)
    bandwidth = read_bandwidth(device)
    rate = new_tokens / decode
    return {
        "decode_tokens_per_second": rate,
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "bytes_per_token": bytes_read,
        "bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_share": rate * bytes_read / bandwidth,
        "peak_memory_bytes": peak,
        "load_seconds": load_seconds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def _fitting(context: int | None, prompt: int, new: int) -> tuple[int, int]:
    """Shortened to the model's context, if that is small."""
    if prompt < 1 or new < 1:
        raise EvaluationError(f"a speed measurement needs at least one token, got {prompt} of prompt and {new} new")
    if context is None or prompt + new <= context:
        return prompt, new
    new = min(new, max(1, context // 2))
    return max(1, min(prompt, context - new)), new


def _decode_seconds(model: Any, prompt: Tensor, count: int, device: torch.device) -> float:
    out = model(input_ids=prompt, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    _wait(device)
    begun = time.perf_counter()
    for _ in range(count):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    _wait(device)
    return time.perf_counter() - begun


def read_bandwidth(device: torch.device | None = None, size: int | None = None) -> float:
    """Bytes a second at which a buffer of `size` bytes (1.5 GiB) is summed; less is used where memory is short."""
    device, size = device or torch.device("cpu"), size or BUFFER_BYTES
    while True:
        try:
            buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
            break
        except RuntimeError:  # out of memory
            if size < 1 << 20:
                raise
            size //= 2
    # A row for each thread and more, so that all take part.
    rows = buffer[: buffer.numel() // 64 * 64].view(64, -1)
    return rows.numel() * 4 / _best(lambda: rows.sum(1), device)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Least seconds of REPEATS runs after a first that is not counted."""
    action()
    _wait(device)
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        action()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
