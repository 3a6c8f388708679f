"""Make the weights of neural networks small, measure what it costs, and run the result.

Importing this package is cheap: torch and transformers are loaded on first use. It also teaches transformers to read
compressed folders, so that `AutoModelForCausalLM.from_pretrained(folder)` works.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from featherweight.integrations.hooks import install

if TYPE_CHECKING:
    from featherweight.api import compress, evaluate, load

__all__ = ["__version__", "compress", "evaluate", "load"]
__version__ = "0.1.0"


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
    if name in ("compress", "evaluate", "load"):
        return getattr(import_module("featherweight.api"), name)
    raise AttributeError(f"module 'featherweight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
