#!/usr/bin/env python
"""`feather fit` beside presets of the same size, on the bundled model, over several choices of calibration text.

    python benchmarks/fit_vs_presets.py                                  # presets, each against a fit of its size
    python benchmarks/fit_vs_presets.py --seeds 1 --bits 2.6 3.0         # and at sizes of one's own
    python benchmarks/fit_vs_presets.py --model FOLDER --calibration FILE --text FILE

For every preset: its file, KL divergence and excess perplexity; then of a fit into the bytes of that file. Sizes given
by --bits (of the whole file, a parameter) have a fit alone. `one way` is the divergence of the best single choice in
all layers within the bytes, over that of the fit: both put together from the same codes, on text that neither has seen.
With --control each fit has a row beside it that adds up divergences of one tensor at a time, greedily, and looks at no
true model. Presets are taken without their tuning of scales, which a fit can have as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import featherweight
from featherweight.cli.demo import reference_model
from featherweight.storage.checkpoint.checkpoint import Checkpoint

PRESETS = ("trit-1", "trit-2", "four", "ptqtp", "gptq-3")
ENDS = "embedding=6bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=reference_model())
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--bits", nargs="*", type=float, default=())
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=32, help="of 1024 tokens")
    parser.add_argument("--limit", type=int, default=20480)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--control", action="store_true", help="greedy sums beside every fit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for seed in range(options.seeds) for row in one_seed(options, seed)]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2))
    show(rows)


def one_seed(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Rows of one choice of calibration windows."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        budgets: list[tuple[str, int]] = []
        for preset in options.presets:
            out = folder / preset
            changes = ["corrections=[]"]
            if featherweight.load_recipe(preset).calibrated:
                changes += [f"calibration.sequences={options.windows}", "calibration.length=1024"]
                changes.append(f"calibration.seed={seed}")
            if featherweight.load_recipe(preset).embedding == "keep":
                changes.append(ENDS)
            featherweight.compress(
                options.model, preset, out, changes=changes, calibration=options.calibration, threads=options.threads
            )
            size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            rows.append(scored(options, out, preset, seed, size))
            budgets.append((f"fit as {preset}", size))
        with Checkpoint.open(options.model) as checkpoint:
            budgets += [(f"fit {bits:g} bits", int(bits * checkpoint.parameters / 8)) for bits in options.bits]
        solvers: list[Literal["knapsack", "greedy"]] = ["knapsack", "greedy"] if options.control else ["knapsack"]
        for (name, budget), solver in itertools.product(budgets, solvers):
            name = name if solver == "knapsack" else f"{name}, greedy sums"
            settings = featherweight.FitSettings(windows=options.windows, seed=seed, score=0, solver=solver)
            out = folder / name
            found = featherweight.fit(
                options.model, out, budget, settings=settings, calibration=options.calibration,
                work=folder / "measured", threads=options.threads,
            )  # fmt: skip
            row = scored(options, out, name, seed, found.bytes)
            if found.uniform_kl is not None and found.assembled_kl:
                row["one_way"] = found.uniform_kl / found.assembled_kl
            rows.append({**row, "predicted": found.predicted_kl, "assembled": found.assembled_kl, "s": found.seconds})
    return rows


def scored(options: argparse.Namespace, out: Path, name: str, seed: int, size: int) -> dict[str, Any]:
    """A row: size and quality of a folder."""
    found = featherweight.evaluate(out, options.model, options.text, limit=options.limit, threads=options.threads)
    assert found.divergence is not None
    assert found.log_ratio is not None
    excess = 100 * (math.exp(found.log_ratio) - 1)
    return {"name": name, "seed": seed, "bytes": size, "kl": found.divergence.mean, "excess": excess}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Means over seeds, with the standard deviation where there are several."""
    print("| | MB | KL | excess, % | one way / fit |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        ways = [row["one_way"] for row in own if "one_way" in row]
        size = statistics.mean(row["bytes"] for row in own) / 1e6
        shown = [mean(own, "kl", 4), mean(own, "excess", 2), f"{statistics.mean(ways):.2f}" if ways else ""]
        print(f"| {name} | {size:.2f} | {' | '.join(shown)} |")


def mean(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    """The mean, and its spread where there is one."""
    values = [row[key] for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
