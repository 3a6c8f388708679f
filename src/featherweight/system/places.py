"""Where the files that come with the package lie."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
ASSETS = PACKAGE / "assets"
"""The bundled model, its texts and the text to calibrate with."""
PRESETS = PACKAGE / "recipes"
"""Presets, a YAML file each."""
