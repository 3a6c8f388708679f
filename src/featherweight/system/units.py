"""Sizes, counts and durations as people read and write them: the same everywhere."""

from __future__ import annotations

import math
import re

from featherweight.errors import FeatherError

SECONDS_SHOWN = 60
"""Durations up to so many seconds have a tenth."""


def size_text(count: float) -> str:
    """Bytes for people, in powers of ten: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if round(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def count_text(count: float) -> str:
    """A number for people: 1.1 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def time_text(seconds: float | None) -> str:
    """A duration for people: 12.3 s, 2 min 05 s, 1 h 20 min; a dash where it is not known."""
    if seconds is None:
        return "-"
    if seconds < SECONDS_SHOWN - 0.05:
        return f"{seconds:.1f} s"
    whole = int(seconds + 0.5)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = (whole + 30) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min"


def parse_size(text: str, name: str = "") -> int:
    """Bytes of "2GB", "800 MB", "1.5GiB" or a plain number.

    Parameters
    ----------
    name : of the option that it is the value of, for the sentence

    Raises
    ------
    FeatherError
        It is no size, or 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not match or not math.isfinite(float(match[1])) or float(match[1]) == 0:
        like = text.replace(",", ".") if re.fullmatch(r"\d+,\d+\w+", text) else "800MB, 2GB or 1.5GiB"
        where = f"{name}: " if name else ""
        raise FeatherError(f"{where}{text!r} is not a size; write it like {like}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
