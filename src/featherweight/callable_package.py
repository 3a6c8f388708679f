"""Packages that share their name with a public function: calling the package calls the function.

Importing `featherweight.evaluate` sets the attribute `evaluate` of `featherweight` to the package, over the function of
that name. `featherweight.evaluate(...)` has to work all the same, whatever was imported before.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str) -> None:
    """Let the package `featherweight.NAME` be called as `featherweight.api.NAME`; for the package's own __init__."""

    class CallablePackage(ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return getattr(import_module("featherweight.api"), package.rpartition(".")[2])(*arguments, **options)

    sys.modules[package].__class__ = CallablePackage
