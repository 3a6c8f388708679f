"""Tokens a second of our decoder and of llama.cpp on one synthetic Llama shape, beside the limit of the memory.

    python benchmarks/decode_vs_llamacpp.py --setup                    # once: llama.cpp, built here, in build/llama-cpp
    python benchmarks/decode_vs_llamacpp.py --shape 1.1b --json bench-out/decode.json --plot docs/decode.png

Random weights of the shape become GGUF files, quantised by llama.cpp itself, and folders of ours, made directly as
codes. Every variant of either takes its turn in a process of its own, all in turn, for several rounds, and its best
turn counts: a prompt of 512 tokens from an empty cache, and 64 tokens one by one after a short context. Memory
bandwidth is measured before and after; the limit of a variant is that bandwidth over its bytes per token (weights and
cache).

llama.cpp keeps the output layer in Q6_K (F16 and Q8_0: as named); ours is uniform 6 bit g128 there (8 bit and bf16: as
named), and both are counted. A variant that crashes is reported as such. GCC 12 miscompiles llama.cpp's AMX path (it
drops the stores to the tile configuration, so Q4_0 and others end with a segmentation fault); `--setup` therefore
builds without AMX, and `--setup --amx` with it and a corrected intrinsic.

Threads of llama.cpp wait for each other in loops, so another busy process slows it many times over. `--idle` waits
before every turn until the processors have nothing else to do; what was still going on is written into the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthetic_folder import VARIANTS, shapes, write_folder

from featherweight.evaluate.size import measure_size
from featherweight.evaluate.speed import read_bandwidth
from featherweight.kernels.measure import bf16_peak, int8_peak

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
LLAMA_CPP = "0.3.36"
TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "TQ2_0", "TQ1_0")
TIME_LIMIT = 900

DECODE_GOALS = (
    ("planes-1", "TQ2_0", 2.0),
    ("planes-2", "Q4_0", 1.5),
    ("planes-2", "Q3_K_M", 3.0),
    ("planes-2", "F16", 4.63),
    ("planes-2-tied", "Q4_0", 1.5),
    ("planes-2-tied", "Q3_K_M", 3.0),
    ("planes-2-tied", "F16", 4.63),
    ("uniform-4", "Q4_0", 1.25),
    # at equal bits, or nearly
    ("planes-1", "TQ1_0", 1.0),
    ("uniform-2", "TQ2_0", 1.0),
    ("uniform-2", "Q2_K", 1.0),
    ("uniform-3", "Q3_K_M", 1.0),
    ("uniform-4", "Q4_K_M", 1.0),
    ("uniform-8", "Q8_0", 1.0),
    ("bf16", "F16", 1.0),
)
PREFILL_GOAL = 1.5  # times the fastest type of llama.cpp
BANDWIDTH_GOAL = 0.75

# GCC 12 takes the intrinsic for one that reads eight bytes and drops the stores to the others.
AMX_HEADER = """#include <immintrin.h>
#ifdef __AMX_TILE__
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
"""


@dataclass
class Contestant:
    """One file or folder, and what its turns gave."""

    name: str
    tool: str
    path: Path
    title: str
    bits: float | None = None  # a weight of the linear layers in the blocks
    turns: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def best(self, key: str) -> float | None:
        return max((turn[key] for turn in self.turns), default=None)

    def bytes_per_token(self) -> int | None:
        return self.turns[0]["bytes_per_token"] if self.turns else None


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def set_up(folder: Path, amx: bool) -> None:
    """llama-cpp-python in an environment of its own, built for this processor."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    flags = "-mno-amx-int8 -mno-amx-tile -mno-amx-bf16"
    if amx:
        header = folder / "amx.h"
        header.write_text(AMX_HEADER)
        flags = f"-include {header}"
    elif os.uname().machine != "x86_64":
        flags = ""
    environment = {
        **os.environ,
        "CFLAGS": flags if not amx else "",
        "CXXFLAGS": flags,
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF",
    }
    # A wheel that pip has kept may have been built with other flags.
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir"]
    install += ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA_CPP}", "numpy", "gguf"]
    subprocess.run(install, env=environment, check=True)


def peer_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


def run_peer(python: Path, script: str, job: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as stream:
        json.dump(job, stream)
        stream.flush()
        command = [str(python), str(PEERS / script), stream.name]
        return subprocess.run(command, env=peer_environment(), capture_output=True, text=True, timeout=TIME_LIMIT)


def why(done: subprocess.CompletedProcess[str]) -> str:
    """What ended a process."""
    if done.returncode < 0:
        return f"crashed ({signal.Signals(-done.returncode).name})"
    return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]


def their_contestants(options: argparse.Namespace) -> list[Contestant]:
    """The GGUF files, made if need be."""
    wanted = [name for name in options.types.split(",") if name]
    if not wanted:
        return []
    files = {name: options.work / f"llama-{options.shape}-{name}.gguf" for name in dict.fromkeys(["F16", *wanted])}
    if not all(path.is_file() for path in files.values()):
        say("making GGUF files")
        shape = asdict(shapes.SHAPES[options.shape])
        job = {"shape": shape, "files": {n: str(p) for n, p in files.items()}, "threads": options.threads}
        done = run_peer(options.peers_python, "make_gguf.py", job)
        if done.returncode:
            raise SystemExit(f"the GGUF files were not made: {why(done)}")
    return [Contestant(name, "llama.cpp", files[name], name) for name in wanted]


def our_contestants(options: argparse.Namespace) -> list[Contestant]:
    found = []
    for name in [name for name in options.variants.split(",") if name]:
        folder = write_folder(options.work / f"{options.shape}-{name}", options.shape, name)
        bits = measure_size(folder).linear_bits
        found.append(Contestant(name, "featherweight", folder, VARIANTS[name].title, bits))
    return found


def their_turn(contestant: Contestant, options: argparse.Namespace) -> None:
    shape = shapes.SHAPES[options.shape]
    width = shape.hidden // shape.heads * shape.key_value_heads
    job = {key: getattr(options, key) for key in ("threads", "prompt", "context", "generate", "repeats")}
    job |= {"file": str(contestant.path), "cache_bytes": 2 * 2 * shape.blocks * width}  # keys and values, fp16
    done = run_peer(options.peers_python, "time_llama_cpp.py", job)
    if done.returncode:
        contestant.failure = why(done)
        return
    contestant.turns.append(json.loads(done.stdout.strip().splitlines()[-1]))
    contestant.bits = contestant.turns[-1]["bits"]


def our_turn(contestant: Contestant, options: argparse.Namespace) -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as stream:
        command = [sys.executable, "-m", "featherweight.cli.main", "bench", str(contestant.path)]
        command += ["--json", stream.name, "--engine", options.engine, "--kv-cache", options.kv_cache]
        for name in ("threads", "prompt", "context", "generate", "repeats"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
        if done.returncode:
            contestant.failure = why(done)
            return
        contestant.turns.append(json.loads(Path(stream.name).read_text()))


def in_turn(theirs: list[Contestant], ours: list[Contestant]) -> list[Contestant]:
    """One of each tool after the other, so that both meet the machine in the same state."""
    pairs = [pair for i in range(max(len(theirs), len(ours))) for pair in (theirs[i : i + 1], ours[i : i + 1])]
    return [contestant for pair in pairs for contestant in pair]


def run(options: argparse.Namespace) -> dict[str, Any]:
    theirs, ours = their_contestants(options), our_contestants(options)
    bandwidth = [read_bandwidth(threads=options.threads)]
    for number in range(options.rounds):
        for contestant in in_turn(theirs, ours):
            if contestant.failure:
                continue
            busy = wait_until_idle(options.idle)
            try:
                (their_turn if contestant.tool == "llama.cpp" else our_turn)(contestant, options)
            except subprocess.TimeoutExpired:
                contestant.failure = f"took more than {TIME_LIMIT} s"
            if contestant.turns and not contestant.failure:
                contestant.turns[-1]["busy_before"] = busy
            say(f"round {number + 1}: {contestant.tool} {contestant.name}: {last(contestant)}")
    bandwidth.append(read_bandwidth(threads=options.threads))
    return report(options, [*theirs, *ours], bandwidth)


def busy_share(seconds: float = 0.5) -> float | None:
    """Share of all processors' time in use, over some moments; None where the system does not tell."""

    def counts() -> list[int] | None:
        try:
            return [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except OSError:
            return None

    before = counts()
    time.sleep(seconds)
    after = counts()
    if before is None or after is None:
        return None
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return 1 - (spent[3] + spent[4]) / max(1, sum(spent))


def wait_until_idle(limit: float) -> float | None:
    """The share still in use when it had fallen below 5 %, or after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        busy = busy_share()
        if busy is None or busy < 0.05 or time.monotonic() > end:
            return busy


def last(contestant: Contestant) -> str:
    if contestant.failure:
        return contestant.failure
    turn = contestant.turns[-1]
    return f"{turn['decode_tokens_per_second']:.1f} and {turn['prefill_tokens_per_second']:.1f} tokens/s"


def report(options: argparse.Namespace, contestants: list[Contestant], bandwidth: list[float]) -> dict[str, Any]:
    shape = shapes.SHAPES[options.shape]
    linear = sum(dims[0] * dims[1] for name, dims in shapes.tensors(shape) if ".layers." in name and len(dims) > 1)
    return {
        "shape": {"name": options.shape, **asdict(shape)},
        "linear_weights": linear,
        **{key: getattr(options, key) for key in ("threads", "prompt", "context", "generate", "rounds", "repeats")},
        "bandwidth_gb_s": max(bandwidth) / 1e9,
        "bandwidths_gb_s": [value / 1e9 for value in bandwidth],
        "int8_peak": int8_peak(options.threads),
        "bf16_peak": bf16_peak(options.threads),
        "llama_cpp": options.llama_version,
        "rows": [row(contestant, max(bandwidth), linear) for contestant in contestants],
    }


def row(contestant: Contestant, bandwidth: float, linear: int) -> dict[str, Any]:
    decode, read = contestant.best("decode_tokens_per_second"), contestant.bytes_per_token()
    size = contestant.path.stat().st_size if contestant.path.is_file() else measure_size(contestant.path).bytes
    known = decode is not None and read is not None
    return {
        "name": contestant.name,
        "tool": contestant.tool,
        "title": contestant.title,
        "bits": contestant.bits,
        "bytes": size,
        "bytes_per_token": read,
        "decode_tokens_per_second": decode,
        "decode_median": statistics.median(t["decode_tokens_per_second"] for t in contestant.turns) if known else None,
        "prefill_tokens_per_second": contestant.best("prefill_tokens_per_second"),
        "limit_tokens_per_second": bandwidth / read if read else None,
        "bandwidth_share": decode * read / bandwidth if known else None,
        "failure": contestant.failure,
        "turns": contestant.turns,
    }


def others(result: dict[str, Any]) -> str:
    """A warning where other processes were at work."""
    shares = [turn["busy_before"] or 0.0 for entry in result["rows"] for turn in entry["turns"]]
    if not shares or max(shares) < 0.05:
        return ""
    disturbed = sum(share >= 0.05 for share in shares)
    return f"{disturbed} of {len(shares)} turns began while other processes were at work: not to be quoted\n\n"


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['shape']['name']} shape, {result['threads']} threads, {result['llama_cpp']}, read bandwidth "
        f"{result['bandwidth_gb_s']:.1f} GB/s ({', '.join(f'{value:.1f}' for value in result['bandwidths_gb_s'])})",
        "",
        "| | bits | size MB | MB a token | prompt tokens/s | decode tokens/s | limit | share of bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        bits = "" if entry["bits"] is None else f"{entry['bits']:.2f}"
        start = f"| {entry['tool']} {entry['title']} | {bits} | {entry['bytes'] / 1e6:.0f} "
        if entry["decode_tokens_per_second"] is None:
            lines.append(f"{start}| {entry['failure']} | | | | |")
            continue
        lines.append(
            f"{start}| {entry['bytes_per_token'] / 1e6:.0f} | {entry['prefill_tokens_per_second']:.0f} "
            f"| {entry['decode_tokens_per_second']:.1f} | {entry['limit_tokens_per_second']:.0f} "
            f"| {100 * entry['bandwidth_share']:.0f} % |"
        )
    return "\n".join(lines)


def ratios(result: dict[str, Any]) -> str:
    """Ratios of the best turns, each with what was asked for."""
    rows = {entry["name"]: entry for entry in result["rows"] if entry["decode_tokens_per_second"] is not None}
    lines = ["| decode: ours / llama.cpp | ratio | goal | |", "|---|---|---|---|"]
    for ours, theirs, goal in DECODE_GOALS:
        if ours in rows and theirs in rows:
            ratio = rows[ours]["decode_tokens_per_second"] / rows[theirs]["decode_tokens_per_second"]
            lines.append(f"| {ours} / {theirs} | {ratio:.2f} | {goal:.2f} | {'yes' if ratio >= goal else 'no'} |")
    theirs = [entry for entry in rows.values() if entry["tool"] == "llama.cpp"]
    ours = [entry for entry in rows.values() if entry["tool"] != "llama.cpp"]
    if theirs and ours:
        fastest = max(theirs, key=lambda entry: entry["prefill_tokens_per_second"])
        lines += ["", f"| prompt: ours / {fastest['name']} | ratio | goal | share of peak |", "|---|---|---|---|"]
        for entry in ours:
            rate = entry["prefill_tokens_per_second"]
            peak = result["bf16_peak" if entry["name"] == "bf16" else "int8_peak"]
            share = "" if peak is None else f"{100 * rate * result['linear_weights'] / peak:.0f} %"
            ratio = rate / fastest["prefill_tokens_per_second"]
            lines.append(f"| {entry['name']} | {ratio:.2f} | {PREFILL_GOAL:.2f} | {share} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of decoded tokens a second; a line beside each marks what the bandwidth allows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [entry for entry in result["rows"] if entry["decode_tokens_per_second"] is not None]
    rows.sort(key=lambda entry: entry["bytes_per_token"])
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"llama.cpp": "#9aa3ad", "featherweight": "#1f6f8b"}
    for place, entry in enumerate(rows):
        rate, limit = entry["decode_tokens_per_second"], entry["limit_tokens_per_second"]
        axes.barh(place, rate, color=colours[entry["tool"]], height=0.7)
        axes.plot([limit, limit], [place - 0.42, place + 0.42], color="#c0392b", linewidth=2)
        axes.text(rate, place, f" {rate:.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{entry['tool']}  {entry['title']}" for entry in rows])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"tokens/s decoded, {result['shape']['name']} Llama shape, {result['threads']} threads "
        f"(red: limit at {result['bandwidth_gb_s']:.0f} GB/s)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="build llama.cpp in build/llama-cpp and end")
    parser.add_argument("--amx", action="store_true", help="with --setup: build/llama-cpp-amx, with AMX")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="1.1b")
    parser.add_argument("--types", default=",".join(TYPES), help="of llama.cpp, with commas between; empty: none")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of ours, with commas between; empty: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="within a turn, of which the best counts")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=8, help="tokens before the decoded ones")
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--idle", type=float, default=0.0, help="seconds to wait at most for idle processors")
    parser.add_argument("--engine", default="auto", help="of ours: auto, native or transformers")
    parser.add_argument("--kv-cache", default="auto", help="of ours: auto, float16 or int8")
    parser.add_argument("--peers-python", type=Path, default=ROOT / "build" / "llama-cpp" / "bin" / "python")
    parser.add_argument("--work", type=Path, default=ROOT / "bench-out", help="where models are made and kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def llama_version(python: Path) -> str:
    if not python.is_file():
        raise SystemExit(f"there is no {python}: make it with --setup, or name a Python with --peers-python")
    ask = "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"
    done = subprocess.run([str(python), "-c", ask], env=peer_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} cannot import llama_cpp: {why(done)}")
    return done.stdout.strip()


def main() -> None:
    options = arguments()
    if options.setup:
        set_up(ROOT / "build" / ("llama-cpp-amx" if options.amx else "llama-cpp"), options.amx)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    options.llama_version = llama_version(options.peers_python) if options.types else "none"
    result = run(options)
    print(table(result), others(result), sep="\n\n", end="")
    print(ratios(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
