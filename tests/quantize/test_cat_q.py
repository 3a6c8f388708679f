"""CAT-Q (arXiv 2606.26650): the card's golden numbers, softness, what is kept, and that what is stored was trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyBlock, tiny_model
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.learn.objectives import BlockObjective
from featherweight.methods.quantize.corrections.cat_q import CatQ
from featherweight.methods.quantize.grids.ternary import TernaryGrid
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.modulated import (
    LEFT,
    LowRankChange,
    ModulatedCode,
    hard_trits,
    modulation,
    soft_trits,
)
from featherweight.methods.quantize.tuned import TunedState
from featherweight.methods.recipe import load_recipe
from featherweight.storage.codes import Code
from featherweight.storage.codes.hadamard import Hadamard, rotate
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.run.training_store import NO_STORE, TrainingState, TrainingStore
from featherweight.tasks.compress.compression import compress
from models import make_tiny

ROWS, COLUMNS, SIZE = 6, 80, 32  # a short last group


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def rounded(weight: Tensor, a: float, b: float, c: float) -> tuple[float, float, float, Tensor, Tensor]:
    """mu, al, D and the trits of one group [size], and what stands for it."""
    factors = {name: double(value).view(1, 1, 1) for name, value in zip("abc", (a, b, c), strict=True)}
    group = weight.view(1, 1, -1)
    mu, al, threshold = modulation(group, torch.ones(1, len(weight), dtype=torch.bool), factors)
    trits = hard_trits((group - mu) / al, threshold)
    return float(mu), float(al), float(threshold), trits.view(-1), (al * trits).view(-1)


def golden() -> Tensor:
    j = torch.arange(1, 129, dtype=torch.float64)
    return torch.sin(1.7 * j + 0.3 * j * j) + 0.5 * torch.cos(2.9 * j)


@pytest.mark.parametrize(
    ("factors", "expected", "nonzeros", "error"),
    [
        ((0.0, 0.0, 0.0), (0.13796237, 0.65428538, 0.5), 95, 0.20950955),
        ((0.5, -0.3, 0.7), (0.04054906, 0.81453209, 0.66818777), 69, 0.17896478),
    ],
)
def test_golden_group(
    factors: tuple[float, float, float], expected: tuple[float, ...], nonzeros: int, error: float
) -> None:
    weight = golden()
    mu, al, threshold, trits, value = rounded(weight, *factors)
    assert (mu, al, threshold) == pytest.approx(expected, abs=6e-9)
    assert set(trits.tolist()) == {-1.0, 0.0, 1.0}
    assert int((trits != 0).sum()) == nonzeros
    assert float((weight - value).square().sum() / weight.square().sum()) == pytest.approx(error, abs=6e-9)


def test_shift_and_scale() -> None:
    """A shift changes neither trits nor al; a positive factor is al's, up to the 1e-6 that is added."""
    weight = golden()
    _, al, _, trits, _ = rounded(weight, 0.5, -0.3, 0.7)
    _, shifted, _, of_shifted, _ = rounded(weight + 3, 0.5, -0.3, 0.7)
    _, scaled, _, of_scaled, _ = rounded(5 * weight, 0.5, -0.3, 0.7)
    assert shifted == pytest.approx(al, abs=1e-12)
    assert scaled == pytest.approx(5 * al, rel=1e-5)
    assert torch.equal(of_shifted, trits)
    assert torch.equal(of_scaled, trits)


@pytest.mark.parametrize(
    ("h", "expected"),
    [(0.6, (0.59097553, 0.64749983, 0.99752738)), (0.4, (0.40482839, 0.35158610, 0.00247262))],
)
def test_golden_soft_trits(h: float, expected: tuple[float, ...]) -> None:
    for sharpness, wanted in zip((1.0, 3.0, 30.0), expected, strict=True):
        assert float(soft_trits(double(h), sharpness, double(0.5))) == pytest.approx(wanted, abs=6e-9)


def test_soft_trits_are_odd_bounded_and_become_hard() -> None:
    h, threshold = torch.linspace(-1, 1, 401, dtype=torch.float64), double(0.5)
    away = (h.abs() - 0.5).abs() > 0.02
    missed = []
    for sharpness in (1e-4, 1.0, 3.0, 30.0, 300.0):
        soft = soft_trits(h, sharpness, threshold)
        assert torch.allclose(soft, -soft.flip(0), atol=1e-12)
        assert abs(float(soft[200])) < 1e-15
        assert float(soft.abs().max()) <= 1 + 1e-12
        missed.append(float((soft - hard_trits(h, threshold))[away].abs().mean()))
    assert torch.allclose(soft_trits(h, 1e-4, threshold), h, atol=1e-7)
    assert missed[1:] == sorted(missed[1:], reverse=True)
    assert missed[-1] < 1e-6


def test_hard_trits_at_the_threshold_and_their_gradient() -> None:
    h = torch.tensor([-1.6, -0.5, 0.3, 0.5, 0.501, 1.6], requires_grad=True)
    trits = hard_trits(h, torch.tensor(0.5))
    assert trits.tolist() == [-1, 0, 0, 0, 1, 1]
    trits.sum().backward()
    assert h.grad is not None
    assert h.grad.tolist() == [0, 1, 1, 1, 1, 0]  # through the rounding, not through the clamp


def plain(weight: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What three factors a group make of a weight, row by row and group by group; scales in float16."""
    value = torch.zeros_like(weight)
    for row in range(len(weight)):
        for group, first in enumerate(range(0, weight.shape[1], SIZE)):
            w = weight[row, first : first + SIZE]
            mean = w.mean()
            deviation = (w - mean).abs().mean() + 1e-6
            al = 2 * deviation / (1 + math.exp(-float(a[row, group])))
            mu = mean + math.tanh(float(b[row, group]) / 2) * deviation
            reach = al / (1 + math.exp(-float(c[row, group])))  # al D
            trits = (w - mu >= reach).float() - (w - mu <= -reach).float()
            value[row, first : first + SIZE] = al.half().float() * trits
    return value


def moved(code: ModulatedCode) -> dict[str, Tensor]:
    return {path: v + 0.5 * random(*v.shape, seed=i) for i, (path, v) in enumerate(code.parameters.items())}


def test_without_rank_it_is_three_factors_a_group() -> None:
    weight = random(ROWS, COLUMNS) + 0.3
    given = TernaryGrid(group_size=SIZE).quantize(weight)
    code = ModulatedCode(given, weight, change=LowRankChange(rank=0))
    assert set(code.parameters) == {"a", "b", "c"}
    for values in (code.parameters, moved(code)):
        expected = plain(weight, *(values[name].squeeze(-1) for name in "abc"))
        assert torch.allclose(code.stored(values).decode(), expected, rtol=1e-3)
        code.soften(2e4)  # sharp enough for no weight of these to be in between
        assert torch.allclose(code.decode(values), expected, rtol=1e-3, atol=1e-3)
        code.soften(None)


def test_the_low_rank_change_is_merged() -> None:
    weight = random(ROWS, COLUMNS)
    given = TernaryGrid(group_size=SIZE).quantize(weight)
    code = ModulatedCode(given, weight, change=LowRankChange(rank=3, scale=0.7))
    assert not code.parameters[LEFT].any()
    values = moved(code)
    merged = weight + 0.7 * values["left"] @ values["right"]
    factors = {name: values[name] for name in "abc"}
    other = ModulatedCode(given, merged, change=LowRankChange(rank=0))
    assert torch.equal(code.stored(values).decode(), other.stored(factors).decode())
    assert code.stored(values).spec == given.spec


FORMS: dict[str, Any] = {
    "float16": TernaryGrid(group_size=SIZE),
    "float32": TernaryGrid(group_size=SIZE, scale_dtype="float32"),
    "log8": TritPlaneGrid(planes=1, group_size=SIZE, scale_dtype="log8", fitting="weighted"),
}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_the_hard_forward(form: str, rotated: bool) -> None:
    weight = random(ROWS, COLUMNS)
    given: Code = FORMS[form].quantize(rotate(weight, 16, 1) if rotated else weight)
    given = Hadamard(given, 16, 1) if rotated else given
    code = ModulatedCode(given, weight, change=LowRankChange(rank=3))
    values = {path: value.requires_grad_() for path, value in moved(code).items()}
    hard = code.decode(values)
    stored = code.stored(values)
    assert stored.spec == given.spec
    if rotated:
        assert torch.allclose(stored.decode(), hard, atol=1e-5)
    else:
        assert torch.equal(stored.decode(), hard)
    hard.square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in values.values())


def test_gradients_of_the_soft_forward() -> None:
    """Against differences, through mean and deviation of the changed weight, and the last, short group."""
    weight = random(3, 20).double()
    code = ModulatedCode(TernaryGrid(group_size=8).quantize(weight.float()), weight, change=LowRankChange(rank=2))
    code.soften(2.0)
    values = {path: value.double().requires_grad_() for path, value in moved(code).items()}
    names = list(values)
    assert torch.autograd.gradcheck(
        lambda *tensors: code.decode(dict(zip(names, tensors, strict=True))), tuple(values.values())
    )


def test_softness_over_the_steps() -> None:
    trainer = CatQ(steps=10)
    assert [trainer.sharpness_at(step) for step in (1, 4, 8)] == pytest.approx([3.75, 15, 30])
    assert [trainer.sharpness_at(step) for step in (9, 10)] == [None, None]
    assert CatQ(steps=10, softened=0).sharpness_at(1) is None


GRID = TernaryGrid(scaling="optimal", group_size=32)


def block_of(folder: Path) -> tuple[TinyBlock, dict[str, Code]]:
    session = TinyBlock(*tiny_model(folder), batches=8)
    return session, {name: GRID.quantize(session.weight(name)) for name in session.names}


def huber(session: TinyBlock, codes: dict[str, Code]) -> float:
    """Mean Huber loss over the batch that is held out of eight, the fifth."""
    with torch.no_grad(), session.overridden({name: code.decode() for name, code in codes.items()}):
        missed = (session.run(session.inputs[4], 4) - session.targets[4]).abs()
    return float(torch.where(missed < 1, missed.square() / 2, missed - 0.5).mean())


def test_a_block(tmp_path: Path) -> None:
    """Better than what was given and than CAT-Q's own start; the block is as it was."""
    session, given = block_of(tmp_path)
    before = {name: session.weight(name) for name in session.names}
    told: list[dict[str, Any]] = []
    after = CatQ(steps=20, learning_rate=2e-2, rank=8, checks=2).correct_block(session, given, told.append)
    own = {n: ModulatedCode(code, before[n]) for n, code in given.items()}
    start = {n: code.stored(code.parameters) for n, code in own.items()}
    assert told[-1]["held_out_before"] == pytest.approx(min(huber(session, given), huber(session, start)), rel=1e-4)
    assert told[-1]["held_out_after"] == pytest.approx(huber(session, after), rel=1e-4)
    assert told[-1]["held_out_after"] < 0.8 * told[-1]["held_out_before"]
    for name, code in after.items():
        assert code.spec == given[name].spec
        assert torch.equal(session.weight(name), before[name])


def test_rates_without_use_keep_the_start(tmp_path: Path) -> None:
    session, given = block_of(tmp_path)
    after = CatQ(steps=3, learning_rate=1e4, checks=3).correct_block(session, given)
    for name, code in given.items():
        assert torch.equal(after[name].decode(), code.decode())


def test_a_loss_that_is_not_finite_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, given = block_of(tmp_path)
    told: list[dict[str, Any]] = []
    honest, steps = BlockObjective.backward, []

    def backward(self: BlockObjective, *given: Any) -> float:
        steps.append(honest(self, *given))
        return steps[-1] if len(steps) < 16 else math.nan

    monkeypatch.setattr(BlockObjective, "backward", backward)
    after = CatQ(steps=20, learning_rate=1e-2, rank=8, checks=5).correct_block(session, given, told.append)
    assert [event["step"] for event in told if "stopped" in event] == [15]
    best = min(event["held_out"] for event in told if "held_out" in event)
    assert huber(session, after) == pytest.approx(min(best, told[-1]["held_out_before"]), rel=1e-4)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    session, given = block_of(tmp_path)
    change = LowRankChange(rank=4, unit=0.2)
    trained = {name: ModulatedCode(code, session.weight(name), change=change) for name, code in given.items()}
    state = TunedState(dict(trained), {}, torch.device("cpu"))
    by_layer, _ = state.values()
    sum(1e3 * trained[name].decode(by_layer[name]).square().sum() for name in trained).backward()  # type: ignore[union-attr]
    before = [theta.grad.clone() for theta in state.theta if theta.grad is not None]
    state.clip(1.0)
    after = [theta.grad for theta in state.theta if theta.grad is not None]
    small = {"left", "right"}
    paths = [path for name in trained for path in trained[name].parameters]
    true = [gradient / (0.2 if path in small else 1) for path, gradient in zip(paths, after, strict=True)]
    assert float(torch.cat([g.flatten() for g in true]).norm()) == pytest.approx(1, rel=1e-4)
    ratios = [float(b.norm() / a.norm()) for a, b in zip(before, after, strict=True) if a.any()]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)
    state.clip(5.0)
    assert all(torch.equal(theta.grad, kept) for theta, kept in zip(state.theta, after, strict=True))  # type: ignore[arg-type]


def test_other_grids_are_refused_before_any_work(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    with pytest.raises(RecipeError, match=r"correction cat-q cannot treat model\.layers\.0\..*one trit-plane"):
        compress(model, "cat-q", tmp_path / "out", changes=("grid={kind: uniform, bits: 4}",))
    two = TritPlaneGrid(planes=2, group_size=32).quantize(random(4, 64))
    with pytest.raises(RecipeError, match="cat-q cannot train layer: it trains one trit-plane"):
        CatQ().trainable(two, lambda _: random(4, 64), "layer", torch.device("cpu"))


def test_the_preset_is_one_plane_of_1_725_bits() -> None:
    grid = load_recipe("cat-q").grid
    code = grid.quantize(random(8, 1280))
    assert isinstance(code, TritPlanes)
    assert (code.planes, code.group_size, code.scales.dtype) == (1, 128, torch.float16)
    assert code.bits_per_weight == pytest.approx(1.6 + 16 / 128)


class Remembered(TrainingStore):
    """Keeps the state behind one step, and stops there the first time."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: TrainingState | None = None

    def load(self, task: Any) -> TrainingState | None:
        return self.state

    def due(self) -> bool:
        return True

    def save(self, state: TrainingState) -> None:
        if self.state is None and state.step == self.step:
            self.state = copy.deepcopy(state)
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [6, 18], ids=["soft", "hard"])
def test_a_training_that_goes_on_is_the_same(step: int, tmp_path: Path) -> None:
    session, given = block_of(tmp_path)
    trainer = CatQ(steps=20, learning_rate=2e-2, rank=8, checks=2)

    def train(store: TrainingStore = NO_STORE) -> dict[str, Code]:
        trained = {n: trainer.trainable(code, session.weight, n, session.device) for n, code in given.items()}
        state = TunedState(trained, {}, session.device)
        return trainer.tune(trainer.of_block(session, "float32"), state, store=store)[0]

    whole, store = train(), Remembered(step)
    with pytest.raises(KeyboardInterrupt):
        train(store)
    resumed = train(store)
    assert any(not torch.equal(whole[name].decode(), code.decode()) for name, code in given.items())
    assert all(torch.equal(whole[name].decode(), code.decode()) for name, code in resumed.items())
