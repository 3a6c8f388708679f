"""What benchmarks over several seeds share: a figure with its spread, and the file that keeps all runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def spread(values: Sequence[float], form: str) -> str:
    """Mean and sample standard deviation, which one value does not have; nothing of no value."""
    if not values:
        return ""
    text = format(mean(values), form)
    return text if len(values) == 1 else f"{text} ± {stdev(values):{form.replace('+', '')}}"


def keep(path: Path | None, options: argparse.Namespace, runs: Any) -> None:
    """Write options and figures as JSON, where a file was asked for."""
    if path is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        path.write_text(json.dumps({"settings": settings, "seeds": runs}, indent=1))
