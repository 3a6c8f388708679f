#!/usr/bin/env python
"""Are the outputs of two versions the same bytes? Compresses the bundled model with every preset and prints digests.

    python benchmarks/preset_bytes.py --json before.json                      # with the one version
    python benchmarks/preset_bytes.py --json after.json --against before.json  # with the other

Every preset runs in a process of its own with two threads; little text and few steps, which change how long a recipe
takes but not which code it goes through. Digests are of all files of the output. Exits with 1 where any differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

import featherweight
from featherweight.storage.run.ownership import RECORD

PACKAGE = Path(featherweight.__file__).parent
MODEL = PACKAGE / "assets" / "reference"
QUICK = {"steps": 4, "rounds": 2, "iterations": 3, "search_tokens": 256, "batch_size": 1}
TEXT = ["calibration.sequences=8", "calibration.length=128", "calibration.held_out=0.25"]


def changes_of(preset: Path) -> list[str]:
    """Changes that make a preset quick."""
    mapping = yaml.safe_load(preset.read_text("utf-8"))
    changes = list(TEXT)
    rounding: dict[str, Any] = mapping.get("rounding", {})
    changes += [f"rounding.{name}={value}" for name, value in QUICK.items() if rounding.get(name, 0) > value]
    corrections = mapping.get("corrections", [])
    quick = [{k: min(v, QUICK[k]) if k in QUICK else v for k, v in choice.items()} for choice in corrections]
    if quick != corrections:
        changes.append("corrections=" + json.dumps(quick))
    return changes


def make(preset: str, threads: int) -> None:
    """Compress with one preset and print the digests of the files it gives."""
    changes = changes_of(PACKAGE / "recipes" / f"{preset}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        options: dict[str, Any] = {"base_model": MODEL} if preset.startswith("quantlrm") else {}
        try:
            featherweight.compress(MODEL, preset, out, changes=changes, threads=threads, **options)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            return
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != RECORD)
        print(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return make(options.one, options.threads)
    known = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, dict[str, str]] = {}
    different = 0
    for preset in options.presets or sorted(path.stem for path in (PACKAGE / "recipes").glob("*.yaml")):
        begun = time.monotonic()
        command = [sys.executable, __file__, "--one", preset, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        found[preset] = json.loads(lines[-1]) if lines else {"error": done.stderr[-500:]}
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
        verdict = found[preset].get("error", "")
        if preset in known and not verdict:
            names = {*known[preset], *found[preset]}
            changed = sorted(n for n in names if known[preset].get(n) != found[preset].get(n))
            different += bool(changed)
            verdict = f"different: {', '.join(changed)}" if changed else "same"
        print(f"{preset:24s} {time.monotonic() - begun:6.1f} s  {verdict}", flush=True)
    print(f"{len(found)} presets, {different} different")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
