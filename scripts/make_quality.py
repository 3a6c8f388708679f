#!/usr/bin/env python
"""Write the qualities that `feather plan` shows from the tables of docs/results.md. `--check` fails if they are old.

    python scripts/make_quality.py

On the pretrained model rows are taken from the first table of its section, on the bundled model from the table between
the marks `quality`. A row whose preset was changed (`gptq`, `embedding=6bit`) says so in `changes`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from featherweight.methods.recipe import presets
from featherweight.system.files import to_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
TARGET = ROOT / "src" / "featherweight" / "assets" / "quality.json"
MODELS = {
    "smollm2-135m": {
        "name": "SmolLM2-135M-Instruct",
        "pretrained": True,
        "protocol": "20,480 tokens of WikiText-2, windows of 2048",
    },
    "reference": {
        "name": "the bundled model of 7 M parameters",
        "pretrained": False,
        "protocol": "40,940 tokens of novels, windows of 2048, float32",
    },
}


def quality() -> dict[str, Any]:
    """`models` and their protocols; `presets`: name -> model -> excess (percent), kl (nats a token), changes."""
    text = RESULTS.read_text(encoding="utf-8")
    section = text.partition("## A pretrained model")[2]
    pretrained = section[section.index("| | MB, whole file |") :].partition("\n\n")[0]
    bundled = text.partition("<!-- quality -->")[2].partition("<!-- /quality -->")[0]
    found: dict[str, dict[str, Any]] = {}
    for model, table in (("smollm2-135m", pretrained), ("reference", bundled)):
        names, *rows = [_cells(line) for line in table.strip().splitlines()]
        for cells in rows[1:]:
            name = re.fullmatch(r"\**`([\w-]+)`\**(?:, `([^`]+)`)?", cells[0])
            if name is not None and name[1] in presets():
                by_name = dict(zip(names, cells, strict=False))
                excess = next(value for key, value in by_name.items() if key.startswith("excess"))
                row = {"excess": _number(excess), "kl": _number(by_name["KL"]), "changes": name[2] or ""}
                found.setdefault(name[1], {})[model] = row
    return {"models": MODELS, "presets": dict(sorted(found.items()))}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _number(cell: str) -> float:
    """The first number of a cell; a spread behind it is left out."""
    number = re.match(r"[+-]?[\d.]+", cell)
    assert number is not None, cell
    return float(number[0])


def main() -> None:
    made = to_json(quality())
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == made else f"{TARGET} is out of date: run this script")
    TARGET.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
