"""What vLLM calls when it starts: the entry point `vllm.general_plugins` of this package.

vLLM asks every process of its own for plug-ins, so this may be called several times, and where vLLM is too old or too
new for `vllm_layers` it warns and leaves vLLM as it is.
"""

from __future__ import annotations

import warnings

from featherweight.errors import FallbackWarning


def register() -> None:
    """Make vLLM know `quant_method: featherweight`. Calling it again changes nothing."""
    try:
        from featherweight.integrations import vllm_layers
    except ImportError as error:
        warnings.warn(
            f"vLLM cannot run folders of featherweight, as it lacks what they need ({error}): use vllm 0.32",
            FallbackWarning,
            stacklevel=2,
        )
        return
    vllm_layers.make_known()
