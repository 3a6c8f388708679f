"""What calibration learns about layers: one class a statistic, and what is done with them by name.

A new statistic is a class with `@register("statistic", name)` in a file here: it says what its dimensions are, how
tokens enter it, and what becomes of it in another basis. Gathering, files, windows of columns and transforms then take
it in by themselves.
"""

from featherweight.methods.calibrate.statistics.base import (
    NO_STATISTICS,
    Basis,
    Statistic,
    Statistics,
    carried,
    gathered_names,
    known_statistics,
    of_columns,
    restricted,
    statistic_named,
    unchanged,
)

__all__ = [
    "NO_STATISTICS",
    "Basis",
    "Statistic",
    "Statistics",
    "carried",
    "gathered_names",
    "known_statistics",
    "of_columns",
    "restricted",
    "statistic_named",
    "unchanged",
]
