"""What each lever is worth: recipes with and without it on one model, the same texts, the same protocol.

    python benchmarks/levers.py --model FOLDER --calibration calibration.txt --text heldout.txt \\
        --bases gptq-3 trit-2 --levers guided rotated --pairs --seeds 0 1 2 --json bench-out/levers.json
    python benchmarks/levers.py --render bench-out/levers.json          # the table again, runs nothing

A lever is a few settings on top of a preset (LEVERS below). `--pairs` adds all combinations of two, `--all` one of all.
Every run is a `feather compress` into a folder that is removed after its `feather eval` against the original; runs
whose row is in the JSON file are not made again. Excess is perplexity over the original's, minus 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from seeds import spread

LEVERS: dict[str, list[str]] = {
    "guided": ["calibration.guidance=1"],
    "guided4": ["calibration.guidance=4"],
    "whole-rotation": ['transforms=[{"kind": "hadamard", "block": "whole"}]'],
    "equilibrated": ['transforms=[{"kind": "equilibration", "exponent": 0.125}]'],
    "two-sided": ['rounding={"kind": "two-sided", "output_damping": 0.1}'],
    "attention": ["calibration.token_weights=attention"],
    "tuned-slowly": ["corrections.0.learning_rate=5e-4"],
    "untuned": ["corrections=[]"],
    "rotated": ['transforms=[{"kind": "hadamard"}]'],
    "unrotated": ["transforms=[]"],
    "group64": ["grid.group_size=64"],
    "group32": ["grid.group_size=32"],
}
"""Lever -> settings. Those of which a preset has no such field are left out for it, with a line that says so."""

Row = dict[str, Any]


def combinations(levers: list[str], pairs: bool, everything: bool) -> list[tuple[str, ...]]:
    """None of them, each alone, and what else was asked for."""
    found: list[tuple[str, ...]] = [(), *((lever,) for lever in levers)]
    found += list(itertools.combinations(levers, 2)) if pairs else []
    found += [tuple(levers)] if everything and len(levers) > (2 if pairs else 1) else []
    return found


def run(options: argparse.Namespace, base: str, levers: tuple[str, ...], seed: int) -> Row:
    """The row of one recipe; `failed` where it cannot be made."""
    row: Row = {"base": base, "levers": list(levers), "seed": seed, "model": Path(options.model).name}
    settings = [one for lever in levers for one in LEVERS[lever]]
    settings += [f"calibration.seed={seed}", *options.set]
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        out, facts = Path(work) / "model", Path(work) / "eval.json"
        words = ["compress", options.model, "--recipe", base, "--out", str(out), "--seed", str(seed)]
        words += ["--calibration", options.calibration] if options.calibration else []
        words += [word for setting in settings for word in ("--set", setting)]
        began = time.monotonic()
        error = feather(words)
        row["seconds"] = round(time.monotonic() - began, 1)
        if error is None:
            words = ["eval", str(out), "--against", options.model, "--json", str(facts), "--dtype", options.dtype]
            words += ["--text", options.text] if options.text else []
            words += ["--limit", str(options.limit)] if options.limit else []
            error = feather(words)
        if error is not None:
            return row | {"failed": error}
        found = json.loads(facts.read_text(encoding="utf-8"))
    return row | {
        "bits": found["bits_per_weight"]["linear"],
        "bytes": found["bytes"],
        "excess": math.expm1(found["log_ratio"]),
        "excess_standard_error": found["log_ratio_standard_error"],
        "kl": found["kl"],
        "kl_standard_error": found["kl_standard_error"],
        "top1": found["top1_agreement"],
        "protocol": f"{found['protocol']}, {found['tokens']} tokens, {found['dtype']}",
    }


def feather(words: list[str]) -> str | None:
    """Run the command; the last line of what it says where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "featherweight.cli.main", *words], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip() or "?").splitlines()[-1]


def table(rows: list[Row]) -> str:
    """Markdown: a line a recipe, means over seeds with their spread, and the change against the preset itself."""
    lines = [
        "| preset | levers | bits | MB | KL | of the preset's | excess | top-1 | s | seeds |",
        "|---|---|---" + "|---:" * 7 + "|",
    ]
    groups: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["base"], tuple(row["levers"])), []).append(row)
    for (base, levers), found in groups.items():
        good = [row for row in found if "failed" not in row]
        if not good:
            lines.append(f"| {base} | {' + '.join(levers)} | | | {found[0]['failed']} | | | | | |")
            continue
        plain = [row for row in groups.get((base, ()), []) if "failed" not in row and row["seed"] in seeds(good)]
        paired = [row for row in good if row["seed"] in seeds(plain)]
        ratio = mean(r["kl"] for r in paired) / mean(r["kl"] for r in plain) if levers and paired else None
        lines.append(
            f"| {base} | {' + '.join(levers) or '-'} | {good[0]['bits']:.2f} | {good[0]['bytes'] / 1e6:.1f} "
            f"| {spread([r['kl'] for r in good], '.4f')} | {'' if ratio is None else f'{ratio:.2f}'} "
            f"| {spread([100 * r['excess'] for r in good], '+.1f')} % | {100 * mean(r['top1'] for r in good):.1f} % "
            f"| {mean(r['seconds'] for r in good):.0f} | {len(good)} |"
        )
    return "\n".join(lines)


def seeds(rows: list[Row]) -> set[int]:
    return {row["seed"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--calibration", help="text; the shipped one if none")
    parser.add_argument("--text", help="held-out text; the shipped one if none")
    parser.add_argument("--bases", nargs="+", default=["gptq-3"], help="presets")
    parser.add_argument("--levers", nargs="*", default=[], choices=list(LEVERS))
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", action="append", default=[], help="for all runs")
    parser.add_argument("--limit", type=int, help="tokens of the held-out text")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", default=os.environ.get("TMPDIR", "/tmp"))
    parser.add_argument("--json", type=Path, default=Path("bench-out/levers.json"))
    parser.add_argument("--render", type=Path)
    options = parser.parse_args()
    if options.render:
        print(table(json.loads(options.render.read_text(encoding="utf-8"))))
        return
    if not options.model:
        parser.error("--model is missing")
    rows: list[Row] = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for seed, base in itertools.product(options.seeds, options.bases):
        for levers in combinations(options.levers, options.pairs, options.all):
            own = (base, list(levers), seed, Path(options.model).name)
            if any((row["base"], row["levers"], row["seed"], row["model"]) == own for row in rows):
                continue
            row = run(options, base, levers, seed)
            rows.append(row)
            part = options.json.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            part.replace(options.json)
            print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
