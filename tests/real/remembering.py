"""What tests on real models share: an original that reads each window of the text once, the machine's precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from featherweight.system.devices import device_named
from featherweight.tasks.evaluate.opening import open_model


def remembering(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, opened as `evaluate` does; what it made of a window is kept for the next time."""
    model, tokenizer = open_model(folder, "auto", device_named("auto"))
    body, known = model.model, dict[bytes, Any]()
    compute = body.forward

    def forward(*args: Any, input_ids: Tensor, **named: Any) -> Any:
        key = repr(tuple(input_ids.shape)).encode() + input_ids.cpu().numpy().tobytes()
        if key not in known:
            known[key] = compute(*args, input_ids=input_ids, **named)
        return known[key]

    body.forward = forward
    return model, tokenizer


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """Networks run in the type that is faster here, as they do for users: orderings are the same in both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEATHERWEIGHT_PRECISION", raising=False)
        yield
