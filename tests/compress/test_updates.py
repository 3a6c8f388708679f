"""QuantLRM's statistics of the whole model (arXiv 2602.02581): the changes of all layers, streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.recipe import load_recipe
from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.updates import model_update_range, updates_of

NARROW = SolveOptions(window_bytes=2048)  # a few rows at a time
CHANGES = ["calibration.sequences=8", "calibration.length=32", "transforms=[{kind: quantlrm, search_tokens: 64}]"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_range_is_that_of_all_layers_together(family: str, tiny: Callable[..., Path]) -> None:
    tuned, base = (tiny(family, tokenizer=True, seed=seed) for seed in (0, 1))
    with Checkpoint.open(tuned) as one, Checkpoint.open(base) as other:
        layers = read_anatomy(one).layers
        tensors = dict.fromkeys(layer.tensor for layer in layers)
        whole = torch.cat([(one.tensor(n).float() - other.tensor(n).float()).abs().flatten() for n in tensors])
        told: list[dict[str, Any]] = []
        found = model_update_range(one, other, layers, NARROW, told.append)
        parts = list(updates_of(one, other, layers, NARROW))
    positive = whole[whole > 0].sort().values
    expected = torch.stack([positive[0], positive[(len(positive) - 1) // 2], positive[-1]])
    assert torch.equal(found, expected)
    assert sum(part.numel() for part in parts) == whole.numel()
    assert max(part.numel() for part in parts) <= 2048 // 4
    assert told[0]["unchanged"] == pytest.approx(1 - len(positive) / len(whole), abs=1e-12)


def test_an_unchanged_model_has_no_range(llama: Path) -> None:
    with Checkpoint.open(llama) as one:
        told: list[dict[str, Any]] = []
        found = model_update_range(one, one, read_anatomy(one).layers, NARROW, told.append)
    assert bool(found.isnan().all())
    assert told[0]["unchanged"] == 1


def test_another_shape_is_refused_by_name(tiny: Callable[..., Path], llama: Path) -> None:
    wide = tiny("llama", intermediate_size=192)
    with Checkpoint.open(llama) as one, Checkpoint.open(wide) as other, pytest.raises(RecipeError, match=r"gate_proj"):
        list(updates_of(one, other, read_anatomy(one).layers, NARROW))


def test_the_recipe_uses_the_model_s_range_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tuned, base = (tiny("llama", tokenizer=True, seed=seed) for seed in (0, 1))
    told: list[dict[str, Any]] = []
    made = compress(
        tuned, load_recipe("quantlrm", CHANGES), tmp_path / "out", base_model=base, threads=1, observer=told.append
    )
    ranges = [fact for fact in told if fact.get("event") == "updates"]
    assert len(ranges) == 1
    assert ranges[0]["layers"] == len(made.layers) == 14
    assert 0 < ranges[0]["least"] < ranges[0]["median"] < ranges[0]["largest"]
