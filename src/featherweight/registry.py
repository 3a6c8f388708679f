"""Names to classes, for codes, statistics, every axis of the recipe space, and other tools' formats.

A choice on an axis is one file in the axis's package, whose class carries `@register(axis, name)`. The packages are
scanned on first use, so adding a choice touches no list anywhere. Then the plug-ins are imported that other
distributions declare (`featherweight.plugins`). One that fails, or takes a name that is taken, becomes one
FeatherWarning; what it had registered is taken back, and everything else is there.

Several threads may register and look up. The lock is held for the tables alone and never while a module is imported:
who imports a module holds that module's import lock, and may come here for the tables.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import pkgutil
import sys
import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

from featherweight.errors import FeatherWarning, RecipeError
from featherweight.plugins import METHODS_GROUP, OURS, Plugin, plugins, reason_of

T = TypeVar("T", bound=type)

PACKAGES = {
    "code": "featherweight.storage.codes",
    "transform": "featherweight.methods.quantize.transforms",
    "grid": "featherweight.methods.quantize.grids",
    "rounding": "featherweight.methods.quantize.rounding",
    "correction": "featherweight.methods.quantize.corrections",
    "allocation": "featherweight.methods.budget",
    "statistic": "featherweight.methods.calibrate.statistics",
    "forward": "featherweight.methods.train.forwards",
    "backward": "featherweight.methods.train.backwards",
    "side": "featherweight.methods.train.sides",
    "activation": "featherweight.methods.train.activations",
    "schedule": "featherweight.methods.train.schedules",
    "importer": "featherweight.interop.importers",
    "exporter": "featherweight.interop.exporters",
    "target": "featherweight.interop.targets",
    "sensitivity": "featherweight.tasks.fit.measures",
}

_lock = threading.Lock()
"""Guards the four tables below."""
_entries: dict[str, dict[str, type]] = {axis: {} for axis in PACKAGES}
_origins: dict[tuple[str, str], str] = {}
_scanned: set[str] = set()
_failed: dict[Plugin, str] = {}


class _Loading(threading.local):
    """What this thread is importing: a plug-in, and what it has registered so far."""

    plugin: Plugin | None = None
    taken: list[tuple[str, str]]


_loading = _Loading()


def register(axis: str, name: str) -> Callable[[T], T]:
    """Class decorator: make the class known as `name` on `axis` and set its `kind`.

    A name can be taken once; the same class defined again (a module reloaded, a cell run twice) takes its own place.
    ValueError where another class has the name, or there is no such axis.
    """
    if axis not in PACKAGES:
        raise ValueError(f"there is no axis called {axis!r}{nearest(axis, PACKAGES)}; known: {', '.join(PACKAGES)}")

    def keep(cls: T) -> T:
        if not cls.__module__.startswith(f"{PACKAGES[axis]}."):
            _scan(axis)  # so that whoever takes a name of ours is told, and not whoever looks for ours later
        cls.kind = name  # type: ignore[attr-defined]
        origin = _origin_of(cls)
        with _lock:
            if _loading.plugin in _failed:  # another thread has given it up while this one waited for its import
                return cls
            other = _entries[axis].get(name)
            if other is not None and _place_of(other) != _place_of(cls):
                raise ValueError(
                    f"{axis} {name!r} is registered twice, by {_named(other, _origins.get((axis, name), ''))} and "
                    f"{_named(cls, origin)}: give the second another name"
                )
            _entries[axis][name] = cls
            _origins[axis, name] = origin
        plugin = _loading.plugin  # may import modules of ours, or of another plug-in, that register their own
        if plugin is not None and origin == plugin.distribution and other is None:
            _loading.taken.append((axis, name))
        return cls

    return keep


def _place_of(cls: type) -> tuple[str, str]:
    """Where a class is defined: module and name in it."""
    return cls.__module__, cls.__qualname__


def _named(cls: type, origin: str) -> str:
    """A class for an error text: its place, and the distribution where it has one."""
    return ".".join(_place_of(cls)) + (f" (of {origin})" if origin else "")


def _origin_of(cls: type) -> str:
    """The distribution that a class comes from; "" where none is known, as for a class of a script."""
    top = cls.__module__.partition(".")[0]
    if top == OURS:
        return OURS
    owners = {plugin.distribution for plugin in plugins(METHODS_GROUP) if plugin.module.partition(".")[0] == top}
    if len(owners) == 1:
        return owners.pop()
    return "" if _loading.plugin is None else _loading.plugin.distribution


def registered(axis: str) -> dict[str, type]:
    """All names of an axis, in alphabetical order.

    Warns
    -----
    FeatherWarning
        Once for each plug-in that cannot be imported.
    """
    _scan(axis)
    _load_plugins()
    with _lock:
        return dict(sorted(_entries[axis].items()))


def _scan(axis: str) -> None:
    """Import the modules of our own package for an axis. Several threads may do so at a time."""
    with _lock:
        if axis in _scanned:
            return
    with _on_cpu():
        package = importlib.import_module(PACKAGES[axis])
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    with _lock:
        _scanned.add(axis)


def _load_plugins() -> None:
    """Import what other distributions add, unless this is called from such an import."""
    with _lock:
        done = METHODS_GROUP in _scanned
    if done or _loading.plugin is not None:
        return
    refused = []
    with _on_cpu():
        for plugin in plugins(METHODS_GROUP):
            _loading.plugin, _loading.taken = plugin, []
            try:
                importlib.import_module(plugin.module)
            except (Exception, SystemExit) as error:
                refused += _refused(plugin, reason_of(error))
            finally:
                _loading.plugin = None
    with _lock:
        _scanned.add(METHODS_GROUP)
    for text in refused:  # last, as a warning may be made an error
        warnings.warn(text, FeatherWarning, stacklevel=3)


def _refused(plugin: Plugin, reason: str) -> list[str]:
    """Take back what a plug-in registered before it failed. Returns what to say of it, once for all threads."""
    with _lock:
        for axis, name in _loading.taken:
            _entries[axis].pop(name, None)
            _origins.pop((axis, name), None)
        if plugin in _failed:
            return []
        _failed[plugin] = reason
    return [f"the plug-in {plugin.distribution} is left out, its module {plugin.module} cannot be imported: {reason}"]


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """The first scan may come while transformers builds a model on "meta"; constants of modules must be real."""
    if "torch" not in sys.modules:
        return contextlib.nullcontext()
    import torch  # waits for a thread that is just importing it

    return torch.device("cpu") if hasattr(torch, "device") else contextlib.nullcontext()


def find(axis: str, name: str) -> type:
    """The class registered as `name` on `axis`; a RecipeError naming the nearest one otherwise."""
    known = registered(axis)
    if name not in known:
        raise RecipeError(
            f"there is no {axis} called {name!r}{nearest(name, known)}; known: {', '.join(known)}{left_out()}"
        )
    return known[name]


def origin(axis: str, name: str) -> str:
    """Where a registered choice comes from: "featherweight", or another distribution's name and version.

    For a class that no installed distribution brings (one of a script), its module.
    """
    cls = find(axis, name)
    with _lock:
        return _origins.get((axis, name)) or cls.__module__


def left_out() -> str:
    """`; left out, as they cannot be imported: ...` where there are such plug-ins, else an empty string."""
    with _lock:
        names = sorted({plugin.distribution for plugin in _failed})
    return f"; left out, as they cannot be imported: {', '.join(names)}" if names else ""


def nearest(name: str, known: object) -> str:
    """`, did you mean 'x'?` for the closest known name, whatever its case and dashes, else an empty string."""
    plain = {_plain(k): str(k) for k in known}  # type: ignore[attr-defined]
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    return f" (did you mean {plain[close[0]]!r}?)" if close else ""


def _plain(name: object) -> str:
    return str(name).casefold().replace("_", "-")
