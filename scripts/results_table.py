#!/usr/bin/env python
"""Print the table of a demo run (demo-out/demo.json) as Markdown, for README.md and docs/results.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    runs = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out/demo.json").read_text())
    base = runs["original"]["evaluation"]["perplexity"]
    titles = ("variant", "bits, linear", "bits, model", "MB", "perplexity", "excess, %", "KL", "top-1, %", "error")
    print("| " + " | ".join(titles) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        found, layers = run["evaluation"], run["compression"].get("layers", ())
        bits = found["bits_per_weight"]
        error = found.get("log_ratio_standard_error")
        excess = f"{100 * (found['perplexity'] / base - 1):+.2f}" + (f" ± {100 * error:.2f}" if error else "")
        cells = [f"`{name}`" if layers else name, f"{bits['linear']:.3f}", f"{bits['model']:.3f}"]
        cells += [f"{found['bytes'] / 1e6:.2f}", f"{found['perplexity']:.3f}", excess if layers else "-"]
        cells += ["-" if found["kl"] is None else f"{found['kl']:.4f}"]
        cells += ["-" if found["top1_agreement"] is None else f"{100 * found['top1_agreement']:.1f}"]
        cells += [f"{sum(x['relative_error'] for x in layers) / len(layers):.4f}" if layers else "-"]
        print("| " + " | ".join(cells) + " |")
    print()
    print(runs["original"]["evaluation"]["description"])


if __name__ == "__main__":
    main()
