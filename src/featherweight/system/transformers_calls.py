"""One wrapper around every call into transformers: whatever it raises becomes one sentence of ours.

Third-party code raises what it likes (AttributeError for a null in config.json, IndexError for a token without a row,
huggingface_hub's own validation errors, panics of Rust), so nothing narrower than Exception can be caught. Our own
errors, Ctrl-C and a lack of memory pass.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from featherweight.errors import CheckpointError, FeatherError

PANIC = "PanicException"
"""What a fault in a library written in Rust (tokenizers, safetensors) raises; it is no Exception."""
LONGEST = 300
"""Characters of a foreign message that are passed on."""


class Leaving(Exception):
    """Raised by our own code within a call into transformers, to leave it: nothing went wrong."""


@contextmanager
def asking_transformers(
    action: str,
    hint: str = "",
    error: type[FeatherError] = CheckpointError,
    passing: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """Turn exceptions of the calls within into `error`.

    Parameters
    ----------
    action : what is asked for, to follow "transformers cannot": "load FOLDER".
    hint : what to do about it, put behind the reason.
    error : class of the error raised.
    passing : what else is let through, for a caller that knows what to do.
    """
    ours: tuple[type[BaseException], ...] = (FeatherError, MemoryError, Leaving, *passing)
    try:
        yield
    except ours:
        raise
    except BaseException as reason:
        if not isinstance(reason, Exception) and type(reason).__name__ != PANIC:
            raise
        raise error(f"transformers cannot {action}: {one_line(reason)}{f'; {hint}' if hint else ''}") from reason


def one_line(reason: BaseException) -> str:
    """The text of an exception on one line, with its kind where that text says nothing (a KeyError's is a name)."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(str(reason).split()))
    text = text.partition("Exception raised from ")[0].rstrip()  # behind it PyTorch lists its stack
    text = re.sub(r"torch\.Size\((\[[^\]]*\])\)", r"\1", text)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)  # no codes for the terminal
    if len(text) > LONGEST:
        text = text[: LONGEST - 4].rstrip() + " ..."
    if not text or isinstance(reason, LookupError | AttributeError | TypeError):
        text = f"{type(reason).__name__} {text}".rstrip()
    return text.rstrip(".")


def cache_name(model: Any) -> str:
    """What a model's forward, and its output, call the keys and values: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def knows_quant_method(method: str) -> bool:
    """Whether the installed transformers has a quantiser of this name; it skips a `quantization_config` without one."""
    with asking_transformers("tell which quantisation methods it knows"):
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    return method in AUTO_QUANTIZATION_CONFIG_MAPPING
