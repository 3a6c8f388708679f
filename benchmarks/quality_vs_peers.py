"""Perplexity of one model compressed by other tools and by ours: same text, same protocol, same calibration tokens.

    python benchmarks/quality_vs_peers.py --setup                       # once: the peers' environment in build/peers
    python benchmarks/quality_vs_peers.py --recipes gptq,trit-2 --json bench-out/quality_vs_peers.json

Only the linear layers inside the blocks differ between rows. A peer runs in its own environment, gives back the weights
decoded from what it stores, and `featherweight.evaluate` measures them in float32 like the original and like ours.
Bits are those of everything stored for these layers (codes, scales, zero points, padding) over their weights. `excess`
is perplexity over that of the original, minus 1. Seconds are a peer's quantising alone (llm-compressor: with
calibration), ours from `feather compress`. Scripts of the peers are in benchmarks/peers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import load_recipe
from featherweight.model.text.windows import windows as calibration_windows
from featherweight.tasks.evaluate.evaluation import Evaluation, evaluate

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"
FEATHER_OPTIONS = (
    "--seed {seed} --set calibration.seed={seed}"
    " --set calibration.sequences={sequences} --set calibration.length={length}"
)
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Peer:
    """A tool, the script that runs it, the module that must import, and the variants that use calibration or not."""

    name: str
    script: str
    module: str
    calibrated: tuple[str, ...] = ()
    data_free: tuple[str, ...] = ()


TOOLS = (
    Peer(
        "llama.cpp",
        "quantize_llama_cpp.py",
        "llama_cpp",
        ("Q4_K_M", "Q3_K_M", "Q3_K_S", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_XS", "IQ2_XXS", "TQ1_0"),
        ("Q4_K_M-plain", "Q3_K_M-plain", "Q3_K_S-plain"),
    ),
    Peer(
        "llm-compressor",
        "quantize_llm_compressor.py",
        "llmcompressor",
        ("gptq-w4-g128", "gptq-w3-g128", "gptq-w4-g128-asym", "gptq-w3-g128-asym", "awq-w4-g128-asym"),
    ),
    Peer("hqq", "quantize_hqq.py", "hqq", (), ("4bit-g128", "3bit-g128", "4bit-g64", "3bit-g64", "3bit-g64-axis0")),
)


@dataclass(frozen=True)
class Row:
    """One measured model. `seed` is that of the calibration windows, None for a data-free method."""

    name: str
    tool: str
    version: str
    bits: float | None
    perplexity: float
    excess: float
    excess_standard_error: float | None
    kl: float | None
    seconds: float
    seed: int | None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def mean_squares(model: Any, windows: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """float32 [in] by weight name: the mean square of every input column of the linear layers inside the blocks."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].square().flatten(0, -2).sum(0).double()

        return add

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    hooks = [module.register_forward_pre_hook(watch(f"{name}.weight")) for name, module in layers.items()]
    try:
        with torch.inference_mode():
            for first in range(0, len(windows), batch):
                model.model(input_ids=windows[first : first + batch], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


class Remembered(torch.nn.Module):
    """A causal language model that remembers its logits by input: the original, run once for all rows' divergence."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.known: dict[bytes, Any] = {}

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self.known[key]


def copy_side_files(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (model / name).is_file():
            shutil.copy(model / name, folder / name)
    config = json.loads((model / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_original(model: Path, folder: Path) -> None:
    """The model as a float32 folder, which every peer can read."""
    copy_side_files(model, folder)
    tensors = {n: t.float() for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass
class Bench:
    """What all rows share: the original, its tokenizer, the calibration windows by seed, a folder to work in."""

    model: Path
    work: Path
    options: argparse.Namespace
    original: Any = None
    tokenizer: Any = None
    made: set[int] = field(default_factory=set)

    def prepare(self) -> None:
        write_original(self.model, self.work / "original")
        model, self.tokenizer = featherweight.load(self.model, dtype="float32")
        self.original = Remembered(model)

    def calibration(self, seed: int) -> tuple[Path, Path]:
        """Files of the windows and of their mean squares, made at the first need.

        The windows are those that `feather compress` takes with the same calibration settings.
        """
        files = self.work / f"windows-{seed}.safetensors", self.work / f"squares-{seed}.safetensors"
        if seed not in self.made:
            options = self.options
            settings = CalibrationSettings(sequences=options.sequences, length=options.length, seed=seed)
            windows = calibration_windows(self.tokenizer, options.calibration, settings)
            save_file({"input_ids": windows}, files[0])
            save_file(mean_squares(self.original.model, windows), files[1])
            self.made.add(seed)
        return files

    def measure(self, folder: Path) -> Evaluation:
        return evaluate(folder, (self.original, self.tokenizer), **self.protocol())

    def protocol(self) -> dict[str, Any]:
        """How everything is measured, as options of `evaluate`."""
        return {name: getattr(self.options, name) for name in ("text", "protocol", "context", "limit")}

    def row(self, folder: Path, seed: int | None, **facts: Any) -> Row:
        found = self.measure(folder)
        assert found.log_ratio is not None
        bits = facts.pop("bits", None) or (None if found.size is None else found.size.linear_bits)
        error = found.log_ratio_standard_error
        return Row(
            bits=bits,
            perplexity=found.perplexity,
            excess=math.expm1(found.log_ratio),
            excess_standard_error=None if error is None else error * math.exp(found.log_ratio),
            kl=None if found.divergence is None else found.divergence.mean,
            seed=seed,
            **facts,
        )


def peer_rows(bench: Bench, peer: Peer, python: Path, seed: int | None) -> Iterator[Row]:
    """The wanted variants of a peer that calibrate on the windows of `seed`, or for None the data-free ones."""
    wanted = bench.options.peers.split(",")
    variants = peer.data_free if seed is None else peer.calibrated
    chosen = [v for v in variants if not {"all", peer.name, v}.isdisjoint(wanted)]
    if chosen:
        yield from _run_peer(bench, peer, python, chosen, seed)


def _run_peer(bench: Bench, peer: Peer, python: Path, variants: list[str], seed: int | None) -> Iterator[Row]:
    windows, squares = bench.calibration(bench.options.seeds[0] if seed is None else seed)
    out = bench.work / f"{peer.name}-{seed}"
    out.mkdir(exist_ok=True)
    job = {
        "model": str(bench.work / "original"),
        "out": str(out),
        "variants": variants,
        "calibration": str(windows),
        "squares": str(squares),
        "threads": bench.options.threads,
    }
    (out / "job.json").write_text(json.dumps(job))
    command = [str(python), str(PEERS / peer.script), str(out / "job.json")]
    done = subprocess.run(command, env=peer_environment(), cwd=out, capture_output=True, text=True)
    (bench.work / f"{out.name}.log").write_text(done.stdout + done.stderr)
    for variant in variants:
        folder = out / variant
        report = json.loads((folder / "peer.json").read_text()) if (folder / "peer.json").is_file() else {}
        if "bits" not in report:
            reason = report.get("error") or f"its script ended with {done.returncode}: {last_line(done.stderr)}"
            say(f"{peer.name} {variant}: left out, {reason}")
            continue
        copy_side_files(bench.model, folder)
        version = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        facts = {key: report[key] for key in ("bits", "seconds", "note", "details")}
        yield bench.row(folder, seed, name=variant, tool=peer.name, version=version, **facts)
        shutil.rmtree(folder)
    shutil.rmtree(out)


def our_rows(bench: Bench, recipe: str) -> Iterator[Row]:
    """One of our recipes by `feather compress`, for each seed if it calibrates and else once."""
    name, options = Path(recipe).stem, bench.options
    for seed in options.seeds if load_recipe(recipe).calibrated else (None,):
        folder = bench.work / f"ours-{seed}"
        values = {**vars(options), "seed": options.seeds[0] if seed is None else seed}
        command = [sys.executable, "-m", "featherweight.cli.main", "compress", str(bench.model), "--recipe", recipe]
        command += ["--out", str(folder), "--threads", str(options.threads)]
        command += [part.format(**values) for part in shlex.split(options.feather_options)]
        if options.calibration is not None:
            command += ["--calibration", str(options.calibration)]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        (bench.work / f"ours-{name}-{seed}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            say(f"featherweight {name}: left out, {last_line(done.stderr)}")
            return
        version = f"featherweight {featherweight.__version__}"
        yield bench.row(folder, seed, name=name, tool="featherweight", version=version, seconds=seconds)
        shutil.rmtree(folder)


def peer_environment() -> dict[str, str]:
    """Nothing of ours, and no hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def set_up(folder: Path) -> None:
    """A virtual environment with the peers. Compiles llama.cpp."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", **os.environ}
    subprocess.run([python, "-m", "pip", "install", "-r", str(PEERS / "requirements.txt")], env=environment, check=True)


def available(peer: Peer, python: Path) -> str | None:
    """None if the peer can be used, else why not."""
    if not python.is_file():
        return f"there is no {python} (make it with --setup, or name one with --peers-python)"
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module!r}) is None)"
    if subprocess.run([str(python), "-c", find], env=peer_environment()).returncode:
        return f"{python} has no module {peer.module} (install benchmarks/peers/requirements.txt)"
    return None


def markdown(rows: list[Row], perplexity: float) -> str:
    """Rows of one method with several seeds become one line: mean, and half the range as its spread."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.tool, row.name), []).append(row)
    lines = [
        f"Original: perplexity {perplexity:.3f}",
        "",
        "| method | bits | perplexity | excess % | ± over seeds | KL | seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (tool, name), group in sorted(groups.items(), key=lambda item: -(item[1][0].bits or 0)):
        excess = [100 * row.excess for row in group]
        mean = {
            key: statistics.fmean(getattr(row, key) or 0 for row in group) for key in ("perplexity", "kl", "seconds")
        }
        spread = f"{(max(excess) - min(excess)) / 2:.2f}" if len(group) > 1 else ""
        bits = "" if group[0].bits is None else f"{group[0].bits:.3f}"
        seeds = ", ".join(str(row.seed) for row in group if row.seed is not None)
        lines.append(
            f"| {tool} {name} | {bits} | {mean['perplexity']:.3f} | {statistics.fmean(excess):.2f} | {spread} "
            f"| {mean['kl']:.4f} | {mean['seconds']:.1f} | {seeds} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE, help="a Llama folder (default: the bundled model)")
    parser.add_argument("--peers", default="all", help="comma-separated: all, none, a tool, or variants such as Q3_K_M")
    parser.add_argument("--recipes", default="", help="comma-separated presets or recipe files of ours")
    parser.add_argument(
        "--feather-options", default=FEATHER_OPTIONS, help="for `feather compress`; {seed} etc. are filled in"
    )
    parser.add_argument("--peers-python", type=Path, default=ROOT / "build" / "peers" / "bin" / "python")
    parser.add_argument("--setup", action="store_true", help="make the peers' environment in build/peers and end")
    parser.add_argument("--calibration", type=Path, help="text (default: the bundled one)")
    parser.add_argument("--calibration-seed", dest="seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--text", type=Path, help="to measure on (default: the bundled one)")
    parser.add_argument("--protocol", default="own")
    parser.add_argument("--context", type=int)
    parser.add_argument(
        "--limit", type=int, default=40960, help="first tokens of the text (default: as in `feather demo`); 0: all"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for intermediate files and logs (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.limit = options.limit or None
    options.peers_python = options.peers_python.absolute()  # peers run in folders of their own
    return options


def report(bench: Bench, rows: list[Row], original: Evaluation) -> dict[str, Any]:
    setting = {key: getattr(bench.options, key) for key in ("seeds", "sequences", "length", "threads")}
    return {
        "model": bench.model.name,
        "original_perplexity": original.perplexity,
        "protocol": original.description,
        "text_sha256": original.setting.text_sha256,
        "calibration": setting,
        "rows": [asdict(row) for row in rows],
    }


def run(bench: Bench) -> None:
    options = bench.options
    torch.set_num_threads(options.threads)
    bench.prepare()
    original = evaluate((bench.original, bench.tokenizer), **bench.protocol())
    rows: list[Row] = []
    usable: list[Peer] = []
    for peer in TOOLS if options.peers != "none" else ():
        missing = available(peer, options.peers_python)
        if missing is None:
            usable.append(peer)
        else:
            say(f"{peer.name}: left out, {missing}")
    order = (options.seeds[0], None, *options.seeds[1:])
    sources = [peer_rows(bench, peer, options.peers_python, seed) for seed in order for peer in usable]
    sources += [our_rows(bench, recipe) for recipe in options.recipes.split(",") if recipe]
    for source in sources:
        for row in source:
            rows.append(row)
            seed = "" if row.seed is None else f", seed {row.seed}"
            say(f"{row.tool} {row.name}: {row.bits or 0:.3f} bits, excess {row.excess:.2%}{seed}")
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(report(bench, rows, original), indent=2) + "\n")
    print(original.description)
    print(markdown(rows, original.perplexity))


def main() -> None:
    options = arguments()
    if options.setup:
        set_up(ROOT / "build" / "peers")
        return
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        run(Bench(options.model.resolve(), options.work.resolve(), options))
        return
    with tempfile.TemporaryDirectory() as work:
        run(Bench(options.model.resolve(), Path(work), options))


if __name__ == "__main__":
    main()
