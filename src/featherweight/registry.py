"""Names to classes, for codes, statistics and every axis of the recipe space.

A choice on an axis is one file in the axis's package, whose class carries `@register(axis, name)`. The packages are
scanned on first use, so adding a choice touches no list anywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import TypeVar

from featherweight.errors import RecipeError

T = TypeVar("T", bound=type)

PACKAGES = {
    "code": "featherweight.storage.codes",
    "transform": "featherweight.methods.quantize.transforms",
    "grid": "featherweight.methods.quantize.grids",
    "rounding": "featherweight.methods.quantize.rounding",
    "correction": "featherweight.methods.quantize.corrections",
    "allocation": "featherweight.methods.budget",
    "statistic": "featherweight.methods.calibrate.statistics",
}

_entries: dict[str, dict[str, type]] = {axis: {} for axis in PACKAGES}
_scanned: set[str] = set()


def register(axis: str, name: str) -> Callable[[T], T]:
    """Class decorator: make the class known as `name` on `axis` and set its `kind`.

    A name can be taken once; the same class defined again (a module reloaded, a cell run twice) takes its own place.
    ValueError where another class has the name, or there is no such axis.
    """
    if axis not in PACKAGES:
        raise ValueError(f"there is no axis called {axis!r}{nearest(axis, PACKAGES)}; known: {', '.join(PACKAGES)}")

    def keep(cls: T) -> T:
        own = f"{PACKAGES[axis]}."
        if not cls.__module__.startswith(own):
            registered(axis)  # so that whoever takes a name of ours is told, and not whoever looks for ours later
        other = _entries[axis].get(name)
        if other is not None and _place_of(other) != _place_of(cls):
            raise ValueError(
                f"{axis} {name!r} is registered twice, by {'.'.join(_place_of(other))} and {'.'.join(_place_of(cls))}: "
                "give the second another name"
            )
        _entries[axis][name] = cls
        cls.kind = name  # type: ignore[attr-defined]
        return cls

    return keep


def _place_of(cls: type) -> tuple[str, str]:
    """Where a class is defined: module and name in it."""
    return cls.__module__, cls.__qualname__


def registered(axis: str) -> dict[str, type]:
    """All names of an axis, in alphabetical order."""
    if axis not in _scanned:
        with _on_cpu():
            package = importlib.import_module(PACKAGES[axis])
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
        _scanned.add(axis)
    return dict(sorted(_entries[axis].items()))


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """The first scan may come while transformers builds a model on "meta"; constants of modules must be real."""
    torch = sys.modules.get("torch")
    return torch.device("cpu") if torch is not None else contextlib.nullcontext()


def find(axis: str, name: str) -> type:
    """The class registered as `name` on `axis`; a RecipeError naming the nearest one otherwise."""
    known = registered(axis)
    if name not in known:
        raise RecipeError(f"there is no {axis} called {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def nearest(name: str, known: object) -> str:
    """`, did you mean 'x'?` for the closest known name, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)  # type: ignore[attr-defined]
    return f" (did you mean {close[0]!r}?)" if close else ""
