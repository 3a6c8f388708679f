"""Small random models for the native decoder, and what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.system.transformers_calls import cache_name
from models import FAMILIES

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
V5 = int(transformers.__version__.split(".")[0]) >= 5


def make_model(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A model of `family` whose parameters are all random and large enough to matter: biases and norms too."""
    config_name, model_name, common = FAMILIES[family]
    config = getattr(transformers, config_name)(**(common | settings))
    torch.manual_seed(7)
    model = getattr(transformers, model_name)(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.to(dtype).save_pretrained(folder)
    return folder


class HalfCache(transformers.DynamicCache):  # type: ignore[misc,name-defined]
    """Keys and values rounded to half precision, as the native decoder keeps them."""

    def update(self, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        return super().update(key.half().float(), value.half().float(), *rest, **named)


@torch.no_grad()
def reference_logits(folder: Path, tokens: list[int], chunks: int | None = None) -> Tensor:
    """Logits [n, vocabulary] in float32 but for the cache; with `chunks`, tokens go in so many at a time."""
    from featherweight.integrations.load import load

    model, _ = load(folder, dtype="float32", attn_implementation="eager")
    cache, found = HalfCache(), []
    for first in range(0, len(tokens), chunks or len(tokens)):
        part = torch.tensor([tokens[first : first + (chunks or len(tokens))]])
        found.append(model(part, use_cache=True, **{cache_name(model): cache}).logits[0])
    return torch.cat(found)


def some_tokens(count: int, vocabulary: int = 256, seed: int = 1) -> list[int]:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
