"""Our decoder on one folder, timed turn by turn as its caller asks; the counterpart of time_llama_cpp.py.

    python time_featherweight.py JOB.json

The job: `folder`, `threads`, `prompt`, `context`, `generate`, `engine`, `kv_cache`. The first line of output is a JSON
object about the model; then each line of input, "prompt" or "decode", is answered by the seconds it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from featherweight.tasks.evaluate.speed import Runner, bytes_read_per_token, open_runner


def prefill(runner: Runner, tokens: int) -> float:
    prompt = torch.arange(tokens).remainder_(runner.vocabulary)
    begun = time.perf_counter()
    runner.prefill(prompt)
    return time.perf_counter() - begun


def generate(runner: Runner, context: int, count: int) -> tuple[float, float | None]:
    """Seconds, and those of them outside products and attention."""
    prefill(runner, context)
    kernels = runner.kernel_seconds()
    begun = time.perf_counter()
    runner.generate(count)
    seconds = time.perf_counter() - begun
    after = runner.kernel_seconds()
    return seconds, None if kernels is None or after is None else seconds - (after - kernels)


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    begun = time.perf_counter()
    runner = open_runner(job["folder"], engine=job["engine"], cache=job["kv_cache"], threads=job["threads"])
    load = time.perf_counter() - begun
    generate(runner, job["context"], 1)
    report = {
        "bytes_per_token": bytes_read_per_token(runner, job["folder"], job["context"] + job["generate"] // 2),
        "load_seconds": load,
        "engine": runner.name,
    }
    print(json.dumps(report), flush=True)
    for line in sys.stdin:
        if line.strip() == "prompt":
            print(prefill(runner, job["prompt"]), flush=True)
        else:
            seconds, outside = generate(runner, job["context"], job["generate"])
            print(seconds, "" if outside is None else outside, flush=True)


if __name__ == "__main__":
    main()
