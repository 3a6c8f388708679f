#!/usr/bin/env python
"""Tokens a second on one pretrained model: our decoder, llama.cpp and OpenVINO, in turns.

    python benchmarks/quality_vs_peers.py --setup                  # once: the peers' environments, in build/peers*
    python benchmarks/decode_real.py --model FOLDER --folders trit-2=OUT gptq=OUT2 --json bench-out/decode_real.json

FOLDER is the original, from which llama.cpp makes its types and NNCF OpenVINO's 4 bits (symmetric, groups of 64,
embedding and output layer at 8), once, kept in --work; OUT are outputs of `feather compress`. All models are loaded,
each in a process of its own, and take turns of 32 tokens after a short context, in the first rounds also a prompt of
512 tokens. Rates, ratios and shares of the bandwidth are those of decode_vs_llamacpp.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from decode_vs_llamacpp import BANDWIDTH_BYTES, llama_version, quartiles, row, say, table, wait_until_idle
from peer_original import write_original
from peer_tools import PEERS, peer_environment
from safetensors.torch import save_file
from turns import Contestant, Server, clean_environment, ratios, run_heat

from featherweight.native.measure import int8_peak
from featherweight.storage.checkpoint.size import measure_size
from featherweight.tasks.evaluate.speed import read_bandwidth

ROOT = Path(__file__).resolve().parent.parent


def make(options: argparse.Namespace, script: str, python: Path, variant: str, file: Path) -> Path:
    """The peer's own file of a variant, without calibration, made if it is not there."""
    if file.is_file():
        return file
    say(f"making {file.name}")
    work = options.work / "original"
    if not (work / "model.safetensors").is_file():
        write_original(options.model, work)
    empty = options.work / "empty.safetensors"
    save_file({"input_ids": torch.arange(512, dtype=torch.int64)[None]}, empty)
    job = {
        **{"model": str(work), "out": str(options.work), "variants": [variant], "keep": True},
        **{"calibration": str(empty), "squares": str(empty), "threads": options.threads, "kept_bytes": 0},
    }
    path = options.work / "job.json"
    path.write_text(json.dumps(job))
    command = [str(python), str(PEERS / script), str(path)]
    done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True)
    if not file.is_file():
        raise SystemExit(f"{file.name} was not made: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return file


def job(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("threads", "prompt", "context", "generate")} | more


def cache_bytes(model: Path) -> int:
    """Of a token's keys and values in float16."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head)


def contestants(options: argparse.Namespace) -> tuple[list[Contestant], list[Contestant]]:
    """Theirs and ours."""
    openvino = options.peers_python.parent.parent.with_name(options.peers_python.parent.parent.name + "-nncf")
    openvino_python = openvino / "bin" / "python"
    theirs = []
    for name in filter(None, options.types.split(",")):
        file = make(
            options, "quantize_llama_cpp.py", options.peers_python, f"{name}-plain", options.work / f"{name}-plain.gguf"
        )
        task = job(options, file=str(file), cache_bytes=cache_bytes(options.model))
        start = lambda t=task: Server(options.peers_python, "time_llama_cpp.py", t, clean_environment())  # noqa: E731
        theirs.append(Contestant(name, "llama.cpp", name, file, start))
    for name in filter(None, options.openvino.split(",")):
        file = make(options, "quantize_nncf.py", openvino_python, name, options.work / f"{name}.xml")
        task = job(options, file=str(file))
        start = lambda t=task: Server(openvino_python, "time_openvino.py", t, clean_environment())  # noqa: E731
        theirs.append(Contestant(name, "OpenVINO", name, file.with_suffix(".bin"), start))
    ours = []
    for named in options.folders:
        name, _, place = named.rpartition("=")
        folder = Path(place)
        if not name or not folder.is_dir():
            raise SystemExit(f"--folders {named}: expected NAME=FOLDER, an output of feather compress")
        task = job(options, folder=str(folder), engine="native", kv_cache="auto")
        start = lambda t=task: Server(Path(sys.executable), "time_featherweight.py", t, dict(os.environ))  # noqa: E731
        about = {"bits": measure_size(folder).linear_bits}
        ours.append(Contestant(name, "featherweight", name, folder, start, about))
    return theirs, ours


def run(options: argparse.Namespace) -> dict[str, Any]:
    theirs, ours = contestants(options)
    measured: list[float] = []

    def bandwidth() -> float:
        measured.append(read_bandwidth(size=BANDWIDTH_BYTES, threads=options.threads))
        return measured[-1]

    busy = wait_until_idle(options.idle)
    run_heat(0, [*theirs, *ours], options.rounds, options.prompts, bandwidth, say)
    low, middle, high = quartiles(measured)
    pairs = {
        request: {
            f"{one.name} / {other.tool} {other.name}": quartiles(found)
            for one in ours
            for other in theirs
            if (found := ratios(one, other, request))
        }
        for request in ("decode", "prompt")
    }
    return {
        "shape": {"name": options.model.name},
        **{key: getattr(options, key) for key in ("threads", "prompt", "context", "generate", "rounds", "prompts")},
        "bandwidth_gb_s": middle / 1e9,
        "bandwidth_quartiles_gb_s": [low / 1e9, high / 1e9],
        "int8_peak": int8_peak(options.threads),
        "llama_cpp": options.llama_version,
        "busy_before": [busy],
        "rows": [row(one, options) for one in [*theirs, *ours]],
        "ratios": pairs,
    }


def ratio_table(result: dict[str, Any]) -> str:
    lines = ["| ours / theirs | decode | quartiles | prompt | quartiles |", "|---|---|---|---|---|"]
    for pair, (low, middle, high) in result["ratios"]["decode"].items():
        lower, median, upper = result["ratios"]["prompt"].get(pair, (float("nan"),) * 3)
        lines.append(f"| {pair} | {middle:.2f} | {low:.2f} to {high:.2f} | {median:.2f} | {lower:.2f} to {upper:.2f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the original, a Llama folder")
    parser.add_argument("--folders", nargs="+", default=[], metavar="NAME=FOLDER", help="outputs of feather compress")
    parser.add_argument("--types", default="Q4_0,Q4_K_M,Q3_K_M", help="of llama.cpp; empty: none")
    parser.add_argument("--openvino", default="int4-sym-g64", help="NNCF's variants, without data; empty: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4, help="rounds with a prompt as well")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=8, help="tokens before the decoded ones")
    parser.add_argument("--generate", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds to wait at most for idle processors")
    parser.add_argument("--peers-python", type=Path, default=ROOT / "build" / "peers" / "bin" / "python")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-out" / "decode-real", help="the peers' files")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work, options.peers_python = options.work.resolve(), options.peers_python.absolute()
    options.llama_version = llama_version(options.peers_python) if options.types else "none"
    result = run(options)
    print(table(result), ratio_table(result), sep="\n\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
