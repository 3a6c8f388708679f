"""Measuring: perplexity by named protocol, divergence from the original, true sizes, speed, and the report."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from featherweight.evaluate.evaluation import Evaluation, bundled_text, evaluate
from featherweight.evaluate.size import Size, measure_size

__all__ = ["Evaluation", "Size", "bundled_text", "evaluate", "measure_size"]


class _CallableModule(ModuleType):
    """Importing this package sets the attribute `evaluate` of `featherweight` to the package. The public function of
    the same name has to work all the same, so calling the package calls the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Evaluation:
        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
