"""OpenVINO on one IR of a language model, timed turn by turn as its caller asks; the counterpart of time_llama_cpp.py.

    python time_openvino.py JOB.json

The job: `file` (.xml of a stateful model, as optimum-intel exports it), `threads`, `prompt`, `context`, `generate`.
Everything that OpenVINO chooses by itself for latency stays as it is, its keys and values in 8 bits and bfloat16 where
the processor has it among them. As its GenAI library does, the output layer sees the last token alone. The first line
of output is a JSON object about the model; then each line of input, "prompt" or "decode", is answered by the seconds
it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset8 as operations
from turn_by_turn import Timed, answer

LATENCY = {"PERFORMANCE_HINT": "LATENCY"}


def last_token_only(model: ov.Model) -> None:
    """Cut the inputs of the output layer down to the last token."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = operations.slice(node.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


class Model(Timed):
    def __init__(self, job: dict[str, Any]) -> None:
        model = ov.Core().read_model(job["file"])
        last_token_only(model)
        compiled = ov.Core().compile_model(model, "CPU", {**LATENCY, "INFERENCE_NUM_THREADS": job["threads"]})
        self.request = compiled.create_infer_request()
        self.names = [port.any_name for port in compiled.inputs]
        self.vocabulary = compiled.output("logits").get_partial_shape()[2].get_length()
        self.past = 0

    def process(self, first: int, count: int) -> None:
        values = {
            "input_ids": (first + 37 * np.arange(count, dtype=np.int64))[None] % self.vocabulary,
            "attention_mask": np.ones((1, self.past + count), np.int64),
            "position_ids": np.arange(self.past, self.past + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: values[name] for name in self.names})
        self.past += count

    def clear(self) -> None:
        self.request.reset_state()
        self.past = 0


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    begun = time.perf_counter()
    model = Model(job)
    load = time.perf_counter() - begun
    model.generate(job["context"], 1)
    stored = Path(job["file"]).with_suffix(".bin").stat().st_size
    answer(model, job, {"bytes_per_token": stored, "stored_bytes": stored, "load_seconds": load})


if __name__ == "__main__":
    main()
