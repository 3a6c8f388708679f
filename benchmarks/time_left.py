#!/usr/bin/env python
"""Is the time left that is shown the time that is left? Compresses the bundled model by recipes of different kinds.

    python benchmarks/time_left.py                                        # some recipes of each kind, shortened
    python benchmarks/time_left.py gptq trit-2 --threads 2 --json bench-out/time_left.json

Every event that shows a time left is kept with the moment at which it came. From a tenth of the way on, the shown time
is compared with what was really left: the table has the share of moments at which it was within a third of it (or,
near the end, within two seconds), the median of shown / true, and the worst; and how much of the run had gone when a
time was first shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import featherweight
from featherweight.cli.demo import SHORTENED, reference_model

RECIPES = ("ptqtp-3", "gptq", "trit-2-blockwise", "trit-2")
TEXT = ("calibration.sequences=32", "calibration.length=512")
FROM, WITHIN, NEAR_SECONDS = 0.1, 1 / 3, 2.0


def measure(recipe: str, threads: int) -> dict[str, Any]:
    """Moments at which a time left was shown, in seconds since the start, with what was shown."""
    shown: list[tuple[float, float]] = []
    begun = time.monotonic()

    def watch(event: dict[str, Any]) -> None:
        left = event.get("seconds_left") if event["event"] == "layer" else event.get("run_seconds_left")
        if left is not None:
            shown.append((time.monotonic() - begun, left))

    changes = SHORTENED.get(recipe, TEXT if featherweight.load_recipe(recipe).calibrated else ())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        featherweight.compress(reference_model(), recipe, out, changes=changes, threads=threads, observer=watch)
    return {"recipe": recipe, "changes": changes, "seconds": time.monotonic() - begun, "shown": shown}


def judged(run: dict[str, Any]) -> dict[str, Any]:
    """How near the shown times were, from a tenth of the way on."""
    whole = run["seconds"]
    pairs = [(left, whole - moment) for moment, left in run["shown"] if moment >= FROM * whole]
    good = [abs(left - true) <= max(WITHIN * true, NEAR_SECONDS) for left, true in pairs]
    ratios = [left / true for left, true in pairs if true > NEAR_SECONDS]
    return {
        "moments": len(pairs),
        "first_shown": run["shown"][0][0] / whole if run["shown"] else None,
        "within": sum(good) / len(good) if good else None,
        "median_ratio": statistics.median(ratios) if ratios else None,
        "least_ratio": min(ratios, default=None),
        "largest_ratio": max(ratios, default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    print(
        "| recipe | seconds | first shown, % | moments | within a third, % | shown / true, median | least | largest |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        run = measure(recipe, options.threads)
        runs.append({**run, **judged(run)})
        found = runs[-1]
        first = found["first_shown"]
        cells = [f"{found['seconds']:.0f}", "" if first is None else f"{100 * first:.0f}", str(found["moments"])]
        cells.append("" if found["within"] is None else f"{100 * found['within']:.0f}")
        for name in ("median_ratio", "least_ratio", "largest_ratio"):
            cells.append("" if found[name] is None else f"{found[name]:.2f}")
        print(f"| {recipe} | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(runs, indent=1) + "\n")
    sys.exit(any(run["within"] is None or run["within"] < 1 for run in runs))


if __name__ == "__main__":
    main()
