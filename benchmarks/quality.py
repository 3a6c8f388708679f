#!/usr/bin/env python
"""Every preset on the bundled model over several calibration seeds: excess perplexity against true bits.

    python benchmarks/quality.py --out build/quality                  # all presets, seeds 0 1 2
    python benchmarks/quality.py --presets trit-2 gptq-3 --seeds 0
    python benchmarks/quality.py --workers 16 --threads 1             # runs side by side, where cores are many
    python benchmarks/quality.py --table --peers build/peers.json     # only the table and the plot of what is there

Each run is a line of OUT/runs.jsonl; what is there is not run again, so the command can be stopped and repeated. The
plot goes to OUT/quality.png, the table to standard output. Peers' rows come from benchmarks/quality_vs_peers.py
--scope linears --json, measured with the original's embedding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[1] / "src" / "featherweight" / "assets" / "reference"
OURS = ("trit-2", "trit-2-blockwise", "trit-1", "trit-1-blockwise")
SHOWN_BITS = 5.3  # the plot's right end
CLOSE = ((2.85, 4.35), (1.1, 22.0))  # bits and excess of the plot's second part


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", help="default: all")
    parser.add_argument("--skip", nargs="+", default=(), help="presets to leave out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--base-model", type=Path, help="for presets that compare with a base model; skipped without")
    parser.add_argument("--set", nargs="+", default=(), dest="changes", help="recipe fields to change in all runs")
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    parser.add_argument("--tokens", type=int, default=40960, help="of the evaluation text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, each with --threads")
    parser.add_argument("--peers", type=Path, help="JSON of quality_vs_peers.py, for table and plot")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "runs.jsonl"
    if not options.table:
        run_missing(options, log)
    rows = summarise(read(log))
    peers = peer_rows(options.peers) if options.peers else []
    print_table([*rows, *peers])
    plot([*rows, *peers], options.out / "quality.png")


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run_missing(options: argparse.Namespace, log: Path) -> None:
    from featherweight.methods.recipe import load_recipe, presets
    from featherweight.tasks.evaluate.evaluation import evaluate

    done = {(run["preset"], run["seed"]) for run in read(log)}
    if ("original", 0) not in done:
        found = evaluate(options.model, threads=options.threads, limit=options.tokens)
        keep(log, {"preset": "original", "seed": 0, "bits": 16.0, "perplexity": found.perplexity})
    recipes = {name: load_recipe(name) for name in options.presets or presets() if name not in options.skip}
    tasks = [
        (name, seed, recipe.calibrated, options)
        for seed in options.seeds
        for name, recipe in recipes.items()
        if ("base" not in recipe.needs or options.base_model is not None)
        and (name, seed) not in done
        # One that reads no text gives the same for every seed.
        and (recipe.calibrated or (seed == options.seeds[0] and not any(other == name for other, _ in done)))
    ]
    if options.workers == 1:
        for task in tasks:
            keep(log, run_one(*task))
        return
    # Long runs first, so that none begins when the others are done.
    tasks.sort(
        key=lambda task: -sum(getattr(choice, "scope", "layer") != "layer" for choice in recipes[task[0]].choices)
    )
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = {pool.submit(run_one, *task): task[:2] for task in tasks}
        for run in as_completed(runs):
            if (failure := run.exception()) is None:
                keep(log, run.result())
            else:
                print(f"{runs[run]} failed: {type(failure).__name__}: {failure}", flush=True)


def run_one(name: str, seed: int, calibrated: bool, options: argparse.Namespace) -> dict[str, Any]:
    from featherweight.tasks.compress.compression import compress
    from featherweight.tasks.evaluate.evaluation import evaluate

    out = options.out / f"{name}-{seed}"
    changes = [*options.changes, *([f"calibration.seed={seed}"] if calibrated else [])]
    begun = time.monotonic()
    try:
        made = compress(
            options.model, name, out, changes=changes, seed=seed, threads=options.threads, base_model=options.base_model
        )
        seconds = time.monotonic() - begun
        found = evaluate(out, options.model, threads=options.threads, limit=options.tokens)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(out.name + ".feather-run"), ignore_errors=True)
    errors = [layer["output_error"] for layer in made.layers if "output_error" in layer]
    fallen = [layer["name"] for layer in made.layers if "fallback" in layer]
    row = {
        "preset": name,
        "seed": seed,
        "bits": made.bits_per_weight_linear,
        "perplexity": found.perplexity,
        "kl": found.divergence.mean if found.divergence else None,
        "output_error": statistics.fmean(errors) if errors else None,
        "fallbacks": len(fallen),
        "seconds": seconds,
        "protocol": found.description,
    }
    print(
        f"{name} seed {seed}: {row['bits']:.3f} bits, perplexity {row['perplexity']:.3f}, {seconds:.0f} s", flush=True
    )
    return row


def keep(log: Path, row: dict[str, Any]) -> None:
    with log.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a preset: mean and spread (half the range) of the excess over seeds."""
    original = next(run["perplexity"] for run in runs if run["preset"] == "original")
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["preset"] != "original":
            grouped[run["preset"]].append(run)
    return [
        {"name": name, "who": "ours" if name in OURS else "preset", **row(found, original)}
        for name, found in grouped.items()
    ]


def row(runs: list[dict[str, Any]], original: float) -> dict[str, Any]:
    excess = [100 * (run["perplexity"] / original - 1) for run in runs]
    errors = [run["output_error"] for run in runs if run.get("output_error") is not None]
    return {
        "bits": statistics.fmean(run["bits"] for run in runs),
        "excess": statistics.fmean(excess),
        "spread": (max(excess) - min(excess)) / 2,
        "seeds": len(runs),
        "output_error": statistics.fmean(errors) if errors else None,
        "kl": mean_of(runs, "kl"),
        "seconds": statistics.fmean(run.get("seconds") or 0 for run in runs),
        "fallbacks": max(run.get("fallbacks", 0) for run in runs),
    }


def mean_of(runs: list[dict[str, Any]], field: str) -> float | None:
    values = [run[field] for run in runs if run.get(field) is not None]
    return statistics.fmean(values) if values else None


def peer_rows(path: Path) -> list[dict[str, Any]]:
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for found in json.loads(path.read_text())["rows"]:
        # Ours keep the embedding here, so only peers' rows that have the original's can stand beside them.
        if found["tool"] != "featherweight" and found.get("embedding") != "compressed":
            grouped[f"{found['tool']} {found['name']}"].append(found)
    rows = []
    for name, found in grouped.items():
        excess = [100 * run["excess"] for run in found]
        rows.append(
            {
                "name": name,
                "who": "peer",
                "bits": statistics.fmean(run["bits"] for run in found),
                "excess": statistics.fmean(excess),
                "spread": (max(excess) - min(excess)) / 2,
                "seeds": len(found),
                "output_error": None,
                "kl": mean_of(found, "kl"),
                "seconds": statistics.fmean(run.get("seconds") or 0 for run in found),
                "fallbacks": 0,
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("\n| preset | bits | excess, % | spread | KL | seeds | output error | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for found in sorted(rows, key=lambda r: (r["bits"], r["excess"])):
        name = f"**`{found['name']}`**" if found["who"] == "ours" else f"`{found['name']}`"
        name = found["name"] if found["who"] == "peer" else name
        error = "-" if found["output_error"] is None else f"{found['output_error']:.4f}"
        spread = f"± {found['spread']:.2f}" if found["seeds"] > 1 else "-"
        kl = "-" if found["kl"] is None else f"{found['kl']:.4f}"
        fallen = f" (up to {found['fallbacks']} layers without data)" if found["fallbacks"] else ""
        print(
            f"| {name} | {found['bits']:.3f} | {found['excess']:+.2f}{fallen} | {spread} | {kl} | {found['seeds']} | "
            f"{error} | {found['seconds']:.0f} |"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = {
        "ours": {"color": "#c1272d", "marker": "*", "s": 180, "zorder": 3, "label": "ours"},
        "preset": {"color": "#1f5f8b", "marker": "o", "s": 28, "label": "presets of the field"},
        "peer": {"color": "#7a7a7a", "marker": "^", "s": 36, "label": "other tools"},
    }
    figure, (wide, close) = pyplot.subplots(1, 2, figsize=(17, 9), width_ratios=(2, 3))
    shown = [r for r in rows if r["excess"] > 0 and r["bits"] < SHOWN_BITS]
    for axes in (wide, close):
        axes.set_yscale("log")
        for who, look in looks.items():
            chosen = [r for r in shown if r["who"] == who]
            axes.scatter([r["bits"] for r in chosen], [r["excess"] for r in chosen], **look)
        axes.set_xlabel("true bits per weight of the linear layers (everything stored counted)")
        axes.grid(True, which="both", alpha=0.25)
    wide.margins(x=0.12)
    wide.set_ylabel("excess perplexity, % of the original (mean over seeds)")
    (low_x, high_x), (low_y, high_y) = CLOSE
    close.set(xlim=CLOSE[0], ylim=CLOSE[1], title="the frame on the left")
    frame = pyplot.Rectangle((low_x, low_y), high_x - low_x, high_y - low_y, fill=False, color="#999999", linewidth=0.8)
    wide.add_patch(frame)
    colours = {who: look["color"] for who, look in looks.items()}
    within = [r for r in shown if low_x < r["bits"] < high_x and low_y < r["excess"] < high_y]
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    unnamed = label(wide, [r for r in shown if r not in within], shown, colours)
    unnamed += label(close, within, within, colours)
    wide.legend(loc="upper right")
    if unnamed:
        figure.text(0.01, 0.008, f"no room for the names of: {', '.join(unnamed)}", fontsize=7, color="#555555")
    figure.savefig(path, dpi=110)


def label(axes: Any, rows: list[dict[str, Any]], points: list[dict[str, Any]], colours: dict[str, Any]) -> list[str]:
    """Names beside their points, ours first, each as near as it gets without covering a point or another name; far ones
    on a line. Returns those for which there is no room. `points` are all that the axes show."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()
    renderer, scale = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    at = axes.transData.transform([(r["bits"], r["excess"]) for r in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in at]
    if axes.get_ylabel():  # where the legend goes
        frame = axes.bbox
        taken.append(
            Bbox.from_extents(frame.x1 - 0.36 * frame.width, frame.y1 - 0.1 * frame.height, frame.x1, frame.y1)
        )
    sides = [(x, y) for y in sorted(range(-150, 151, 6), key=abs) for x in (8, -8, 28, -28, 60, -60)]
    sides.sort(key=lambda place: abs(place[1]) + 0.6 * abs(place[0]))
    unnamed = []
    for found in sorted(rows, key=lambda r: (r["who"] != "ours", r["bits"], r["excess"])):
        look = {"fontsize": 7, "weight": "bold" if found["who"] == "ours" else "normal", "color": colours[found["who"]]}
        probe = axes.text(0, 0, found["name"], **look)
        size = probe.get_window_extent(renderer)
        probe.remove()
        x, y = axes.transData.transform((found["bits"], found["excess"]))
        for right, up in sides:
            left = x + right * scale - (0 if right > 0 else size.width)
            box = Bbox.from_bounds(left, y + up * scale - size.height / 2, size.width, size.height)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        else:
            unnamed.append(found["name"])
            continue
        taken.append(box)
        line = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            found["name"], (found["bits"], found["excess"]), xytext=(right, up), textcoords="offset points",
            ha="left" if right > 0 else "right", va="center", **look,
            arrowprops=line if abs(up) > 6 or abs(right) > 8 else None,
        )  # fmt: skip
    return unnamed


if __name__ == "__main__":
    main()
