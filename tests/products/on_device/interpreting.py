"""Triton's interpreter without most of the time it takes.

It puts its own functions in the place of `triton.language`'s once a launch, as it must, and again in every call of a
device function, of which a launch has thousands: looking through the modules takes many times as long as the call.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any
from unittest import mock


class Patching:
    """`_patch_lang` of the interpreter, which leaves alone what the launch that is running has patched already."""

    def __init__(self, patch: Callable[[FunctionType], Any], modules: tuple[Any, ...]) -> None:
        self.patch, self.modules = patch, modules
        self.patched: set[str] = set()
        self.running = False

    def __call__(self, function: FunctionType) -> Any:
        seen = {value.__name__ for value in function.__globals__.values() if self._is_language(value)}
        if self.running and seen <= self.patched:
            return None
        scope = self.patch(function)
        self.patched |= seen
        if self.running or scope is None:  # releases without scopes patch for good
            self.running = True
            return scope
        self.running = True
        return Launch(self, scope)

    def _is_language(self, value: object) -> bool:
        return inspect.ismodule(value) and value in self.modules


class Launch:
    """The scope of a launch: what it patched is as it was behind it."""

    def __init__(self, patching: Patching, scope: Any) -> None:
        self.patching, self.scope = patching, scope

    def restore(self) -> None:
        self.scope.restore()
        self.patching.patched.clear()
        self.patching.running = False


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """Patch once a launch; nothing changes where this release of Triton does it in another way."""
    import triton.language
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        yield
        return
    modules = (triton.language, triton.language.core)
    with mock.patch.object(interpreter, "_patch_lang", Patching(patch, modules)):
        yield
