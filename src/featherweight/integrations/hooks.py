"""Registers the featherweight quantizer with transformers as soon as transformers is there, without importing it.

If transformers' quantizer table is loaded already, registration happens at once. Otherwise a finder on `sys.meta_path`
waits for that one module and registers right after it has been executed. A failure there becomes a warning: it must
never break the import of transformers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from featherweight.errors import FallbackWarning

QUANTIZER_TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register now or when transformers' quantizer table is imported. Calling it again changes nothing."""
    if QUANTIZER_TABLE in sys.modules:
        register_or_warn()
    if not any(type(finder).__name__ == AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(QUANTIZER_TABLE, register_or_warn))


def register_or_warn() -> None:
    """Register the quantizer; on failure warn, so that transformers stays usable."""
    try:
        # it registers on import; when it is being imported just now, it is not finished and will do so at its end
        register = getattr(import_module("featherweight.integrations.transformers"), "register", None)
        if register is not None:
            register()
    except Exception as error:
        warnings.warn(
            f"featherweight could not register with transformers ({type(error).__name__}: {error}): compressed folders "
            "will not load with from_pretrained; install versions that fit each other (pip install -U featherweight)",
            FallbackWarning,
            stacklevel=2,
        )


class AfterImport(MetaPathFinder):
    """Calls `then` each time the module `name` has been executed; finds nothing itself."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._call_after(spec.loader)
                return spec
        return None

    def _call_after(self, loader: Loader) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then()

        try:
            loader.exec_module = exec_module  # type: ignore[method-assign]
        except AttributeError:
            warnings.warn(
                f"featherweight cannot watch the import of {self.name} ({type(loader).__name__} is read-only): "
                "import transformers before featherweight",
                FallbackWarning,
                stacklevel=2,
            )
