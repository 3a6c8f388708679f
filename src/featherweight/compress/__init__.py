"""The streaming run: checkpoint in, compressed Hugging Face folder out, one tensor at a time, resumable."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """Importing this package sets the attribute `compress` of `featherweight` to the package. The public function of
    the same name has to work all the same, so calling the package calls the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from featherweight.api import compress

        return compress(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
