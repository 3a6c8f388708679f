"""Differentiable decoding, and scales trained after rounding: never worse on held-out samples, digits untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyBlock, tiny_model, tiny_session
from torch import Tensor

from featherweight.methods.learn.objectives import BlockObjective, ModelObjective
from featherweight.methods.quantize.corrections.scale_tuning import ScaleTuning
from featherweight.methods.quantize.decoding import TunableCode
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.storage.codes import Code, code_from
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.product import Product
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.uniform import Uniform

GRIDS = {
    "uniform": UniformGrid(bits=3, group_size=32),
    "symmetric": UniformGrid(bits=8, group_size=32, symmetric=True),
    "planes": TritPlaneGrid(planes=2, group_size=32),
    "tied": TritPlaneGrid(planes=3, tied=True, group_size=32),
    "3 to 2, bytes": TritPlaneGrid(
        planes=2, tied=True, tied_ratio="3:2", group_size=32, scale_dtype="log8", fitting="weighted"
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes() -> dict[str, Code]:
    weight = random(12, 72)
    found: dict[str, Code] = {name: grid.quantize(weight) for name, grid in GRIDS.items()}
    trits = random(12, 72, seed=1).round().clamp(-1, 1).to(torch.int8)
    found["offset"] = OffsetTrits.encode(trits, random(12, 3).abs(), 0.1 * random(12, 3), 32)
    steps = torch.randint(0, 256, (12, 72), generator=torch.Generator().manual_seed(2))
    found["offsets"] = Uniform.encode(steps, random(12, 3).abs() / 99, None, 8, 32, offsets=-random(12, 3).abs())
    signs = random(2, 12, 72).sign().to(torch.int8)
    found["binary"] = BinaryPlanes.encode(signs, random(12, 3, 2).abs(), 32)
    found["codebook"] = Codebook.encode(torch.randint(0, 8, (12, 72)).to(torch.uint8), random(12, 8).sort().values)
    found["low-rank"] = LowRank.encode(random(12, 3), random(3, 72))
    found["low-rank int8"] = LowRank.encode(random(12, 3), random(3, 72), dtype=torch.int8)
    found["hadamard"] = Hadamard(found["planes"], 8, 3)
    found["scaled"] = ColumnScaled(found["hadamard"], random(72).abs().half())
    sparse = Sparse.encode(weight, weight.abs() > 2)
    found["sum"] = Sum.of(found["scaled"], found["low-rank"], sparse)
    atoms, coefficients = GRIDS["symmetric"].quantize(random(12, 5)), random(5, 72)
    found["product"] = Product(atoms, Sparse.encode(coefficients, coefficients > 0))
    return found


CODES = codes()


@pytest.mark.parametrize("name", CODES)
def test_decoding_is_the_code_s_own_and_differentiable(name: str) -> None:
    code = CODES[name]
    tunable = TunableCode(code)
    parameters = {path: value.requires_grad_() for path, value in tunable.parameters.items()}
    assert parameters
    decoded = tunable.decode(parameters)
    assert torch.allclose(decoded, code.decode(), rtol=1e-5, atol=1e-6)
    direction = random(*code.shape, seed=5)
    (decoded * direction).sum().backward()
    for path, parameter in parameters.items():
        assert parameter.grad is not None
        place = int(parameter.grad.abs().argmax())
        step = 1e-2 * float(parameter.detach().abs().mean())
        values = []
        for sign in (1, -1):
            moved = {p: v.detach().clone() for p, v in parameters.items()}
            moved[path].view(-1)[place] += sign * step
            values.append(float((tunable.decode(moved).double() * direction).sum()))
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(parameter.grad.view(-1)[place]), rel=2e-2)


@pytest.mark.parametrize("name", CODES)
def test_stored_values_are_of_the_stored_type(name: str) -> None:
    code = CODES[name]
    tunable = TunableCode(code)
    same = tunable.stored(tunable.parameters)
    assert all(torch.equal(same.tensors()[n], t) for n, t in code.tensors().items())
    moved = tunable.stored({path: value * 1.25 for path, value in tunable.parameters.items()})
    assert moved.spec == code.spec
    again = code_from(moved.spec, moved.tensors())  # checks shapes and dtypes
    assert torch.equal(again.decode(), moved.decode())
    assert not torch.equal(moved.decode(), code.decode())
    for n, tensor in code.tensors().items():
        assert "scale" in n or tensor.is_floating_point() or torch.equal(moved.tensors()[n], tensor)


def test_plain_weights_are_not_tuned() -> None:
    assert TunableCode(Dense(random(3, 4))).parameters == {}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("norms", [False, True])
def test_a_block(grid: Any, norms: bool, tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path))
    before = {name: grid.quantize(session.weight(name)) for name in session.names}
    told: list[dict[str, Any]] = []
    tuner = ScaleTuning(against="block", steps=30, learning_rate=1e-2, norms=norms, checks=3)
    assert tuner.scope == "block"
    after = tuner.correct_block(session, before, told.append)
    assert told[-1]["held_out_after"] < told[-1]["held_out_before"]
    objective = BlockObjective(session)
    tensors = {name: session.tensor(name) for name in session.changed}
    held_out = objective.held_out_loss({name: code.decode() for name, code in after.items()}, tensors)
    assert held_out == pytest.approx(told[-1]["held_out_after"], rel=1e-5)
    assert bool(session.changed) == norms
    for name in session.names:
        assert after[name].spec == before[name].spec
        digits = "codes" if "codes" in before[name].tensors() else "trits"
        assert torch.equal(after[name].tensors()[digits], before[name].tensors()[digits])


def test_a_step_too_wide_keeps_the_start(tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path))
    before = {name: GRIDS["planes"].quantize(session.weight(name)) for name in session.names}
    told: list[dict[str, Any]] = []
    after = ScaleTuning(against="block", steps=4, learning_rate=1e6).correct_block(session, before, told.append)
    for name, code in before.items():
        assert torch.equal(after[name].decode(), code.decode())
    assert [event["event"] for event in told if "stopped" in event] == ["scale-tuning"]  # three rates were tried


def test_a_rate_too_high_is_lowered_until_it_helps(tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path))
    before = {name: GRIDS["planes"].quantize(session.weight(name)) for name in session.names}
    told: list[dict[str, Any]] = []
    ScaleTuning(against="block", steps=30, learning_rate=1.0, checks=15).correct_block(session, before, told.append)
    assert 1 <= sum("begins again" in event.get("text", "") for event in told) <= 3
    assert told[-1]["held_out_after"] < 0.99 * told[-1]["held_out_before"]


def test_one_batch_is_left_alone(tmp_path: Path) -> None:
    session = TinyBlock(*tiny_model(tmp_path), batches=1)
    told: list[dict[str, Any]] = []
    before = {name: GRIDS["planes"].quantize(session.weight(name)) for name in session.names}
    after = ScaleTuning(against="block").correct_block(session, before, told.append)
    assert after == before
    assert told == [{"event": "scale-tuning", "skipped": "no held-out samples"}]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model(precision: str, tmp_path: Path) -> None:
    model = tiny_session(tmp_path, windows=64, held_out=8, length=32, initializer_range=0.1)
    grid = GRIDS["planes"]
    before = {name: grid.quantize(model.weight(name)) for name in model.layers if name != "lm_head"}
    told: list[dict[str, Any]] = []
    tuner = ScaleTuning(steps=32, learning_rate=5e-3, checks=4, batch_size=8, precision=precision)
    after = tuner.tune_model(model, before, told.append)
    assert tuner.scope == "model"
    start, end = told[-1]["held_out_before"], told[-1]["held_out_after"]
    assert end < 0.97 * start
    found = ModelObjective(model).held_out_loss({name: code.decode() for name, code in after.items()}, {})
    assert found == pytest.approx(end, rel=1e-4)


def test_the_divergence_is_that_of_the_whole_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, with a tuned head or without, values and gradients are those of the plain formula."""
    model = tiny_session(tmp_path, initializer_range=0.2)
    weights = {name: model.weight(name) * 1.1 for name in ("model.layers.1.mlp.down_proj", "lm_head")}
    ids = torch.stack(model.windows[:4])
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    log_p = model.module(ids).logits.log_softmax(-1)
    with model.overridden(leaves):
        log_q = model.head(model.hidden(ids)).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()
    for chunk in (1 << 23, 256 * 7):
        monkeypatch.setattr("featherweight.methods.learn.objectives.CHUNK_ELEMENTS", chunk)
        mine = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss = ModelObjective(model, batch_size=4).backward(mine, {}, 0)
        assert loss == pytest.approx(float(expected), rel=1e-4)
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            assert mine[name].grad is not None
            assert torch.allclose(mine[name].grad, leaf.grad, rtol=1e-3, atol=1e-6)
    assert not model.changed


def test_a_share_of_the_tokens_gives_their_part_of_the_divergence(tmp_path: Path) -> None:
    """The mean over the chosen tokens alone, the same ones at every visit, in every window others."""
    model = tiny_session(tmp_path, initializer_range=0.2, length=32)
    weights = {"model.layers.1.mlp.down_proj": model.weight("model.layers.1.mlp.down_proj") * 1.1}
    objective = ModelObjective(model, batch_size=1, token_share=0.25)
    chosen = [objective._compared(torch.arange(32.0).view(1, 32, 1), False, i)[0, :, 0].long() for i in range(2)]
    assert all(len(places) == 8 for places in chosen)
    assert not torch.equal(*chosen)
    for i in (0, 1, 0):
        ids = model.windows[i][None]
        log_p = model.module(ids).logits.log_softmax(-1)
        with model.overridden(weights):
            log_q = model.head(model.hidden(ids)).log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1)[0, chosen[i]].mean()
        mine = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        assert objective.backward(mine, {}, i) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_original_model_diverges_by_nothing(tmp_path: Path) -> None:
    model = tiny_session(tmp_path)
    assert ModelObjective(model).held_out_loss({}, {}) == pytest.approx(0, abs=1e-6)
