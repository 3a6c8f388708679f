"""Factorised layers against each other at equal bytes: ROCKET, its control with equal shares, truncated SVDs.

    python benchmarks/factorisation.py --model src/featherweight/assets/reference --removed 0.2 0.3 0.4 0.5 \\
        --seeds 0 1 2 --json bench-out/factorisation.jsonl
    python benchmarks/factorisation.py --render bench-out/factorisation.jsonl     # the table again, runs nothing

Every run is a `compress` into a folder that is removed once it is evaluated against the original, in one process; one
line of JSON a run, and runs whose line is there are not made again. A seed chooses windows of calibration text, whose
statistics all methods share. Excess is perplexity over the original's, minus 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from seeds import spread

from featherweight import FeatherError, compress
from featherweight.events import silent
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.evaluate.evaluation import evaluate_each

METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "svd": ("svd", ()),
    "svd-llm": ("svd-llm", ()),
    "svd-llm, knapsack": ("rocket", ("allocation.kappas=[1.0]", "grid.kappa=1")),
    "sparse 1.5": ("rocket-uniform", ("grid.kappa=1.5",)),
    "sparse 1.5, by outputs": ("rocket-uniform", ("grid.kappa=1.5", "grid.judged=outputs")),
    "sparse 2": ("rocket-uniform", ("grid.kappa=2",)),
    "sparse 2, by outputs": ("rocket-uniform", ("grid.kappa=2", "grid.judged=outputs")),
    "sparse 2, places not counted": ("rocket-uniform", ("grid.kappa=2", "grid.count=values")),
    "sparse 2, no second moment": ("rocket-uniform", ("grid.kappa=2", "grid.whitened=false")),
    "rocket, equal shares": (
        "rocket",
        ("allocation.shares=[{removed}]", "allocation.untouched=false", "allocation.cap=false"),
    ),
    "rocket": ("rocket", ()),
    "rocket, calibrated": ("rocket", ("allocation.errors=calibrated",)),
    "rocket, outputs": ("rocket", ("allocation.errors=outputs",)),
    "rocket, outputs, no cap": ("rocket", ("allocation.errors=outputs", "allocation.cap=false")),
    "rocket-q": ("rocket-q", ()),
}
"""Name -> preset and settings; the share removed comes with it. Only the first needs no text.

With equal shares every layer still gets the best of the allocation's kappas, as with the knapsack."""

Row = dict[str, Any]


def run(options: argparse.Namespace, wanted: list[tuple[str, float, int]]) -> Iterator[Row]:
    """The rows of some runs, whose models are evaluated together; `failed` where one cannot be made."""
    made: list[tuple[Row, Path]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for method, removed, seed in wanted:
            preset, settings = METHODS[method]
            row: Row = {"model": Path(options.model).name, "method": method, "removed": removed, "seed": seed}
            changes = [one.format(removed=removed) for one in settings]
            changes += [f"grid.removed={removed:g}"]
            changes += [f"allocation.removed={removed:g}"] if preset == "rocket" else []
            data, out = None if method == "svd" else statistics(options, seed), Path(work) / str(len(made))
            began = time.monotonic()
            try:
                done = compress(options.model, preset, out, changes=changes, calibration=data, observer=silent)
            except FeatherError as error:
                yield row | {"failed": str(error)}
                continue
            row["seconds"] = round(time.monotonic() - began, 1)
            row["bits"], row["bytes"] = done.bits_per_weight, sum(layer["nbytes"] for layer in done.layers)
            row["fallbacks"] = sum("fallback" in layer for layer in done.layers)
            made.append((row, out))
        texts = {"text": options.text, "limit": options.limit, "dtype": options.dtype}
        each = evaluate_each([out for _, out in made], against=options.model, **texts)
        for (row, _), found in zip(made, each, strict=True):
            assert found.divergence is not None
            assert found.log_ratio is not None
            yield row | {
                "excess": math.expm1(found.log_ratio),
                "kl": found.divergence.mean,
                "kl_standard_error": found.divergence.standard_error,
                "tokens": found.setting.tokens,
            }


def statistics(options: argparse.Namespace, seed: int) -> Path:
    """Second moments of a seed's windows, gathered once."""
    path: Path = options.json.parent / f"{Path(options.model).name}-{options.sequences}-{seed}.safetensors"
    if not path.exists():
        settings = {"seed": seed, "sequences": options.sequences}
        gather_statistics(options.model, path, options.calibration, ("gram", "held_out_gram"), settings)
    return path


def table(rows: list[Row]) -> str:
    """Markdown: a line a method, KL and excess by the share removed, means over seeds with their spread."""
    shares = sorted({row["removed"] for row in rows})
    lines = [
        "| method | " + " | ".join(f"{100 * share:.0f} %: KL | excess" for share in shares) + " | s | seeds |",
        "|---" + "|---:" * (2 * len(shares) + 2) + "|",
    ]
    for method in [name for name in METHODS if any(row["method"] == name for row in rows)]:
        mine = [row for row in rows if row["method"] == method and "failed" not in row]
        cells = []
        for share in shares:
            found = [row for row in mine if row["removed"] == share]
            cells.append(spread([row["kl"] for row in found], ".3f"))
            cells.append(f"{spread([100 * row['excess'] for row in found], '+.0f')} %" if found else "")
        seconds = mean(row["seconds"] for row in mine) if mine else math.nan
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.0f} | {len({row['seed'] for row in mine})} |")
    return "\n".join(lines)


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--calibration", help="text; the shipped one if none")
    parser.add_argument("--text", help="held-out text; the shipped one if none")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sequences", type=int, default=64, help="windows of calibration text")
    parser.add_argument("--limit", type=int, help="tokens of the held-out text")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", default=os.environ.get("TMPDIR", "/tmp"))
    parser.add_argument("--json", type=Path, default=Path("bench-out/factorisation.jsonl"))
    parser.add_argument("--render", type=Path)
    options = parser.parse_args()
    if options.render:
        print(table(rows_of(options.render)))
        return
    if not options.model:
        parser.error("--model is missing")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for seed, removed in itertools.product(options.seeds, options.removed):
        made = {(row["model"], row["method"], row["removed"], row["seed"]) for row in rows_of(options.json)}
        wanted = [(method, removed, seed if method != "svd" else 0) for method in options.methods]
        wanted = [one for one in wanted if (Path(options.model).name, *one) not in made]
        for row in run(options, wanted) if wanted else ():
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table(rows_of(options.json)))


if __name__ == "__main__":
    main()
