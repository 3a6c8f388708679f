"""Times llm-compressor's GPTQ on one layer, weight and Hessian given: min-max scales, factorisation, and the sweep.

    python time_gptq.py JOB.json    {"tensors", "out", "bits", "group", "symmetric", "actorder", "threads"}

`tensors` is a safetensors file with `weight` float32 [out, in] and `hessian` float32 [in, in]; what comes out,
dequantised, is written to `out` as `weight`; a JSON line with seconds and versions goes to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from safetensors.torch import load_file, save_file


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    arguments = QuantizationArgs(
        num_bits=job["bits"],
        group_size=job["group"],
        symmetric=job["symmetric"],
        strategy="group",
        actorder=job["actorder"],
    )
    tensors = load_file(job["tensors"])
    weight, hessian = tensors["weight"], tensors["hessian"]
    with torch.inference_mode():
        begun, worked = time.perf_counter(), time.process_time()
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments)
        found = observer(weight).get_qparams()
        quantized, _, fell_back = quantize_weight(
            weights=weight[None].clone(),
            hessians=hessian[None].clone(),
            scale=found["scale"][None],
            zero_point=found["zero_point"][None],
            global_scale=None,
            quant_args=arguments,
        )
        seconds, processor = time.perf_counter() - begun, time.process_time() - worked
    if bool(fell_back.any()):
        raise SystemExit("llm-compressor could not factorise the Hessian and rounded to nearest")
    save_file({"weight": quantized[0].contiguous()}, job["out"])
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch")}
    print(json.dumps({"seconds": seconds, "processor_seconds": processor, "versions": versions}))


if __name__ == "__main__":
    main()
