"""An original that several outputs are measured against: it reads each window of the text once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
