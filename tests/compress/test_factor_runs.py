"""Factorised layers through the whole line: shares by measured errors, stopped and resumed, as a way of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight
from featherweight.errors import RecipeError
from featherweight.methods.recipe import Recipe, recipe_from
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.allocate import Measuring, allocated, measured
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.fit.settings import FitSettings
from models import make_tiny
from outputs import Stop, assert_only_output, contents, stopping


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose layers are of low rank."""
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    folder = make_tiny("llama", tmp_path_factory.mktemp("source"), torch.bfloat16, tokenizer=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in EASY:
        weight = tensors[f"{name}.weight"].float()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        tensors[f"{name}.weight"] = ((u[:, :6] * s[:6]) @ v[:6]).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    return folder


EASY = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")


def recipe(**fields: Any) -> Recipe:
    allocation = {"kind": "knapsack", "removed": 0.35, "shares": [0.2, 0.4, 0.7], "kappas": [1, 2]}
    grid = {"kind": "factors", "removed": 0.35}
    return recipe_from({"name": "mine", "grid": grid, "allocation": allocation | fields}, "mine")


@pytest.fixture(scope="module")
def statistics(source: Path) -> Path:
    path = source.parent / "statistics.safetensors"
    text = source.parent / "text.txt"
    text.write_text("".join(f"{number * 7919 % 1000} green bottles hang on the wall. " for number in range(400)))
    needs = ("gram", "held_out_gram")
    settings = {"sequences": 16, "length": 48, "held_out": 0.25}
    return gather_statistics(source, path, text, needs, settings)


def test_layers_of_low_rank_lose_most(source: Path, statistics: Path, tmp_path: Path) -> None:
    done = compress(source, recipe(), tmp_path / "out", calibration=statistics, threads=1)
    assert verify(tmp_path / "out").whole
    total = sum(layer["nbytes"] for layer in done.layers)
    assert total <= 0.65 * 2 * done.weights
    bits = {layer["name"]: layer["bits_per_weight"] for layer in done.layers}
    for name in EASY:
        assert bits[name] < 0.5 * sum(bits.values()) / len(bits)
    assert all(bits[name] <= 16 for name in bits)


def test_what_is_measured(source: Path, statistics: Path) -> None:
    """Weights of codes without data, of codes with data, and outputs of these."""
    found = {}
    with Checkpoint.open(source) as checkpoint:
        for errors in ("weights", "calibrated", "outputs"):
            plan = make_plan(checkpoint, recipe(errors=errors), 1)
            measuring = Measuring(statistics=statistics)
            found[errors] = measured(plan, checkpoint, measuring)
            assert allocated(plan, checkpoint, measuring).code_bytes <= 0.65 * 2 * plan.weights
    name = "model.layers.0.self_attn.q_proj"
    for errors in found.values():
        assert errors[name][-1] == 0  # as it is
        assert errors[name][0] < errors[name][2] < errors[name][4]
    # a rank that serves the outputs misses more of the weights
    assert found["weights"][name][4] < found["calibrated"][name][4]
    assert found["outputs"][name][4] < found["calibrated"][name][4]


def test_data_without_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"knapsack chooses by errors of calibrated codes, .*feather calibrate"):
        compress(source, recipe(errors="calibrated"), tmp_path / "out", threads=1)


def test_killed_it_goes_on_to_the_same_bytes(source: Path, statistics: Path, tmp_path: Path) -> None:
    own = recipe(errors="outputs")
    whole = compress(source, own, tmp_path / "whole", calibration=statistics, threads=1).out
    for event in ("measuring layers", "layer"):
        out = tmp_path / event / "out"
        with pytest.raises(Stop):
            compress(source, own, out, calibration=statistics, threads=1, observer=stopping(event, 5))
        compress(source, own, out, calibration=statistics, threads=1)
        assert_only_output(out, contents(whole))


@pytest.mark.slow
def test_factors_compete_in_a_fit(source: Path, tmp_path: Path) -> None:
    """Beside a plane, which is too coarse, factors get the layers that are of low rank anyway."""
    text = source.parent / "text.txt"
    text.write_text(" ".join(f"{number * 7919 % 1000} bottles" for number in range(2000)))
    settings = FitSettings(ways=("1 plane", "svd-llm", "8 bits"), windows=8, length=64, tokens=128, score=256)
    plain = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    done = featherweight.fit(
        source, tmp_path / "out", int(0.6 * plain), settings=settings, calibration=text, text=text, work=tmp_path
    )
    assert verify(done.out).whole
    assert sum(path.stat().st_size for path in done.out.glob("*.safetensors")) <= int(0.6 * plain)
