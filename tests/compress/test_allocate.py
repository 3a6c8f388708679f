"""Allocation by measured errors, through the whole line: measured, chosen, stored, planned."""

from __future__ import annotations

import itertools
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
from featherweight.tasks.compress.allocate import Measuring, allocated, can_measure, measured
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.plan import Plan, make_plan
from featherweight.tasks.compress.solve import output_error
from models import make_tiny
from outputs import Stop, assert_only_output, contents, log_events, stopping

GRID = {"kind": "uniform", "bits": 3, "group_size": 32}
MIXED = {"kind": "mixed-precision", "bits": 4.0, "grids": [{"bits": 2}, {"bits": 3}, {"bits": 5}]}
CALIBRATION = {"sequences": 16, "length": 48, "held_out": 0.25}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model two of whose layers are easy to round: their weights are of two values, which two bits can store."""
    torch.set_num_threads(1)
    folder = make_tiny("llama", tmp_path_factory.mktemp("source"), torch.float32, tokenizer=True)
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in EASY:
        tensors[f"{name}.weight"] = 0.02 * (tensors[f"{name}.weight"] > 0)
    save_file(tensors, path, {"format": "pt"})
    return folder


EASY = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")


def recipe(**fields: Any) -> Recipe:
    return recipe_from({"name": "mine", "grid": GRID, "allocation": MIXED, **fields}, "mine")


def plan_of(source: Path, **fields: Any) -> Plan:
    with Checkpoint.open(source) as checkpoint:
        return make_plan(checkpoint, recipe(**fields), 1)


def weights(source: Path) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): tensor for name, tensor in load_file(source / "model.safetensors").items()}


def test_errors_are_those_of_the_weights(source: Path) -> None:
    plan, tensors = plan_of(source), weights(source)
    with Checkpoint.open(source) as checkpoint:
        found = measured(plan, checkpoint, Measuring())
    assert len(found) == 14
    for name, errors in found.items():
        for treatment, error in zip(plan.candidates[name], errors, strict=True):
            decoded = treatment.grid.quantize(tensors[name]).decode().double()
            expected = (decoded - tensors[name]).square().sum() / tensors[name].double().square().sum()
            assert error == pytest.approx(float(expected), rel=1e-6)
        assert errors == sorted(errors, reverse=True)


def test_layers_that_are_easy_to_round_get_less(source: Path, tmp_path: Path) -> None:
    done = compress(source, recipe(), tmp_path / "out", threads=1)
    assert verify(tmp_path / "out").whole
    bits = {layer["name"]: layer["spec"]["bits"] for layer in done.layers}
    assert {bits[name] for name in EASY} == {2}
    assert {bits[name] for name in bits.keys() - set(EASY)} == {3, 5}
    assert done.bits_per_weight <= 4.0
    assert 8 * sum(layer["nbytes"] for layer in done.layers) / done.weights == done.bits_per_weight
    told = [event for event in log_events(tmp_path / "out") if event["event"] == "allocation"]
    assert told[0]["bits_per_weight"] == done.bits_per_weight
    error = sum(
        layer["relative_error"] ** 2 * torch.tensor(layer["spec"]["shape"]).prod().item() for layer in done.layers
    )
    assert told[0]["error"] == pytest.approx(error / done.weights, rel=1e-9)


def test_it_misses_less_than_the_same_grid_everywhere(source: Path, tmp_path: Path) -> None:
    even = recipe(grid={**GRID, "bits": 4}, allocation={"kind": "fixed"})
    plain = compress(source, even, tmp_path / "plain", threads=1)
    grids = [{"bits": bits} for bits in (2, 4, 5)]
    budget = {**MIXED, "grids": grids, "bits": plain.bits_per_weight}
    mixed = compress(source, recipe(allocation=budget), tmp_path / "mixed", threads=1)
    missed = [
        sum(layer["relative_error"] ** 2 * layer["nbytes"] / layer["bits_per_weight"] for layer in done.layers)
        for done in (mixed, plain)
    ]
    assert mixed.bits_per_weight <= plain.bits_per_weight
    assert missed[0] < 0.8 * missed[1]


def test_no_other_choice_of_the_same_bytes_misses_less(source: Path) -> None:
    """All choices tried, for layers and grids that differ by the same bytes: no step is too large where others fit."""
    grids = [{"bits": 2}, {"bits": 3}, {"bits": 4}]
    for bits in (3.2, 3.6, 4.1, 4.5):
        allocation = {**MIXED, "bits": bits, "grids": grids}
        plan = plan_of(source, layers={"include": ["q_proj", "o_proj"]}, allocation=allocation)
        with Checkpoint.open(source) as checkpoint:
            errors = measured(plan, checkpoint, Measuring())
            chosen = allocated(plan, checkpoint, Measuring())
        sizes = [job.layer.parameters for job in plan.jobs]
        nbytes = [[t.nbytes(job.layer.shape) for t in plan.candidates[job.layer.name]] for job in plan.jobs]
        found = [plan.candidates[job.layer.name].index(job.treatment) for job in chosen.jobs]

        def error(places: Any, errors: Any = errors, plan: Any = plan, sizes: Any = sizes) -> float:
            return sum(n * errors[j.layer.name][i] for n, j, i in zip(sizes, plan.jobs, places, strict=True))

        def size(places: Any, nbytes: Any = nbytes) -> int:
            return sum(b[i] for b, i in zip(nbytes, places, strict=True))

        assert size(found) == chosen.code_bytes <= bits / 8 * sum(sizes)
        budget = bits / 8 * sum(sizes)
        best = min(error(p) for p in itertools.product(range(3), repeat=len(sizes)) if size(p) <= budget)
        assert error(found) == pytest.approx(best, rel=1e-12)


def test_plans_are_honest_before_and_after_measuring(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    assert plan.summary()["bytes_are"] == "at most"
    assert plan.code_bytes == int(4.0 * plan.weights / 8)
    assert plan_of(source, allocation={**MIXED, "bits": 99.0}).code_bytes == sum(job.nbytes for job in plan.jobs)
    with Checkpoint.open(source) as checkpoint:
        decided = allocated(plan, checkpoint, Measuring())
    done = compress(source, recipe(), tmp_path / "out", threads=1)
    assert decided.code_bytes == sum(layer["nbytes"] for layer in done.layers) <= plan.code_bytes
    assert decided.summary()["bytes_are"] == "planned after measuring"
    assert plan_of(source, allocation={"kind": "fixed"}).summary()["bytes_are"] == "planned"
    with pytest.raises(RecipeError, match=r"allocation.bits is 1, but .* bits a weight"):
        plan_of(source, allocation={**MIXED, "bits": 1.0})


def test_what_overrides_say_of_the_grid_stays(source: Path, tmp_path: Path) -> None:
    overrides = [{"match": "q_proj", "grid": {"bits": 8}}, {"match": "k_proj", "transforms": [{"kind": "hadamard"}]}]
    done = compress(source, recipe(overrides=overrides, allocation={**MIXED, "bits": 4.2}), tmp_path / "out", threads=1)
    assert [x["spec"]["bits"] for x in done.layers if x["role"] == "q_proj"] == [8, 8]
    turned = [x["spec"] for x in done.layers if x["role"] == "k_proj"]
    assert all(spec["kind"] == "hadamard" and spec["inner"]["bits"] in (2, 3, 5) for spec in turned)
    assert done.bits_per_weight <= 4.2


def test_known_errors_are_not_measured_again(source: Path) -> None:
    plan, known, told = plan_of(source), {}, []  # type: ignore[var-annotated]
    with Checkpoint.open(source) as checkpoint:
        first = allocated(plan, checkpoint, Measuring(known=known), told.append)
        assert len(known) == 14 * 3
        assert sum(event["event"] == "measuring layers" for event in told) == 14
        for key in known:  # whatever is known is believed: with equal errors, the smallest is enough
            known[key] = 0.5
        again = allocated(plan, checkpoint, Measuring(known=known))
    assert {job.grid.settings()["bits"] for job in again.jobs} == {2}
    assert {job.grid.settings()["bits"] for job in first.jobs} == {2, 3, 5}


def test_outputs_are_measured_with_a_file_of_statistics(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i * 7 % 90) for i in range(4000)))
    file = tmp_path / "statistics.safetensors"
    gather_statistics(source, file, text, ("gram", "held_out_gram"), CALIBRATION)
    outputs = {**MIXED, "errors": "outputs"}
    plan = plan_of(source, allocation=outputs)
    assert not can_measure(plan, Measuring())
    assert plan.summary()["needs"] == ["gram"]
    from featherweight.methods.calibrate.statistics_file import load_statistics

    tensors = weights(source)
    with Checkpoint.open(source) as checkpoint:
        found = measured(plan, checkpoint, Measuring(statistics=file))
        grams = {name: known["held_out_gram"] for name, known in load_statistics(file, checkpoint).items()}
    for name in ("model.layers.0.self_attn.q_proj", EASY[0]):
        for treatment, error in zip(plan.candidates[name], found[name], strict=True):
            code = treatment.grid.quantize(tensors[name])
            missed = (tensors[name] - code.decode()).double()
            total = tensors[name].double() @ grams[name].double() @ tensors[name].double().T
            assert error == pytest.approx(float((missed @ grams[name].double() @ missed.T).trace() / total.trace()),
                                          rel=1e-3)  # fmt: skip
            assert error == pytest.approx(output_error(tensors[name], code, grams[name]), rel=1e-9)
    done = compress(source, recipe(allocation=outputs), tmp_path / "out", calibration=file, threads=1)
    assert done.bits_per_weight <= 4.0
    swept = recipe(allocation=outputs, rounding={"kind": "hessian"})
    better = compress(source, swept, tmp_path / "swept", calibration=file, threads=1)
    assert all("held_out_error" in layer for layer in better.layers)
    for calibration in (None, text):
        with pytest.raises(RecipeError, match=r"mixed-precision chooses by errors of outputs, .*feather calibrate"):
            compress(source, recipe(allocation=outputs), tmp_path / "no", calibration=calibration)


def test_a_calibrated_recipe_is_allocated_by_its_weights(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i * 7 % 90) for i in range(4000)))
    fields: dict[str, Any] = {"rounding": {"kind": "hessian"}, "calibration": CALIBRATION}
    free = compress(source, recipe(), tmp_path / "free", threads=1)
    whole = tmp_path / "whole" / "out"
    done = compress(source, recipe(**fields), whole, calibration=text, threads=1)
    assert [x["spec"] for x in done.layers] == [x["spec"] for x in free.layers]
    assert any("output_error" in layer for layer in done.layers)
    out = tmp_path / "cut" / "out"
    with pytest.raises(Stop):
        compress(source, recipe(**fields), out, calibration=text, threads=1, observer=stopping("layer", 5))
    assert compress(source, recipe(**fields), out, calibration=text, threads=1).resumed == 5
    assert_only_output(out, contents(whole))
