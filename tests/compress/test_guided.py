"""Compression with guided statistics: whole runs, stopped runs, files of statistics, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibrated import SMALL, TEXT

from featherweight import load
from featherweight.errors import RecipeError
from featherweight.methods.recipe import load_recipe
from featherweight.native import library
from featherweight.storage.codes.base import Code
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.gather import gather_statistics
from outputs import Stop, assert_only_output, contents, stopping

GUIDED = (
    *SMALL,
    "calibration.batch_tokens=128",
    "grid.group_size=32",
    "rounding={kind: hessian}",
    "calibration.guidance=1",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def options(text: Path) -> dict[str, Any]:
    return {"recipe": "rtn-3", "changes": GUIDED, "calibration": text, "threads": 1}


def test_guided_layers_say_how_many_tokens_count(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    made = compress(llama, out=tmp_path / "out", **options)
    plain = compress(llama, out=tmp_path / "plain", **options | {"changes": GUIDED[:-1]})
    assert made.bits_per_weight == plain.bits_per_weight
    changed = 0
    for guided, other in zip(made.layers, plain.layers, strict=True):
        assert 32 <= guided["effective_tokens"] <= 8 * 64
        assert "effective_tokens" not in other
        assert guided["held_out_error_alike"] > 0
        changed += guided["relative_error"] != other["relative_error"]
    assert changed == len(made.layers)
    model, _ = load(tmp_path / "out", dtype="float32")
    assert torch.isfinite(model(torch.arange(40)[None]).logits).all()


@pytest.mark.parametrize("recipe", ["trit-1-blockwise", "gptaq", "rsq"])
def test_other_methods_take_guided_statistics(
    llama: Path, tmp_path: Path, options: dict[str, Any], recipe: str
) -> None:
    changes = (*SMALL, "calibration.guidance=1")
    made = compress(llama, out=tmp_path / "out", **options | {"recipe": recipe, "changes": changes})
    assert all(
        "effective_tokens" in layer or "fallback" in layer for layer in made.layers if layer["block"] is not None
    )


def test_runs_of_rows_are_solved_with_moments_of_their_own(
    llama: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    made = {
        groups: compress(
            llama, out=tmp_path / str(groups), **options | {"changes": (*GUIDED[:-1], f"calibration.guidance={groups}")}
        )
        for groups in (1, 3)
    }
    for one, three in zip(made[1].layers, made[3].layers, strict=True):
        assert one["nbytes"] == three["nbytes"]
        assert len(three["runs"]) == 3
        assert one["relative_error"] != three["relative_error"]


@pytest.mark.parametrize("event", ["gradients", "layer"])
def test_a_stopped_run_resumes_with_the_same_result(
    llama: Path, tmp_path: Path, options: dict[str, Any], event: str
) -> None:
    compress(llama, out=tmp_path / "whole", **options)
    out = tmp_path / "cut" / "out"
    with pytest.raises(Stop):
        compress(llama, out=out, observer=stopping(event, 2), **options)
    seen: list[dict[str, Any]] = []
    compress(llama, out=out, observer=seen.append, **options)
    assert_only_output(out, contents(tmp_path / "whole"))
    steps = [one["step"] for one in seen if one["event"] == "gradients"]
    assert (len(steps) > 0) == (event == "gradients")
    assert 2 not in steps


def test_statistics_of_other_guidance_are_refused(llama: Path, tmp_path: Path, text: Path) -> None:
    settings = {"sequences": 8, "length": 64, "held_out": 0.25}
    changes = ("grid.group_size=32", "rounding={kind: hessian}")
    for groups in (0, 1):
        gather_statistics(llama, tmp_path / f"{groups}.safetensors", text, settings=settings | {"guidance": groups})
    file = tmp_path / "1.safetensors"
    with pytest.raises(RecipeError, match=r"gathered with calibration\.guidance 1, recipe rtn-3 has 0: gather it"):
        compress(llama, "rtn-3", tmp_path / "out", calibration=file, changes=changes)
    made = compress(
        llama, "rtn-3", tmp_path / "out", calibration=file, changes=(*changes, "calibration.guidance=1"), threads=1
    )
    plain = compress(
        llama, "rtn-3", tmp_path / "plain", calibration=tmp_path / "0.safetensors", changes=changes, threads=1
    )
    errors = [[layer["relative_error"] for layer in one.layers] for one in (made, plain)]
    assert all(a != b for a, b in zip(*errors, strict=True))


@pytest.mark.parametrize("recipe", ["rtn-4", "discquant"])
def test_a_recipe_without_statistics_has_nothing_to_guide(llama: Path, tmp_path: Path, text: Path, recipe: str) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.guidance 1, but .* gathers no statistics .* set it to 0"):
        compress(llama, recipe, tmp_path / "out", calibration=text, changes=(*SMALL, "calibration.guidance=1"))


def test_codes_are_joined_by_rows() -> None:
    weight = torch.randn(37, 96)
    for recipe in ("rtn-3", "ptqtp", "trit-2"):
        grid = load_recipe(recipe).grid
        whole = grid.quantize(weight, {}) if hasattr(grid, "quantize") else None
        assert whole is not None
        parts: list[Code] = [grid.quantize(rows, {}) for rows in weight.tensor_split(3)]
        joined = type(parts[0]).of_rows(parts)
        assert isinstance(joined, Uniform | TritPlanes)
        assert joined.shape == (37, 96)
        assert torch.equal(joined.decode(), torch.cat([part.decode() for part in parts]))
    assert library.get() is not None


def test_kinds_that_cannot_be_joined_say_so(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    changes = (*SMALL, "calibration.guidance=2")
    with pytest.raises(RecipeError, match=r"codes of the kind offset-trits cannot be made row by row"):
        compress(llama, out=tmp_path / "out", **options | {"recipe": "pt2-llm", "changes": changes})


def test_two_sided_rounding_gets_both_factors(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Against one-sided rounding under H_I, which a diagonal H_O would give: other codes of the same size."""
    changes = (*SMALL, "grid.group_size=32")
    made = compress(llama, out=tmp_path / "out", **options | {"recipe": "yaqa-3", "changes": changes})
    assert len(made.layers) == 14
    assert all(layer["output_damping"] >= 0.1 for layer in made.layers if "fallback" not in layer)
    assert sum("fallback" in layer for layer in made.layers) <= 2
    plain = compress(llama, out=tmp_path / "plain", **options | {"recipe": "gptq-3", "changes": changes})
    both = zip(made.layers, plain.layers, strict=True)
    assert all(one["relative_error"] != other["relative_error"] for one, other in both)
    model, _ = load(tmp_path / "out", dtype="float32")
    assert torch.isfinite(model(torch.arange(40)[None]).logits).all()
