"""Packages outside ours that add methods and presets, found by the entry points of what is installed.

    [project.entry-points."featherweight.plugins"]
    mine = "my_package.methods"        # a module; importing it registers classes with `@register`

    [project.entry-points."featherweight.recipes"]
    mine = "my_package.recipes"        # a package whose folder holds presets, a YAML file each

docs/adding-a-method.md builds such a package. What is wrong with one of them is a warning that names it, and the others
work on. Importing a plug-in runs its code, as importing any installed package does.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from featherweight.errors import FeatherWarning

METHODS_GROUP = "featherweight.plugins"
RECIPES_GROUP = "featherweight.recipes"
OURS = "featherweight"
"""Where a choice or preset comes from that is not from a plug-in."""


@dataclass(frozen=True, order=True)
class Plugin:
    """An entry point of an installed distribution.

    distribution : its name and version, "featherweight-nf4 0.1.0"
    module : the module or package that it names
    """

    distribution: str
    module: str


@functools.cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """Entry points of a group, by distribution and module: the order in which they are loaded.

    Looked up once in a process: what is installed later is seen by the next one.
    """
    return tuple(sorted({Plugin(_distribution_of(entry), entry.module) for entry in entry_points(group=group)}))


def _distribution_of(entry: EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def reason_of(error: BaseException) -> str:
    """What stopped a plug-in, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@functools.cache
def plugin_presets(ours: frozenset[str]) -> dict[str, tuple[Path, str]]:
    """Presets of other packages: name -> the file, and the distribution it comes from.

    A name that is taken, `ours` or another's, and an entry point that names no folder are each a FeatherWarning.
    """
    found: dict[str, tuple[Path, str]] = {}
    for plugin in plugins(RECIPES_GROUP):
        try:
            folders = _folders_of(plugin.module)
        except (Exception, SystemExit) as error:  # finding a package imports those around it
            _warn(f"the presets of {plugin.distribution} are left out: {reason_of(error)}")
            continue
        for path in sorted((p for folder in folders for p in folder.glob("*.yaml")), key=lambda p: p.stem):
            if path.stem in ours | found.keys():
                other = OURS if path.stem in ours else found[path.stem][1]
                _warn(
                    f"the preset {path.stem!r} of {plugin.distribution} is left out, as {other} has one of that name: "
                    f"rename {path}"
                )
            else:
                found[path.stem] = (path, plugin.distribution)
    return found


def _folders_of(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not a package with a folder, which the group {RECIPES_GROUP!r} asks for")
    return [Path(place) for place in spec.submodule_search_locations]


def _warn(text: str) -> None:
    warnings.warn(text, FeatherWarning, stacklevel=3)
