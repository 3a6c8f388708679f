#!/usr/bin/env python
"""Draw the plots of docs/ again from the tables that docs/results.md has of their runs; nothing is measured.

python benchmarks/redraw.py                  # docs/quality.png, docs/decode.png, docs/real.svg and docs/real-narrow.svg
python benchmarks/redraw.py --out build
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import decode_vs_llamacpp
import quality
from peer_report import COMPRESSED, OURS, Report, Row, write_plots

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
        rows.append(
            {
                "name": name.split("`")[1] if "`" in name else name,
                "who": who,
                "bits": number(bits),
                "excess": number(excess),
            }
        )
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


def pretrained_report(page: str) -> Report:
    """What `peer_report.write_plots` wants, from the first table of the pretrained model. Left out are presets as they
    were."""
    section = page.partition("## A pretrained model")[2]
    table = section[section.index("| | MB, whole file |") :].partition("\n\n")[0]
    rows = []
    for label, size, bits, embedding, excess, kl, _ in rows_of(table):
        if " as it was" in label:
            continue
        ours = "`" in label
        name = label.strip("*").replace("`", "") if ours else label.removeprefix("llama.cpp ")
        rows.append(
            Row(
                name=name, tool=OURS if ours else "llama.cpp", version="", bits=number(bits), perplexity=math.nan,
                excess=number(excess) / 100, excess_standard_error=None, kl=number(kl), seconds=None, seed=None,
                embedding=COMPRESSED, embedding_bits=number(embedding), file_bytes=round(1e6 * number(size)),
            )
        )  # fmt: skip
    return Report({}, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    quality.plot(quality_rows(page), options.out / "quality.png")
    decode_vs_llamacpp.plot(decode_result(page), options.out / "decode.png")
    write_plots(pretrained_report(page), options.out / "real.svg")


if __name__ == "__main__":
    main()
