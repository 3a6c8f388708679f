"""Where files lie: those that come with the package, and those that are kept."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"
"""The bundled model, its texts and the text to calibrate with."""
PRESETS = PACKAGE / "recipes"
"""Presets, a YAML file each."""


def cache_folder() -> Path:
    """Where what can be made again is kept: FEATHERWEIGHT_CACHE, else featherweight in the user's cache folder."""
    named = os.environ.get("FEATHERWEIGHT_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "featherweight"
