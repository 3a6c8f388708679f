"""HTML from the templates beside this file. Whatever is put into one is escaped; only figures are markup themselves."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
DASH = "\N{EN DASH}"


@functools.lru_cache(maxsize=1)
def environment() -> Environment:
    """Our templates; a name that a template asks for and nobody gave is an error."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"bytes": bytes_text, "count": count_text, "figure": Markup}
    made.globals["dash"] = DASH
    return made


def render(template: str, **values: Any) -> str:
    """A template of ours with its values."""
    return environment().get_template(template).render(**values)


def style() -> Markup:
    """The style sheet of all pages, for a <style> element."""
    return Markup((HERE / "report.css").read_text(encoding="utf-8"))  # ours, and inside <style> nothing is escaped


def bytes_text(value: float) -> str:
    """Bytes for people, in powers of ten: "4.85 MB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def count_text(value: float) -> str:
    """A number of parameters for people: "7.34 million"."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def perplexity_text(value: float) -> str:
    """A perplexity with as many digits as can mean something; the infinity sign beyond what a float holds."""
    if not math.isfinite(value):
        return "\N{INFINITY}"
    return f"{value:,.3f}" if value < 100 else f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"
