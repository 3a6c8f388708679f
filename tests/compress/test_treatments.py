"""A treatment per layer, through whole runs: a layer gets what the recipe that treats all layers so gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.recipe import Recipe, recipe_from
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import Compression, compress
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.plan import Plan, make_plan
from models import make_tiny
from outputs import Stop, assert_only_output, contents, stopping

GRID = {"kind": "uniform", "bits": 3, "group_size": 32}
CALIBRATION = {"sequences": 16, "length": 48, "held_out": 0.25}
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
LETTERS = "".join(chr(33 + i * 7 % 90) for i in range(4000))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("source")
    return make_tiny("llama", folder, torch.float32, tokenizer=True, initializer_range=0.1, **SHAPE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(LETTERS)
    return path


def recipe(**fields: Any) -> Recipe:
    return recipe_from({"name": "mine", "grid": GRID, "calibration": CALIBRATION, **fields}, "mine")


def made(source: Path, text: Path | None, out: Path, **fields: Any) -> tuple[Compression, dict[str, Tensor]]:
    done = compress(source, recipe(**fields), out, calibration=text, threads=1)
    assert verify(out).whole
    return done, load_file(out / "model.safetensors")


def of_layers(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """Tensors of the layers whose names contain one of the parts."""
    return {name: value for name, value in tensors.items() if any(f"{part}." in name for part in parts)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() != other.keys() or any(not torch.equal(value, other[name]) for name, value in one.items())


FIRST = "layers.0.self_attn.q_proj"  # what enters it is the same whatever else is done
OTHERS = ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SWEEP = {"kind": "hessian"}


def test_a_calibrated_override_of_a_data_free_recipe(source: Path, text: Path, tmp_path: Path) -> None:
    done, mixed = made(source, text, tmp_path / "mixed", overrides=[{"match": "q_proj", "rounding": SWEEP}])
    _, nearest = made(source, None, tmp_path / "nearest")
    pure, swept = made(source, text, tmp_path / "swept", rounding=SWEEP)
    assert_same(of_layers(mixed, *OTHERS), of_layers(nearest, *OTHERS))
    assert_same(of_layers(mixed, FIRST), of_layers(swept, FIRST))
    assert differ(of_layers(mixed, FIRST), of_layers(nearest, FIRST))
    judged = {layer["name"] for layer in done.layers if "held_out_error" in layer}
    assert judged == {layer["name"] for layer in done.layers if layer["role"] == "q_proj"}
    assert done.layers[0] == pure.layers[0]  # also what its record says
    plain = next(layer for layer in done.layers if layer["role"] == "up_proj")
    assert not {"fallback", "output_error", "damping"} & plain.keys()  # it is what the recipe asks for


def test_a_data_free_override_of_a_calibrated_recipe(source: Path, text: Path, tmp_path: Path) -> None:
    overrides = [{"match": "down_proj", "rounding": {"kind": "nearest"}}]
    _, mixed = made(source, text, tmp_path / "mixed", rounding=SWEEP, overrides=overrides)
    _, nearest = made(source, None, tmp_path / "nearest")
    _, swept = made(source, text, tmp_path / "swept", rounding=SWEEP)
    assert_same(of_layers(mixed, "down_proj"), of_layers(nearest, "down_proj"))
    before = [f"layers.0.{part}" for part in ("self_attn", "mlp.gate_proj", "mlp.up_proj")]
    assert_same(of_layers(mixed, *before), of_layers(swept, *before))
    assert differ(of_layers(mixed, "layers.1.self_attn.q_proj"), of_layers(swept, "layers.1.self_attn.q_proj"))


def test_a_setting_of_the_rounding_for_one_layer(source: Path, text: Path, tmp_path: Path) -> None:
    overrides = [{"match": "*.0.*.k_proj", "rounding": {"damping": 0.5}}]
    _, mixed = made(source, text, tmp_path / "mixed", rounding=SWEEP, overrides=overrides)
    _, damped = made(source, text, tmp_path / "damped", rounding={**SWEEP, "damping": 0.5})
    _, swept = made(source, text, tmp_path / "swept", rounding=SWEEP)
    key = "layers.0.self_attn.k_proj"
    assert_same(of_layers(mixed, key), of_layers(damped, key))
    assert_same(of_layers(mixed, FIRST), of_layers(swept, FIRST))
    assert differ(of_layers(damped, key), of_layers(swept, key))


def test_transforms_and_corrections_of_single_layers(source: Path, tmp_path: Path) -> None:
    hadamard, lorc = {"kind": "hadamard", "block": 64}, {"kind": "lorc", "rank": 2}
    overrides = [
        {"match": "down_proj", "transforms": [hadamard]},
        {"match": "o_proj", "corrections": [lorc]},
        {"match": "mlp", "corrections": []},
        {"match": "*", "grid": {"bits": 4}},  # on each axis the first that names it counts
    ]
    done, mixed = made(source, None, tmp_path / "mixed", corrections=[{**lorc, "rank": 1}], overrides=overrides)
    four = {**GRID, "bits": 4}
    _, rank_1 = made(source, None, tmp_path / "rank 1", grid=four, corrections=[{**lorc, "rank": 1}])
    _, rank_2 = made(source, None, tmp_path / "rank 2", grid=four, corrections=[lorc])
    _, turned = made(source, None, tmp_path / "turned", grid=four, transforms=[hadamard])
    _, plain = made(source, None, tmp_path / "plain", grid=four)
    assert_same(of_layers(mixed, "q_proj", "k_proj", "v_proj"), of_layers(rank_1, "q_proj", "k_proj", "v_proj"))
    assert_same(of_layers(mixed, "o_proj"), of_layers(rank_2, "o_proj"))
    assert_same(of_layers(mixed, "down_proj"), of_layers(turned, "down_proj"))
    assert_same(of_layers(mixed, "gate_proj", "up_proj"), of_layers(plain, "gate_proj", "up_proj"))
    with Checkpoint.open(source) as checkpoint:
        planned = make_plan(checkpoint, recipe(corrections=[{**lorc, "rank": 1}], overrides=overrides))
    assert planned.code_bytes == sum(layer["nbytes"] for layer in done.layers)


@pytest.mark.parametrize("rounding", ["flexround", "adadim"])
def test_layers_opt_out_of_a_rounding_of_blocks(rounding: str, source: Path, text: Path, tmp_path: Path) -> None:
    steps = {"steps": 8} if rounding == "flexround" else {}
    fields: dict[str, Any] = {
        "rounding": {"kind": rounding, **steps},
        "overrides": [
            {"match": "q_proj", "rounding": SWEEP, "transforms": [{"kind": "hadamard", "block": 64}]},
            {"match": "v_proj", "rounding": {"kind": "nearest"}},
        ],
        "calibration": {**CALIBRATION, "held_out": 0},  # without the comparison with data-free blocks
    }
    done, mixed = made(source, text, tmp_path / "mixed", **fields)
    _, nearest = made(source, None, tmp_path / "nearest")
    _, all_alike = made(source, text, tmp_path / "all", rounding=fields["rounding"], calibration=fields["calibration"])
    alone = {"rounding": SWEEP, "transforms": [{"kind": "hadamard", "block": 64}]}
    _, swept = made(source, text, tmp_path / "swept", **alone, calibration=fields["calibration"])
    assert_same(of_layers(mixed, "v_proj"), of_layers(nearest, "v_proj"))
    assert_same(of_layers(mixed, FIRST), of_layers(swept, FIRST))
    if rounding == "flexround":
        assert differ(of_layers(mixed, "layers.0.mlp.up_proj"), of_layers(nearest, "layers.0.mlp.up_proj"))
    assert of_layers(mixed, "up_proj").keys() == of_layers(all_alike, "up_proj").keys()
    assert len(done.layers) == 14


def test_layers_opt_out_of_a_rounding_of_the_model(source: Path, text: Path, tmp_path: Path) -> None:
    rounding = {"kind": "discquant", "steps": 4, "batch_size": 2}
    overrides = [{"match": "k_proj", "rounding": {"kind": "nearest"}, "grid": {"kind": "trit-planes"}}]
    done, mixed = made(source, text, tmp_path / "mixed", rounding=rounding, overrides=overrides)
    _, trits = made(source, None, tmp_path / "trits", grid={"kind": "trit-planes", "group_size": 32})
    keys = [layer for layer in done.layers if layer["role"] == "k_proj"]
    assert [layer["code"][:1] for layer in keys] == ["2", "2"]
    assert not any("fallback" in layer for layer in keys)
    assert of_layers(mixed, "k_proj").keys() == of_layers(trits, "k_proj").keys()
    needing = [{"match": "k_proj", "rounding": SWEEP}]
    with pytest.raises(RecipeError, match=r"discquant treats the whole model at once, so no statistics of .*k_proj"):
        made(source, text, tmp_path / "no", rounding=rounding, overrides=needing)


BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "scales": ("transforms", {"kind": "awq"}),
    "tuning": ("corrections", {"kind": "scale-tuning", "against": "block", "steps": 24, "learning_rate": 0.02}),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_layers_opt_out_of_choices_of_blocks(case: str, source: Path, text: Path, tmp_path: Path) -> None:
    """A layer without it is what it would be in a recipe without it, as far as the same enters it."""
    axis, choice = BLOCKS[case]
    fields: dict[str, Any] = {axis: [choice], "calibration": {**CALIBRATION, "held_out": 0, "batch_tokens": 96}}
    done, mixed = made(source, text, tmp_path / "mixed", **fields, overrides=[{"match": "attention", axis: []}])
    _, plain = made(source, None, tmp_path / "plain")
    _, everywhere = made(source, text, tmp_path / "everywhere", **fields)
    attention, rest = ("self_attn.q_proj", "self_attn.o_proj"), ("mlp.up_proj", "post_attention_layernorm")
    assert_same(of_layers(mixed, *attention), of_layers(plain, *attention))
    assert differ(of_layers(everywhere, *attention), of_layers(plain, *attention))
    assert differ(of_layers(mixed, *rest), of_layers(plain, *rest))
    assert len(done.layers) == 14


def test_attention_opts_out_of_the_shift_behind_it(source: Path, text: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"corrections": [{"kind": "mean-shift"}], "calibration": {**CALIBRATION, "held_out": 0}}
    overrides = [{"match": "attention", "corrections": []}]
    _, everywhere = made(source, text, tmp_path / "everywhere", **fields)
    _, mixed = made(source, text, tmp_path / "mixed", **fields, overrides=overrides)
    assert {"model.layers.0.mlp.up_proj.bias", "lm_head.bias"} <= everywhere.keys()
    assert [name for name in mixed if name.endswith("bias")] == ["lm_head.bias"]


def test_statistics_from_a_file_serve_the_layers_that_need_them(source: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    gather_statistics(source, file, text, ("gram", "held_out_gram"), CALIBRATION)
    overrides = [{"match": "q_proj", "rounding": SWEEP}]
    done, mixed = made(source, file, tmp_path / "mixed", overrides=overrides)
    _, nearest = made(source, None, tmp_path / "nearest")
    _, swept = made(source, file, tmp_path / "swept", rounding=SWEEP)
    assert_same(of_layers(mixed, *OTHERS), of_layers(nearest, *OTHERS))
    assert_same(of_layers(mixed, "q_proj"), of_layers(swept, "q_proj"))
    assert not any("fallback" in layer for layer in done.layers if layer["role"] != "q_proj")


@pytest.mark.parametrize("layer", [2, 9])
def test_a_mixed_run_resumes_with_the_same_result(layer: int, source: Path, text: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"overrides": [{"match": "attention", "rounding": SWEEP}]}
    made(source, text, tmp_path / "whole" / "out", **fields)
    out = tmp_path / "cut" / "out"
    with pytest.raises(Stop):
        compress(source, recipe(**fields), out, calibration=text, threads=1, observer=stopping("layer", layer))
    compress(source, recipe(**fields), out, calibration=text, threads=1)
    assert_only_output(out, contents(tmp_path / "whole" / "out"))


def plan_of(source: Path, **fields: Any) -> Plan:
    with Checkpoint.open(source) as checkpoint:
        return make_plan(checkpoint, recipe(**fields), 1)


def test_plans_follow_the_treatments(source: Path) -> None:
    free, swept = plan_of(source), plan_of(source, rounding=SWEEP)
    one = plan_of(source, overrides=[{"match": "k_proj", "rounding": SWEEP}])
    assert (free.needs, one.needs, swept.needs) == ((), ("gram",), ("gram",))
    assert one.summary()["needs"] == ["gram"]
    assert one.calibration_bytes() < swept.calibration_bytes()  # its gram is of 128 inputs, that of down_proj of 256
    order = plan_of(source, overrides=[{"match": "k_proj", "rounding": {**SWEEP, "order": "similarity"}}])
    assert order.code_bytes - one.code_bytes == 2 * order.jobs[1].treatment.rounding.extra_bytes((64, 128)) > 0
    tuned = plan_of(source, corrections=[{"kind": "scale-tuning", "against": "block"}])
    assert tuned.calibration_bytes() > plan_of(source, corrections=[{"kind": "mean-shift"}]).calibration_bytes()


def test_the_other_slices_of_a_tensor_stay_as_they_are(tmp_path: Path) -> None:
    """Whatever the recipe does to the layers that are compressed."""
    source = make_tiny("gpt-oss", tmp_path / "source", torch.float32)
    skip = "model.layers.0.mlp.experts.down_proj[1]"
    fields = {"layers": {"skip": [skip]}, "transforms": [{"kind": "hadamard", "block": 32}]}
    done = compress(source, recipe(**fields), tmp_path / "out", threads=1)
    kept = next(layer for layer in done.layers if layer["name"] == skip)
    assert (kept["code"], kept["relative_error"]) == ("dense float32", 0.0)
