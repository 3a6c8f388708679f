"""Perplexity of one model compressed by other tools and by ours: same text, same protocol, same calibration tokens.

    python benchmarks/quality_vs_peers.py --setup                  # once: the peers' environments, in build/peers*
    python benchmarks/quality_vs_peers.py --recipes gptq trit-2 --json bench-out/quality_vs_peers.json
    python benchmarks/quality_vs_peers.py --peers none --append --json bench-out/quality_vs_peers.json \\
        --recipes "gptq --set embedding=6bit"                      # more rows for the same file
    python benchmarks/quality_vs_peers.py --render bench-out/quality_vs_peers.json --plot peers.svg   # runs nothing

A pretrained model (real_model.py makes the folder, scripts/split_text.py the texts):

    python benchmarks/quality_vs_peers.py --model FOLDER --calibration calibration.txt --text heldout.txt \\
        --limit 20480 --context 2048 --calibration-seed 0 --json bench-out/peers.json --plot bench-out/peers.svg

Every row has the bits of the linear layers inside the blocks (codes, scales, zero points, padding over their weights)
and the bytes of the whole weight file as a user has it, and is measured as that file has it: with the embedding as
compressed as the tool leaves it. `--scope linears` or `both` puts the original's embedding back, in predictions and in
size. A peer runs in an environment of its own and gives back the weights decoded from what it stores;
`featherweight.evaluate` measures them in float32 like the original and like ours. `excess` is perplexity over that of
the original, minus 1. Seconds are a peer's quantising alone (with calibration where it does its own), ours from
`feather compress`. Scripts of the peers are in benchmarks/peers.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peer_original import EMBEDDINGS, Original, Remembered, copy_side_files, mean_squares, write_original
from peer_report import COMPRESSED, KEPT, OURS, PUT_BACK, Report, Row, markdown, write_plots
from peer_tools import PEERS, TOOLS, Peer, available, peer_environment, set_up
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import load_recipe
from featherweight.model.text.windows import windows as calibration_windows
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.size import OriginalView, measure_size
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.result import Evaluation

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"
FEATHER_OPTIONS = (
    "--seed {seed} --set calibration.seed={seed}"
    " --set calibration.sequences={sequences} --set calibration.length={length}"
)


@dataclass
class Bench:
    """What all rows share: the original, its tokenizer, the calibration windows by seed, a folder to work in."""

    model: Path
    work: Path
    options: argparse.Namespace
    original: Any = None
    tokenizer: Any = None
    facts: Original = Original(0, 0, 0, False)
    windows: dict[int, Tensor] = field(default_factory=dict)
    report: Report = field(default_factory=lambda: Report({}))

    def lacks(self, tool: str, name: str, seed: int | None) -> bool:
        return not self.report.has(tool, name, seed, self.options.scope)

    def fail(self, tool: str, name: str, seed: int | None, reason: str) -> None:
        say(f"{tool} {name}: left out, {reason}")
        self.report.fail(tool, name, seed, reason)
        self.save()

    def save(self) -> None:
        if self.options.json:
            self.report.write(self.options.json)

    def prepare(self) -> None:
        self.facts = write_original(self.model, self.work / "original")
        model, self.tokenizer = featherweight.load(self.model, dtype="float32")
        self.original = Remembered(model)

    def calibration(self, seed: int, squares: bool) -> tuple[Path, Path]:
        """Files of the windows and, if they are asked for, of their mean squares; made at the first need, and taken
        from the work folder if it has those of the same windows.

        The windows are those that `feather compress` takes with the same calibration settings.
        """
        files = self.work / f"windows-{seed}.safetensors", self.work / f"squares-{seed}.safetensors"
        if seed not in self.windows:
            options = self.options
            settings = CalibrationSettings(sequences=options.sequences, length=options.length, seed=seed)
            self.windows[seed] = calibration_windows(self.tokenizer, options.calibration, settings)
            if not files[0].is_file() or not torch.equal(load_file(files[0])["input_ids"], self.windows[seed]):
                files[1].unlink(missing_ok=True)
                save_file({"input_ids": self.windows[seed]}, files[0])
        if squares and not files[1].is_file():
            save_file(mean_squares(self.original.model, self.windows[seed]), files[1])
        return files

    def protocol(self) -> dict[str, Any]:
        """How everything is measured, as options of `evaluate`."""
        return {name: getattr(self.options, name) for name in ("text", "protocol", "context", "limit")}

    def rows(self, folder: Path, seed: int | None, size: Stored, **facts: Any) -> Iterator[Row]:
        """Of the model in `folder`: as its file has it, with the original's embedding, or both, as `--scope` says."""
        model, tokenizer = featherweight.load(folder, dtype="float32")
        compressed = size.embedding_bytes is not None
        if self.options.scope != "linears" or not compressed:
            yield self._row(model, tokenizer, COMPRESSED if compressed else KEPT, seed, size, **facts)
        if self.options.scope != "file" and compressed:
            original = self.original.model
            model.set_input_embeddings(original.get_input_embeddings())
            model.set_output_embeddings(original.get_output_embeddings())
            yield self._row(model, tokenizer, PUT_BACK, seed, size, **facts)

    def _row(self, model: Any, tokenizer: Any, embedding: str, seed: int | None, size: Stored, **facts: Any) -> Row:
        found = evaluate((model, tokenizer), (self.original, self.tokenizer), **self.protocol())
        assert found.log_ratio is not None
        error, kept = found.log_ratio_standard_error, self.facts.embedding_bytes
        stored = kept if size.embedding_bytes is None else size.embedding_bytes
        file_bytes = size.file_bytes
        if embedding == PUT_BACK:
            file_bytes, stored = file_bytes - stored + kept, kept
        return Row(
            bits=size.bits,
            embedding=embedding,
            embedding_bits=8 * stored / self.facts.embedding_weights,
            file_bytes=file_bytes,
            perplexity=found.perplexity,
            excess=math.expm1(min(found.log_ratio, 700.0)),
            excess_standard_error=None if error is None else error * math.exp(min(found.log_ratio, 700.0)),
            kl=None if found.divergence is None else found.divergence.mean,
            top1_agreement=None if found.divergence is None else found.divergence.top1_agreement,
            seed=seed,
            **facts,
        )


@dataclass(frozen=True)
class Stored:
    """Sizes of a compressed model: bits of the linear layers, bytes of embedding and output layer together (None if
    they are the original's) and of the weight file."""

    bits: float | None
    embedding_bytes: int | None
    file_bytes: int

    @classmethod
    def of_ours(cls, folder: Path) -> Stored:
        size = measure_size(folder)
        with Checkpoint.open(folder) as checkpoint:
            view = OriginalView(checkpoint)
            names = [name for name in EMBEDDINGS if name in view.names]
            changed = bool(view.compressed & set(names))
            return cls(size.linear_bits, sum(map(view.stored_bytes, names)) if changed else None, size.bytes)


def peer_rows(bench: Bench, peer: Peer, seed: int | None) -> Iterator[Row]:
    """The wanted variants of a peer that calibrate on the windows of `seed`, or for None the data-free ones."""
    wanted = bench.options.peers.split(",")
    for variant in peer.data_free if seed is None else peer.calibrated:
        if not {"all", peer.name, variant}.isdisjoint(wanted) and bench.lacks(peer.name, variant, seed):
            yield from _run_peer(bench, peer, variant, seed)


def _run_peer(bench: Bench, peer: Peer, variant: str, seed: int | None) -> Iterator[Row]:
    windows, squares = bench.calibration(bench.options.seeds[0] if seed is None else seed, peer.squares)
    out = bench.work / f"{peer.name}-{variant}-{seed}"
    out.mkdir(exist_ok=True)
    job = {
        "model": str(bench.work / "original"),
        "out": str(out),
        "variants": [variant],
        "calibration": str(windows),
        "squares": str(squares),
        "threads": bench.options.threads,
        "kept_bytes": bench.facts.kept_bytes,
    }
    (out / "job.json").write_text(json.dumps(job))
    command = [str(peer.python(bench.options)), str(PEERS / peer.script), str(out / "job.json")]
    done = subprocess.run(command, env=peer_environment(), cwd=out, capture_output=True, text=True)
    (bench.work / f"{out.name}.log").write_text(done.stdout + done.stderr)
    folder = out / variant
    report = json.loads((folder / "peer.json").read_text()) if (folder / "peer.json").is_file() else {}
    if "bits" in report:
        copy_side_files(bench.model, folder)
        version = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        facts = {key: report[key] for key in ("seconds", "note", "details")}
        bits = report["embedding_bits"]
        embedding = None if bits is None else round(bits * bench.facts.embedding_weights / 8)
        size = Stored(report["bits"], embedding, report["file_bytes"])
        yield from bench.rows(folder, seed, size, name=variant, tool=peer.name, version=version, **facts)
    else:
        reason = report.get("error") or f"its script ended with {done.returncode}: {last_line(done.stderr)}"
        bench.fail(peer.name, variant, seed, reason)
    shutil.rmtree(out)


def our_rows(bench: Bench, words: list[str]) -> Iterator[Row]:
    """One of our recipes, with options of its own, by `feather compress`: for each seed if it calibrates, else once."""
    options, recipe = bench.options, words[0]
    name = " ".join([Path(recipe).stem, *(word for word in words[1:] if word != "--set")])
    for seed in options.seeds if load_recipe(recipe).calibrated else (None,):
        if not bench.lacks(OURS, name, seed):
            continue
        folder = bench.work / f"ours-{seed}"
        values = {**vars(options), "seed": options.seeds[0] if seed is None else seed}
        command = [sys.executable, "-m", "featherweight.cli.main", "compress", str(bench.model), "--recipe", recipe]
        command += ["--out", str(folder), "--threads", str(options.threads)]
        command += [part.format(**values) for part in shlex.split(options.feather_options)] + words[1:]
        if options.calibration is not None:
            command += ["--calibration", str(options.calibration)]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        (bench.work / f"ours-{name.replace('/', '-')}-{seed}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            bench.fail(OURS, name, seed, last_line(done.stderr))
            return
        yield from _our_folder(bench, folder, name, seed, seconds)
        shutil.rmtree(folder)


def _our_folder(bench: Bench, folder: Path, name: str, seed: int | None, seconds: float | None) -> Iterator[Row]:
    facts = {"name": name, "tool": OURS, "version": f"featherweight {featherweight.__version__}", "seconds": seconds}
    yield from bench.rows(folder, seed, Stored.of_ours(folder), **facts)


def finished_rows(bench: Bench, named: str) -> Iterator[Row]:
    """NAME=FOLDER: what `feather compress` has made before."""
    name, _, folder = named.rpartition("=")
    if not name or not Path(folder).is_dir():
        raise SystemExit(
            f"--folders {named}: expected NAME=FOLDER, a name for the row and an output of feather compress"
        )
    if bench.lacks(OURS, name, bench.options.seeds[0]):
        yield from _our_folder(bench, Path(folder), name, bench.options.seeds[0], None)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE, help="a Llama folder (default: the bundled model)")
    parser.add_argument("--peers", default="all", help="comma-separated: all, none, a tool, or variants such as Q3_K_M")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=[],
        help="presets or recipe files of ours, comma-separated or each an argument; one in quotes may have options of "
        "`feather compress`: 'gptq --set embedding=6bit'",
    )
    parser.add_argument(
        "--folders", nargs="+", default=[], metavar="NAME=FOLDER", help="outputs of feather compress to measure as rows"
    )
    parser.add_argument(
        "--scope",
        choices=("file", "linears", "both"),
        default="file",
        help="measure the file as it is (default), with the original's embedding put back, or both",
    )
    parser.add_argument(
        "--feather-options", default=FEATHER_OPTIONS, help="for `feather compress`; {seed} etc. are filled in"
    )
    parser.add_argument("--peers-python", type=Path, default=ROOT / "build" / "peers" / "bin" / "python")
    parser.add_argument("--setup", action="store_true", help="make the peers' environments in build/peers* and end")
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
    parser.add_argument("--json", type=Path, help="written after every row")
    parser.add_argument("--append", action="store_true", help="keep what is in the JSON and run only what it lacks")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="and FILE-narrow.svg, for narrow screens")
    parser.add_argument("--render", type=Path, metavar="JSON", help="table and plot from a JSON; runs nothing")
    options = parser.parse_args()
    options.limit = options.limit or None
    options.recipes = [words for given in options.recipes for words in recipe_words(given)]
    if options.append and options.json is None:
        parser.error("--append needs --json FILE, the file to add rows to")
    options.peers_python = options.peers_python.absolute()  # peers run in folders of their own
    return options


def recipe_words(given: str) -> list[list[str]]:
    """Recipes of one argument with their options: several without options are comma-separated."""
    words = shlex.split(given)
    return [words] if len(words) > 1 else [[name] for name in given.split(",") if name]


def setting_of(bench: Bench, original: Evaluation) -> dict[str, Any]:
    calibration = {key: getattr(bench.options, key) for key in ("sequences", "length", "threads")}
    return {
        "model": bench.model.name,
        "original_perplexity": original.perplexity,
        "protocol": original.description,
        "text_sha256": original.setting.text_sha256,
        "calibration": calibration,
        "four_bit_grid": bench.facts.four_bit_grid,
    }


def begun_report(bench: Bench, setting: dict[str, Any]) -> Report:
    """A new one, or that of --append if it was made the same way."""
    path = bench.options.json
    if not bench.options.append or not path.is_file():
        return Report(setting)
    found = Report.read(path)
    for key in ("model", "protocol", "calibration"):
        if found.setting.get(key) != setting[key]:
            raise SystemExit(
                f"{path} has rows of another {key} ({found.setting.get(key)}, here {setting[key]}): write to another "
                "file"
            )
    return Report(setting, found.rows, found.failures)


def run(bench: Bench) -> None:
    options = bench.options
    torch.set_num_threads(options.threads)
    bench.prepare()
    original = evaluate((bench.original, bench.tokenizer), **bench.protocol())
    bench.report = begun_report(bench, setting_of(bench, original))
    usable: list[Peer] = []
    for peer in TOOLS if options.peers != "none" else ():
        missing = available(peer, peer.python(options))
        if missing is None:
            usable.append(peer)
        else:
            say(f"{peer.name}: left out, {missing}")
    order = (options.seeds[0], None, *options.seeds[1:])
    sources = [finished_rows(bench, named) for named in options.folders]
    sources += [peer_rows(bench, peer, seed) for seed in order for peer in usable]
    sources += [our_rows(bench, words) for words in options.recipes]
    for source in sources:
        for row in source:
            bench.report.add(row)
            bench.save()
            seed = "" if row.seed is None else f", seed {row.seed}"
            size = f"{row.bits or 0:.3f} bits, {(row.file_bytes or 0) / 1e6:.1f} MB"
            say(f"{row.label}: {size}, excess {row.excess:.2%}, KL {row.kl:.4f}{seed}")
    show(bench.report, options.plot)


def show(report: Report, plot: Path | None) -> None:
    print(markdown(report))
    for written in write_plots(report, plot) if plot is not None else ():
        say(f"{written} written")


def main() -> None:
    options = arguments()
    if options.render is not None:
        show(Report.read(options.render), options.plot)
        return
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
