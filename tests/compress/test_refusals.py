"""What cannot be done is said by the plan where recipe and shapes alone say so, and before any layer is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import RecipeError
from featherweight.methods.quantize.base import Correction
from featherweight.methods.recipe import load_recipe, presets, recipe_from
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.compress.refusals import check_recipe

UNIFORM = {"kind": "uniform", "bits": 4}
TUNING = {"kind": "scale-tuning", "against": "model"}


def recipe(**fields: Any) -> Any:
    return recipe_from({"name": "mine", "grid": UNIFORM, **fields}, "mine")


TOGETHER = {
    "norms of awq, then tuning of the model": (
        {"transforms": [{"kind": "awq"}], "corrections": [TUNING]},
        "scale-tuning compares with the original model, .* that awq changes",
    ),
    "shifted norms": (
        {"corrections": [{"kind": "mean-shift"}, TUNING]},
        "scale-tuning compares with .* that mean-shift changes",
    ),
    "trained norms": (
        {"corrections": [{"kind": "scale-tuning", "against": "block", "norms": True}, TUNING]},
        "scale-tuning compares with .* that scale-tuning changes",
    ),
    "rotated layers": (
        {"rounding": {"kind": "flexround"}, "transforms": [{"kind": "hadamard"}]},
        "flexround makes the codes of a whole block, to which hadamard would not be applied",
    ),
    "rounded inputs": (
        {"rounding": {"kind": "adadim"}, "transforms": [{"kind": "quantize-inputs"}]},
        "adadim makes the codes of a whole block, to which quantize-inputs would not be applied",
    ),
    "scaled blocks": (
        {"rounding": {"kind": "flexround"}, "transforms": [{"kind": "awq"}]},
        "to which awq would not be applied",
    ),
    "low rank": (
        {"rounding": {"kind": "flexround"}, "corrections": [{"kind": "lorc"}]},
        "to which lorc would not be applied",
    ),
    "shifts between layers": (
        {"rounding": {"kind": "flexround"}, "corrections": [{"kind": "mean-shift"}]},
        "to which mean-shift would not be applied",
    ),
    "corrections of the whole model's codes": (
        {"rounding": {"kind": "discquant"}, "corrections": [{"kind": "lorc"}, {"kind": "absorb"}]},
        "discquant makes the codes of a whole model, to which lorc and absorb would not be applied",
    ),
    "levels": (
        {"rounding": {"kind": "flexround"}, "grid": {"kind": "trit-planes"}},
        "flexround cannot round .*q_proj, whose grid is trit-planes: it needs a uniform grid",
    ),
    "one layer's levels": (
        {"rounding": {"kind": "adadim"}, "overrides": [{"match": "down_proj", "grid": {"kind": "trit-planes"}}]},
        "adadim cannot round .*down_proj, whose grid is trit-planes",
    ),
    "trits": ({"rounding": {"kind": "trit-descent"}}, "trit-descent cannot round .* needs the grid trit-planes"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_the_plan_refuses(llama: Path, tmp_path: Path, case: str) -> None:
    fields, words = TOGETHER[case]
    chosen = recipe(**fields)
    with Checkpoint.open(llama) as checkpoint, pytest.raises(RecipeError, match=words):
        make_plan(checkpoint, chosen)
    with pytest.raises(RecipeError, match=words):
        compress(llama, chosen, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_go_together(llama: Path, name: str) -> None:
    with Checkpoint.open(llama) as checkpoint:
        make_plan(checkpoint, load_recipe(name))


def test_an_order_that_does_not_divide_a_layer_is_refused_with_the_nearest(llama: Path, tmp_path: Path) -> None:
    """By the plan, of the layers that are rotated; a power of two gives way to a smaller one."""
    words = "transform hadamard cannot treat .*q_proj: block is 100, expected .* that divides 64; nearest is 64"
    with Checkpoint.open(llama) as checkpoint:
        with pytest.raises(RecipeError, match=words):
            make_plan(checkpoint, recipe(transforms=[{"kind": "hadamard", "block": 100}]))
        for fields in ({"block": 100, "roles": ["nowhere"]}, {"block": 128}, {"block": "whole"}):
            make_plan(checkpoint, recipe(transforms=[{"kind": "hadamard", **fields}]))
    with pytest.raises(RecipeError, match=words):
        compress(llama, recipe(transforms=[{"kind": "hadamard", "block": 100}]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_rotation_that_the_structure_forbids(tiny: Callable[..., Path]) -> None:
    chosen = recipe(transforms=[{"kind": "rotation"}])
    with (
        Checkpoint.open(tiny("gpt2")) as checkpoint,
        pytest.raises(RecipeError, match="transform rotation .*norms have biases"),
    ):
        make_plan(checkpoint, chosen)


def test_an_unknown_statistic_is_named_before_anything_is_gathered() -> None:
    class Curious(Correction):
        kind = "curious"

        @property
        def needs(self) -> tuple[str, ...]:
            return ("variance",)

    with pytest.raises(
        RecipeError,
        match="needs the statistic 'variance': there is no statistic called 'variance'.*known are base, cross",
    ):
        check_recipe(recipe(corrections=[Curious()]))


def test_statistics_that_cannot_serve_are_refused_before_the_weights_are_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featherweight.tasks.compress import compression

    def too_late(*_: Any) -> None:
        pytest.fail("weights were read first")

    monkeypatch.setattr(compression, "scan_tensor", too_late)
    monkeypatch.setattr(compression, "make_plan", too_late)
    (tmp_path / "any.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="runs the network .*give it a text"):
        compress(llama, "awq", tmp_path / "out", calibration=tmp_path / "any.safetensors")
