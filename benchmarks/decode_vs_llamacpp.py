"""Tokens a second of our decoder and of llama.cpp on one synthetic Llama shape, beside the limit of the memory.

    python benchmarks/decode_vs_llamacpp.py --setup                    # once: llama.cpp, built here, in build/llama-cpp
    python benchmarks/decode_vs_llamacpp.py --shape 1.1b --json bench-out/decode.json --plot docs/decode.png

Random weights of the shape become GGUF files, quantised by llama.cpp itself, and folders of ours, made directly as
codes. What is compared runs in one heat: all its models are loaded, each in a process of its own, and take turns of 32
tokens, decoded one by one after a short context, in the first rounds also a prompt of 512 tokens from an empty cache.
A rate is the median over all turns; a ratio is the median over rounds of the ratio within a round (turns.py), with its
quartiles. Read bandwidth is measured between turns; the share of a turn is bytes per token (weights and cache) times
tokens a second, over the bandwidth around that turn; the limit is that bandwidth over the bytes. Where others use the
memory too, a turn can meet more bandwidth than the measurement beside it: see the quartiles.

llama.cpp keeps the output layer in Q6_K (F16 and Q8_0: as named); ours is uniform 6 bit g128 there (8 bit and bf16: as
named), and both are counted. A variant that crashes is reported as such. GCC 12 miscompiles llama.cpp's AMX path (it
drops the stores to the tile configuration, so Q4_0 and others end with a segmentation fault); `--setup` therefore
builds without AMX, and `--setup --amx` with it and a corrected intrinsic.

Threads of llama.cpp wait for each other in loops, so another busy process slows it many times over. `--idle` waits
before every heat until the processors have nothing else to do; what was still going on is written into the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from synthetic_folder import VARIANTS, shapes, write_folder
from turns import PEERS, Contestant, Server, clean_environment, ratios, run_heat, why

from featherweight.native.measure import bf16_peak, int8_peak
from featherweight.storage.checkpoint.size import measure_size
from featherweight.tasks.evaluate.speed import read_bandwidth

ROOT = Path(__file__).resolve().parent.parent
LLAMA_CPP = "0.3.36"
TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "TQ2_0", "TQ1_0")
BANDWIDTH_BYTES = 768 << 20  # read between turns

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

# GCC 12 takes the intrinsic for one that reads eight bytes and drops the stores to the others.
AMX_HEADER = """#include <immintrin.h>
#ifdef __AMX_TILE__
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
"""


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


def make_gguf(options: argparse.Namespace, files: dict[str, Path]) -> None:
    say("making GGUF files")
    shape = asdict(shapes.SHAPES[options.shape])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as stream:
        json.dump({"shape": shape, "files": {n: str(p) for n, p in files.items()}, "threads": options.threads}, stream)
        stream.flush()
        command = [str(options.peers_python), str(PEERS / "make_gguf.py"), stream.name]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the GGUF files were not made: {why(done.returncode, done.stderr)}")


def job(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("threads", "prompt", "context", "generate")} | more


def their_contestants(options: argparse.Namespace) -> list[Contestant]:
    """The GGUF files, made if need be."""
    wanted = [name for name in options.types.split(",") if name]
    if not wanted:
        return []
    files = {name: options.work / f"llama-{options.shape}-{name}.gguf" for name in dict.fromkeys(["F16", *wanted])}
    if not all(path.is_file() for path in files.values()):
        make_gguf(options, files)
    shape = shapes.SHAPES[options.shape]
    width = shape.hidden // shape.heads * shape.key_value_heads
    cache = 2 * 2 * shape.blocks * width  # bytes of a token's keys and values, fp16

    def contestant(name: str) -> Contestant:
        task = job(options, file=str(files[name]), cache_bytes=cache)
        start = lambda: Server(options.peers_python, "time_llama_cpp.py", task, clean_environment())  # noqa: E731
        return Contestant(name, "llama.cpp", name, files[name], start)

    return [contestant(name) for name in wanted]


def our_contestants(options: argparse.Namespace) -> list[Contestant]:
    def contestant(name: str) -> Contestant:
        folder = write_folder(options.work / f"{options.shape}-{name}", options.shape, name)
        task = job(options, folder=str(folder), engine=options.engine, kv_cache=options.kv_cache)
        start = lambda: Server(Path(sys.executable), "time_featherweight.py", task, dict(os.environ))  # noqa: E731
        about = {"bits": measure_size(folder).linear_bits}
        return Contestant(name, "featherweight", VARIANTS[name].title, folder, start, about)

    return [contestant(name) for name in options.variants.split(",") if name]


def heats(theirs: list[Contestant], ours: list[Contestant]) -> list[list[Contestant]]:
    """What is compared with each other, together: ours that have the same rivals, with these between them."""
    rivals = {one.name: tuple(name for who, name, _ in DECODE_GOALS if who == one.name) for one in ours}
    found = []
    for names in dict.fromkeys(rivals.values()):
        group = [one for one in ours if rivals[one.name] == names]
        others = [one for one in theirs if one.name in names]
        found.append([one for i in range(max(len(group), len(others))) for one in group[i : i + 1] + others[i : i + 1]])
    alone = [one for one in theirs if not any(one in heat for heat in found)]
    return [*found, *([alone] if alone else [])]


def run(options: argparse.Namespace) -> dict[str, Any]:
    theirs, ours = their_contestants(options), our_contestants(options)
    measured: list[float] = []

    def bandwidth() -> float:
        measured.append(read_bandwidth(size=BANDWIDTH_BYTES, threads=options.threads))
        return measured[-1]

    busy = []
    for number, heat in enumerate(heats(theirs, ours)):
        busy.append(wait_until_idle(options.idle))
        run_heat(number, heat, options.rounds, options.prompts, bandwidth, say)
    return report(options, theirs, ours, measured, busy)


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


def report(
    options: argparse.Namespace,
    theirs: list[Contestant],
    ours: list[Contestant],
    bandwidth: list[float],
    busy: list[float | None],
) -> dict[str, Any]:
    shape = shapes.SHAPES[options.shape]
    linear = sum(dims[0] * dims[1] for name, dims in shapes.tensors(shape) if ".layers." in name and len(dims) > 1)
    low, middle, high = quartiles(bandwidth)
    return {
        "shape": {"name": options.shape, **asdict(shape)},
        "linear_weights": linear,
        **{key: getattr(options, key) for key in ("threads", "prompt", "context", "generate", "rounds", "prompts")},
        "bandwidth_gb_s": middle / 1e9,
        "bandwidth_quartiles_gb_s": [low / 1e9, high / 1e9],
        "bandwidths_gb_s": [value / 1e9 for value in bandwidth],
        "int8_peak": int8_peak(options.threads),
        "bf16_peak": bf16_peak(options.threads),
        "llama_cpp": options.llama_version,
        "busy_before": busy,
        "rows": [row(contestant, options) for contestant in [*theirs, *ours]],
        "decode_ratios": decode_ratios(theirs, ours),
        "prompt_ratios": prompt_ratios(theirs, ours),
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def row(contestant: Contestant, options: argparse.Namespace) -> dict[str, Any]:
    path, read = contestant.path, contestant.about.get("bytes_per_token")
    decode = [turn for turn in contestant.turns if turn.request == "decode"]
    shares = [options.generate / turn.seconds * read / turn.bandwidth for turn in decode] if read else []
    outside = [turn.outside / turn.seconds for turn in decode if turn.outside is not None]
    return {
        "name": contestant.name,
        "tool": contestant.tool,
        "title": contestant.title,
        "bits": contestant.about.get("bits"),
        "bytes": path.stat().st_size if path.is_file() else measure_size(path).bytes,
        "bytes_per_token": read,
        "decode_tokens_per_second": contestant.median("decode", options.generate),
        "prefill_tokens_per_second": contestant.median("prompt", options.prompt),
        "limit_tokens_per_second": statistics.median(t.bandwidth for t in decode) / read if decode and read else None,
        "bandwidth_share": quartiles(shares) if shares else None,
        "outside_kernels_share": statistics.median(outside) if outside else None,
        "load_seconds": contestant.about.get("load_seconds"),
        "failure": contestant.failure,
        "turns": [asdict(turn) for turn in contestant.turns],
    }


def decode_ratios(theirs: list[Contestant], ours: list[Contestant]) -> list[dict[str, Any]]:
    """Every pair with a goal that ran in one heat."""
    named = {one.name: one for one in [*theirs, *ours]}
    found = []
    for us, them, goal in DECODE_GOALS:
        values = ratios(named[us], named[them], "decode") if us in named and them in named else []
        if values:
            entry = {"ours": us, "theirs": them, "goal": goal}
            found.append(entry | {"quartiles": quartiles(values), "rounds": len(values)})
    return found


def prompt_ratios(theirs: list[Contestant], ours: list[Contestant]) -> list[dict[str, Any]]:
    """Against the fastest of their types. Prompts are bound by arithmetic, which is steady: any two turns compare."""
    rates = {one.name: one.median("prompt", 1) for one in [*theirs, *ours]}
    fastest = max((one.name for one in theirs if rates[one.name]), key=lambda name: rates[name] or 0.0, default=None)
    if fastest is None:
        return []
    pairs = [(one.name, (rates[one.name] or 0.0) / (rates[fastest] or 1.0)) for one in ours if rates[one.name]]
    return [{"ours": name, "theirs": fastest, "goal": PREFILL_GOAL, "ratio": ratio} for name, ratio in pairs]


def others(result: dict[str, Any]) -> str:
    """A warning where other processes were at work."""
    disturbed = sum((share or 0.0) >= 0.05 for share in result["busy_before"])
    if not disturbed:
        return ""
    return (
        f"{disturbed} of {len(result['busy_before'])} heats began while other processes were at work: "
        "not to be quoted\n\n"
    )


def table(result: dict[str, Any]) -> str:
    low, high = result["bandwidth_quartiles_gb_s"]
    lines = [
        f"{result['shape']['name']} shape, {result['threads']} threads, {result['llama_cpp']}, read bandwidth between "
        f"turns {result['bandwidth_gb_s']:.1f} GB/s (quartiles {low:.1f} and {high:.1f})",
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
        prompt = entry["prefill_tokens_per_second"]
        share = [100 * value for value in entry["bandwidth_share"]]
        lines.append(
            f"{start}| {entry['bytes_per_token'] / 1e6:.0f} | {'' if prompt is None else f'{prompt:.0f}'} "
            f"| {entry['decode_tokens_per_second']:.1f} | {entry['limit_tokens_per_second']:.0f} "
            f"| {share[1]:.0f} % ({share[0]:.0f} to {share[2]:.0f}) |"
        )
    return "\n".join(lines)


def goals(result: dict[str, Any]) -> str:
    """Medians of the ratios, each with its quartiles and what was asked for."""
    lines = ["| decode: ours / llama.cpp | ratio | quartiles | goal | |", "|---|---|---|---|---|"]
    for entry in result["decode_ratios"]:
        low, middle, high = entry["quartiles"]
        met = "yes" if middle >= entry["goal"] else "no"
        pair = f"{entry['ours']} / {entry['theirs']}"
        lines.append(f"| {pair} | {middle:.2f} | {low:.2f} to {high:.2f} | {entry['goal']:.2f} | {met} |")
    if result["prompt_ratios"]:
        fastest = result["prompt_ratios"][0]["theirs"]
        lines += ["", f"| prompt: ours / {fastest} | ratio | goal | share of peak |", "|---|---|---|---|"]
    rates = {entry["name"]: entry["prefill_tokens_per_second"] for entry in result["rows"]}
    for entry in result["prompt_ratios"]:
        peak = result["bf16_peak" if entry["ours"] == "bf16" else "int8_peak"]
        share = "" if peak is None else f"{100 * rates[entry['ours']] * result['linear_weights'] / peak:.0f} %"
        lines.append(f"| {entry['ours']} | {entry['ratio']:.2f} | {entry['goal']:.2f} | {share} |")
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
        # Inside of the bar: right of it the line of the limit may stand.
        axes.text(rate, place, f"{rate:.0f} ", va="center", ha="right", fontsize=9, color="white", weight="bold")
    axes.set_yticks(range(len(rows)), [f"{entry['tool']}  {entry['title']}" for entry in rows])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"tokens/s decoded, {result['shape']['name']} Llama shape, {result['threads']} threads\n"
        f"red: what the bandwidth around its turns allows"
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
    parser.add_argument("--rounds", type=int, default=12, help="of a heat, each a turn of all its models")
    parser.add_argument("--prompts", type=int, default=3, help="rounds with a prompt as well")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=8, help="tokens before the decoded ones")
    parser.add_argument("--generate", type=int, default=32, help="tokens of a turn")
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
    done = subprocess.run([str(python), "-c", ask], env=clean_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} cannot import llama_cpp: {why(done.returncode, done.stderr)}")
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
    print(goals(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
