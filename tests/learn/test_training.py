"""The loop of learned choices: schedule, the best check kept, losses that are not finite."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch

from featherweight.errors import FeatherError
from featherweight.methods.learn import loop
from featherweight.methods.learn.batches import ShuffledRounds
from featherweight.methods.learn.loop import Schedule, Training, minimise
from featherweight.methods.learn.objectives import evenly
from featherweight.methods.learn.optimisers import OPTIMISERS, Optimiser, adam, optimiser_named, sgd
from featherweight.storage.run.training_store import TrainingState, TrainingStore


def test_schedule() -> None:
    schedule = Schedule(100, 0.5, warmup=0.1, checks=4)
    rates = [schedule.rate(step) for step in range(100)]
    assert max(rates) == rates[10] == 0.5
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))
    assert [step for step in range(100) if schedule.checked(step)] == [24, 49, 74, 99]
    assert [step for step in range(3) if Schedule(3, 1.0, checks=8).checked(step)] == [0, 1, 2]
    assert Schedule(1, 1.0).rate(0) == 1.0


@pytest.mark.parametrize(
    "losses", [[5.0, 3.0, 4.0, 6.0, 7.0], [1.0, 3.0, 4.0, 6.0, 7.0], [5.0, math.nan, 4.0, 2.0, 9.0]]
)
def test_the_best_check_is_kept(losses: list[float]) -> None:
    theta = [torch.zeros(1)]
    seen: list[float] = []
    told: list[dict[str, Any]] = []

    def check() -> float:
        seen.append(float(theta[0]))
        return losses[len(seen) - 1]

    def gradients(_: int) -> float:
        theta[0].grad = torch.ones(1)
        return 0.0

    training = Training("test", Schedule(4, 0.1, checks=4))
    minimise(theta, gradients, training, ShuffledRounds(2), check=check, notify=told.append)
    best = min((loss, i) for i, loss in enumerate(losses) if math.isfinite(loss))
    assert float(theta[0]) == seen[best[1]]
    assert told[-1] == {"event": "test", "held_out_before": losses[0], "held_out_after": best[0]}


def test_a_loss_that_is_not_finite_ends_it() -> None:
    theta = [torch.zeros(1)]
    told: list[dict[str, Any]] = []
    minimise(theta, lambda _: math.nan, Training("test", Schedule(5, 0.1)), ShuffledRounds(1), notify=told.append)
    assert torch.equal(theta[0], torch.zeros(1))
    assert told == [{"event": "test", "step": 0, "stopped": "the loss is not finite"}]


def test_steps_are_told_where_checks_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "TELL_SECONDS", -1.0)
    theta = [torch.zeros(1)]
    told: list[dict[str, Any]] = []

    def gradients(batch: int) -> float:
        theta[0].grad = torch.ones(1)
        return 1.0

    schedule = Schedule(6, 0.1, checks=1)
    minimise(theta, gradients, Training("x", schedule), ShuffledRounds(2, 0), check=lambda: 1.0, notify=told.append)
    steps = [event for event in told if "step" in event]
    assert [(event["step"], event["of"]) for event in steps] == [(i, 6) for i in range(1, 7)]
    assert all(event["seconds_left"] >= 0 for event in steps)
    assert steps[-1]["seconds_left"] == 0


def test_a_rate_too_high_for_a_model_is_lowered() -> None:
    """f = (x - 1)^2 by plain descent: at the rates 10 and 2 a step is worse than the start, at .4 it converges."""
    theta, told = [torch.zeros(1)], list[dict[str, Any]]()

    def gradients(_: int) -> float:
        theta[0].grad = 2 * (theta[0] - 1)
        return float((theta[0] - 1) ** 2)

    training = Training("test", Schedule(8, 10.0, checks=8), sgd(), retreats=2)
    minimise(theta, gradients, training, ShuffledRounds(2), check=lambda: gradients(0), notify=told.append)
    assert [event["text"].rpartition(" ")[2] for event in told if event["event"] == "note"] == ["2", "0.4"]
    held_out = [event["held_out"] for event in told if "held_out" in event]
    assert held_out[0] > 1
    assert held_out[1] > 1
    assert held_out[2] < 1  # from the start again: nothing is left of the steps before
    assert float(theta[0]) == pytest.approx(1, abs=0.1)
    assert told[-1]["held_out_after"] == min(held_out)


@pytest.mark.parametrize(("retreats", "steps"), [(0, 1), (1, 2), (None, 3)])
def test_after_the_last_retreat_it_ends_where_it_began(retreats: int | None, steps: int) -> None:
    theta, left, told = [torch.zeros(1)], iter([1.0, 1.4, 1.6, 0.5]), list[dict[str, Any]]()

    def gradients(_: int) -> float:
        theta[0].grad = torch.ones(1)
        return 0.0

    training = Training("test", Schedule(3, 0.1, checks=3), retreats=retreats)
    minimise(theta, gradients, training, ShuffledRounds(2), check=lambda: next(left), notify=told.append)
    assert max(event.get("step", 0) for event in told) == steps
    stopped = [event["stopped"] for event in told if "stopped" in event]
    assert (stopped != []) is (retreats is not None)
    assert (float(theta[0]) == 0) is (retreats is not None)
    if stopped:
        assert stopped == [f"held out, the loss is {(1.4, 1.6)[retreats or 0]} after 1 at the start"]


@pytest.mark.parametrize("losses", [(1.0, 0.9, 1.4, 1.5), (1.0, 1.05, 1.29, 0.9)])
def test_checks_that_rise_after_one_that_fell_or_by_little_change_nothing(losses: tuple[float, ...]) -> None:
    """The tuning of two planes is a percent above its start at its first check, and a tenth below it in the end."""
    theta, left, told = [torch.zeros(1)], iter(losses), list[dict[str, Any]]()

    def gradients(_: int) -> float:
        theta[0].grad = torch.ones(1)
        return 0.0

    training = Training("test", Schedule(3, 0.1, checks=3), retreats=0)
    minimise(theta, gradients, training, ShuffledRounds(2), check=lambda: next(left), notify=told.append)
    assert not [event for event in told if "stopped" in event or event["event"] == "note"]
    assert told[-1]["held_out_after"] == 0.9


def test_batches_come_in_turn_and_values_are_projected() -> None:
    theta, batches = [torch.zeros(1)], []

    def gradients(batch: int) -> float:
        batches.append(batch)
        theta[0].grad = -torch.ones(1)
        return 1.0

    training = Training("test", Schedule(6, 10.0))
    minimise(theta, gradients, training, ShuffledRounds(3), project=lambda: theta[0].clamp_(0, 1))
    assert sorted(batches[:3]) == sorted(batches[3:]) == [0, 1, 2]
    assert float(theta[0]) == 1


def test_evenly() -> None:
    assert evenly(8, 0.25) == [2, 6]
    assert evenly(16, 0.125) == [4, 12]
    assert [len(evenly(n, 0.125)) for n in (0, 1, 2, 3)] == [0, 0, 1, 1]
    assert evenly(8, 0.0) == []


class Held:
    """A store in memory that keeps the state of one step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps, self.kept = at, 0, dict[str, Any]()

    def load(self, task: dict[str, Any]) -> TrainingState | None:
        return self.kept.get("state")

    def due(self) -> bool:
        self.steps += 1
        return self.steps == self.at

    def save(self, state: TrainingState) -> None:
        copies = {name: value.clone() for name, value in state.tensors.items()}
        self.kept["state"] = TrainingState(state.task, state.step, copy.deepcopy(state.facts), copies)


@pytest.mark.parametrize("at", [1, 4, 7, 12])
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("optimiser", [*OPTIMISERS, "momentum"])
def test_a_saved_state_goes_on_to_the_same_bits(at: int, checked: bool, optimiser: str) -> None:
    """Also for a tensor without gradients, and for one that has them at some steps only."""
    goal = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))

    def train(store: TrainingStore) -> tuple[list[torch.Tensor], list[int]]:
        theta = [torch.zeros(5, 3), torch.ones(2), torch.zeros(3)]
        batches = []

        def gradients(batch: int) -> float:
            batches.append(batch)
            theta[0].grad = theta[0] - goal * (1 + batch)
            theta[2].grad = theta[2] - 1 if batch == 2 else None
            return 1.0

        def check() -> float:
            return float((theta[0] - goal).abs().sum())

        chosen = sgd(momentum=0.9) if optimiser == "momentum" else optimiser_named(optimiser)
        training = Training("test", Schedule(13, 0.03, warmup=0.2, checks=5), chosen)
        minimise(theta, gradients, training, ShuffledRounds(4, 5), check=check if checked else None, store=store)
        return theta, batches

    store = Held(at)
    whole, batches = train(store)
    rest, later = train(store)
    assert later == batches[at:]
    assert all(torch.equal(one, other) for one, other in zip(whole, rest, strict=True))


@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_a_saved_state_goes_on_at_the_rate_it_has_come_to(at: int) -> None:
    def train(store: TrainingStore) -> torch.Tensor:
        theta = [torch.zeros(3)]

        def gradients(_: int) -> float:
            theta[0].grad = 2 * (theta[0] - 1)
            return 1.0

        def check() -> float:
            return float((theta[0] - 1).square().sum())

        training = Training("test", Schedule(10, 30.0, checks=5), adam(), retreats=3)
        minimise(theta, gradients, training, ShuffledRounds(4, 5), check=check, store=store)
        return theta[0]

    store = Held(at)
    whole = train(store)
    assert torch.equal(train(store), whole)
    assert float((whole - 1).abs().max()) < 1


def one_step(optimiser: Optimiser, value: float, gradient: float) -> float:
    theta = [torch.tensor([value], dtype=torch.float64)]

    def gradients(_: int) -> float:
        theta[0].grad = torch.full((1,), gradient, dtype=torch.float64)
        return 0.0

    minimise(theta, gradients, Training("test", Schedule(1, 0.5), optimiser), ShuffledRounds(1))
    return float(theta[0])


def test_optimisers_do_what_they_are_named_for() -> None:
    """First steps by hand: Adam's is the rate in the gradient's direction, AdamW decays the value before it."""
    assert one_step(optimiser_named("sgd"), 2.0, 0.3) == pytest.approx(2 - 0.5 * 0.3)
    assert one_step(optimiser_named("adam"), 2.0, 0.3) == pytest.approx(2 - 0.5, rel=1e-6)
    assert one_step(optimiser_named("adamw", weight_decay=0.1), 2.0, -0.3) == pytest.approx(2 * 0.95 + 0.5, rel=1e-6)


def test_an_optimiser_that_is_not_there() -> None:
    with pytest.raises(FeatherError, match="no optimiser 'adamm' .did you mean"):
        optimiser_named("adamm")
    with pytest.raises(FeatherError, match="adam has no setting among momentum"):
        optimiser_named("adam", momentum=0.9)


def test_a_state_of_another_optimiser_is_of_another_task() -> None:
    tasks: list[dict[str, Any]] = []

    class Listens(Held):
        def load(self, task: dict[str, Any]) -> TrainingState | None:
            tasks.append(task)
            return None

    for optimiser in (adam(), adam((0.9, 0.99)), optimiser_named("adamw"), optimiser_named("sgd")):
        training = Training("test", Schedule(1, 0.5), optimiser)
        minimise([torch.zeros(2)], lambda _: math.nan, training, ShuffledRounds(3, 1), store=Listens(9))
    training = Training("test", Schedule(1, 0.5))
    minimise([torch.zeros(2)], lambda _: math.nan, training, ShuffledRounds(3, 2), store=Listens(9))
    assert all(one != other for i, one in enumerate(tasks) for other in tasks[:i])
    assert json.loads(json.dumps(tasks)) == tasks  # as it is read back from a file
