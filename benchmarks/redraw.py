#!/usr/bin/env python
"""Draw the plots of docs/ again from the tables that docs/results.md has of their runs; nothing is measured.

python benchmarks/redraw.py                  # docs/quality.png and docs/decode.png
python benchmarks/redraw.py --out build
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import decode_vs_llamacpp
import quality

ROOT = Path(__file__).parents[1]
THREADS, SHAPE = 2, "1.1b"  # of the table "On Zen 5"
TOOLS = ("llama.cpp", "featherweight")


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(re.match(r"[+-]?[\d.]+", cell)[0])  # type: ignore[index]


def quality_rows(page: str) -> list[dict[str, Any]]:
    """What `quality.plot` wants, from the table between the marks of that name."""
    table = page.partition("<!-- quality -->")[2].partition("<!-- /quality -->")[0]
    rows = []
    for name, bits, excess, *_ in rows_of(table):
        who = "ours" if name.startswith("**") else "preset" if name.startswith("`") else "peer"
        rows.append({"name": name.strip("*`"), "who": who, "bits": number(bits), "excess": number(excess)})
    return rows


def decode_result(page: str) -> dict[str, Any]:
    """What `decode_vs_llamacpp.plot` wants, from the first table under "On Zen 5"."""
    section = page.partition("### On Zen 5")[2]
    table = section[section.index("\n|") : section.index("![decoded tokens")]
    rows = []
    for name, _, _, size, _, rate, limit, _ in rows_of(table):
        tool = next(tool for tool in TOOLS if name.startswith(tool))
        rows.append(
            {
                "tool": tool,
                "title": name.removeprefix(tool).strip(),
                "bytes_per_token": 1e6 * number(size),
                "decode_tokens_per_second": number(rate),
                "limit_tokens_per_second": number(limit),
            }
        )
    return {"rows": rows, "threads": THREADS, "shape": {"name": SHAPE}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    quality.plot(quality_rows(page), options.out / "quality.png")
    decode_vs_llamacpp.plot(decode_result(page), options.out / "decode.png")


if __name__ == "__main__":
    main()
