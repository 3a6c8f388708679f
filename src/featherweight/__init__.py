"""Make the weights of neural networks small, measure what it costs, and run the result.

Importing this package is cheap: torch and transformers are loaded on first use. It also teaches transformers to read
compressed folders, so that `AutoModelForCausalLM.from_pretrained(folder)` works.

What users import is here: the calls `compress`, `fit`, `heal`, `stack`, `quantize`, `evaluate`, `load`, `resize`,
`import_model`, `export`, `report`; `Recipe`; the errors.
The rooms behind it are, from the ground up, `system`, `pages`, `native`, `storage`, `model`, `methods`, `integrations`,
`tasks`, `cli`; their plan is in docs/architecture.md.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from featherweight.errors import (
    CalibrationError,
    CheckpointError,
    EvaluationError,
    FeatherError,
    FeatherWarning,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from featherweight.integrations.hooks import install
from featherweight.version import __version__

if TYPE_CHECKING:
    from featherweight.integrations.load import load
    from featherweight.integrations.resize import resize
    from featherweight.interop.exporting import export
    from featherweight.interop.importing import import_model
    from featherweight.methods.recipe import Recipe, load_recipe
    from featherweight.tasks.compress.compression import compress
    from featherweight.tasks.compress.memory import quantize
    from featherweight.tasks.evaluate.evaluation import evaluate
    from featherweight.tasks.fit.fitting import fit
    from featherweight.tasks.fit.result import Fit
    from featherweight.tasks.fit.settings import FitSettings
    from featherweight.tasks.heal.healing import heal
    from featherweight.tasks.heal.settings import HealSettings
    from featherweight.tasks.report.written import report
    from featherweight.tasks.stack.stacking import Stacked, StackSettings, cut_stack, stack

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "EvaluationError",
    "FeatherError",
    "FeatherWarning",
    "Fit",
    "FitSettings",
    "HealSettings",
    "NonFiniteError",
    "OutputError",
    "Recipe",
    "RecipeError",
    "StackSettings",
    "Stacked",
    "__version__",
    "compress",
    "cut_stack",
    "evaluate",
    "fit",
    "heal",
    "import_model",
    "export",
    "load",
    "load_recipe",
    "quantize",
    "report",
    "resize",
    "stack",
]

LATER = {
    "compress": "featherweight.tasks.compress.compression",
    "evaluate": "featherweight.tasks.evaluate.evaluation",
    "fit": "featherweight.tasks.fit.fitting",
    "Fit": "featherweight.tasks.fit.result",
    "FitSettings": "featherweight.tasks.fit.settings",
    "heal": "featherweight.tasks.heal.healing",
    "HealSettings": "featherweight.tasks.heal.settings",
    "import_model": "featherweight.interop.importing",
    "export": "featherweight.interop.exporting",
    "load": "featherweight.integrations.load",
    "quantize": "featherweight.tasks.compress.memory",
    "resize": "featherweight.integrations.resize",
    "stack": "featherweight.tasks.stack.stacking",
    "cut_stack": "featherweight.tasks.stack.stacking",
    "Stacked": "featherweight.tasks.stack.stacking",
    "StackSettings": "featherweight.tasks.stack.stacking",
    "report": "featherweight.tasks.report.written",
    "Recipe": "featherweight.methods.recipe",
    "load_recipe": "featherweight.methods.recipe",
}
"""Names that are imported when they are asked for -> where they are."""


def _wait_asleep() -> None:
    """Have the threads of OpenMP, which is PyTorch's, sleep while they wait, where nobody has decided on that.

    By default they wait in a loop. If another process needs the processors, the thread that is waited for does not get
    one, and two threads take many times as long as one (benchmarks/wait_policy.py). OpenMP reads this as it is loaded.
    """
    decided = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if "torch" not in sys.modules and not any(name in os.environ for name in decided):
        os.environ["OMP_WAIT_POLICY"] = "passive"


_wait_asleep()
install()


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module 'featherweight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
