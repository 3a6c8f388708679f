"""EGGROLL: the batched forward is that of perturbed weights, and estimates point where they should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.learn.optimisers import adam
from featherweight.methods.train.evolution import Evolution, Evolving, copies, normal_rows, random_words

CPU = torch.device("cpu")


class Tied(nn.Module):
    """An embedding, a layer with bias and an output layer that is the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(ids))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("biases", [False, True])
def test_the_batched_forward_is_that_of_perturbed_weights(rank: int, biases: bool) -> None:
    model, ids = Tied(), torch.randint(11, (4, 5))
    evolution = Evolution(model, Evolving(population=8, sigma=0.2, rank=rank, biases=biases))
    with evolution.perturbed():
        whole = model(copies(ids, 8)).reshape(8, 4, 5, 11)
    with evolution.perturbed(3, 2):
        torch.testing.assert_close(model(copies(ids, 2)).reshape(2, 4, 5, 11), whole[3:5], rtol=1e-5, atol=1e-5)
    start = {parameter: parameter.detach().clone() for parameter in evolution.names}
    assert len(start) == (3 if biases else 2)
    for member in range(8):
        with torch.no_grad():
            for parameter in start:
                parameter += evolution.perturbation(parameter, member)
            torch.testing.assert_close(whole[member], model(ids), rtol=1e-5, atol=1e-5)
            for parameter, value in start.items():
                parameter.copy_(value)
    assert float((whole[0] - whole[1]).abs().max()) > 0.05


def linear(size: tuple[int, int], settings: Evolving) -> tuple[nn.Linear, Evolution]:
    layer = nn.Linear(size[1], size[0], bias=False)
    return layer, Evolution(layer, settings)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_linear_score_gives_its_gradient(rank: int) -> None:
    goal, errors = torch.randn(4, 5), []
    for population in (1000, 16000):
        layer, evolution = linear((4, 5), Evolving(population=population, sigma=1.0, rank=rank))
        moved = torch.stack([evolution.perturbation(layer.weight, member) for member in (0, 1)])
        assert torch.equal(moved[0], -moved[1])
        a, b = evolution._members(layer.weight, 0, population)
        entries = a @ b.transpose(1, 2)
        assert float(entries.var()) == pytest.approx(1, abs=150 / population + 0.05)
        estimate = evolution.estimate((entries * goal).sum((1, 2)), layer.weight)
        errors.append(float((estimate - goal).norm() / goal.norm()))
    assert errors[0] < 0.4
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.6)


def test_the_bias_of_a_bounded_score_halves_as_the_rank_doubles() -> None:
    """tanh of the sum of all entries. One sum of entries is a sum of `rank` products of normal numbers."""
    members, size = 2_000_000, 3
    generator = torch.Generator().manual_seed(0)
    found = {}
    for rank in (1, 2, 4):
        a, b = (torch.randn(members, rank, generator=generator) * size**0.5 for _ in range(2))
        total = (a * b).sum(1) / rank**0.5
        found[rank] = float((total * total.tanh()).mean())
    normal = torch.randn(members, generator=generator) * size
    limit = float((normal * normal.tanh()).mean())
    bias = {rank: abs(value - limit) for rank, value in found.items()}
    assert bias[2] / bias[1] == pytest.approx(0.5, abs=0.12)
    assert bias[4] / bias[2] == pytest.approx(0.5, abs=0.12)
    layer, evolution = linear((size, size), Evolving(population=60_000, sigma=1.0, rank=2))
    a, b = evolution._members(layer.weight, 0, 60_000)
    total = a.sum((1, 2)) * 0 + (a.sum(1) * b.sum(1)).sum(1)
    estimate = evolution.estimate(total.tanh(), layer.weight)
    assert float(estimate.sum()) == pytest.approx(found[2], rel=0.05)


def test_an_even_score_teaches_nothing() -> None:
    layer, evolution = linear((3, 4), Evolving(population=32, sigma=0.3))
    before = layer.weight.detach().clone()

    def even(first: int, count: int) -> Tensor:
        moved = layer(copies(torch.eye(4), count)).reshape(count, 4, 3).transpose(1, 2) - before
        return (moved.square().sum((1, 2)) * 1000).round()

    scores = evolution.scores(even, at_once=6)
    assert len(set(scores.tolist())) == 16
    evolution.step(scores)
    assert torch.equal(layer.weight.detach(), before)


def test_noise_is_a_function_of_key_and_place() -> None:
    whole = random_words(5, 0, 40, 7, CPU)
    assert torch.equal(random_words(5, 11, 3, 7, CPU), whole[11:14])
    assert len(whole.unique()) == 280
    assert not torch.equal(random_words(6, 0, 40, 7, CPU), whole)
    normal = normal_rows(1, 0, 300, 500, CPU).double()
    assert float(normal.mean()) == pytest.approx(0, abs=0.01)
    assert float(normal.square().mean()) == pytest.approx(1, abs=0.02)
    assert float(normal.pow(4).mean()) == pytest.approx(3, abs=0.15)
    assert float((normal[:, 1:] * normal[:, :-1]).mean()) == pytest.approx(0, abs=0.01)
    one = random_words(-3, 0, 2000, 4, CPU)
    ones = torch.stack([(one >> bit) & 1 for bit in range(64)]).double().mean((1, 2))
    assert bool(((ones - 0.5).abs() < 5 * 0.5 / math.sqrt(8000)).all())


def test_shaping() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0])
    z = Evolving(population=4).shaped(scores)
    torch.testing.assert_close(z, (scores - 2) / scores.std(correction=0))
    group = Evolving(population=4, shaping="group", group_size=2).shaped(scores)
    torch.testing.assert_close(group, torch.tensor([-1.0, 1, 0, 0]) / math.sqrt(0.5 + 1e-5))
    assert Evolving(population=4, shaping="sign").shaped(scores).tolist() == [-0.5, 0.5, 0, 0]
    assert Evolving(population=4).shaped(torch.ones(4)).tolist() == [0, 0, 0, 0]


def test_a_score_that_cannot_be_differentiated_is_learned() -> None:
    """The share of right answers, with Adam; and the noise of a step is not that of the next."""
    x = torch.randn(128, 5)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    evolution = Evolution(model, Evolving(population=64, sigma=0.1, rank=1, biases=True), adam(), rate=0.03)

    def right(first: int, count: int) -> Tensor:
        return (model(copies(x, count)).argmax(-1) == y.repeat(count)).reshape(count, -1).float().mean(1)

    first_noise = evolution.perturbation(model[0].weight, 0)
    for _ in range(60):
        evolution.step(evolution.scores(right))
    assert not torch.equal(evolution.perturbation(model[0].weight, 0), first_noise)
    assert float((model(x).argmax(-1) == y).float().mean()) > 0.93


def test_the_step_is_what_is_promised() -> None:
    settings = Evolving(population=16, sigma=0.5, shaping="z-score")
    layer, evolution = linear((3, 4), settings)
    before, scores = layer.weight.detach().clone(), torch.randn(16)
    e = torch.stack([evolution.perturbation(layer.weight, i) for i in range(16)])  # sigma s E
    evolution.optimiser.param_groups[0]["lr"] = 0.7
    evolution.step(scores)
    expected = before + 0.7 * 4 * (settings.shaped(scores).reshape(-1, 1, 1) * e).mean(0)
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(FeatherError, match="even number"):
        Evolving(population=5)
    with pytest.raises(FeatherError, match="do not fill"):
        Evolving(population=6, shaping="group", group_size=4)
    with pytest.raises(FeatherError, match="sigma is 0"):
        Evolving(sigma=0)
    with pytest.raises(FeatherError, match="nothing to perturb"):
        Evolution(nn.ReLU(), Evolving())
    layer, evolution = linear((3, 4), Evolving(population=4))
    with evolution.perturbed(), pytest.raises(FeatherError, match="cannot share a batch of 3"):
        layer(torch.zeros(3, 4))
    with pytest.raises(FeatherError, match="not in a population"), evolution.perturbed(2, 4):
        pass
    with pytest.raises(FeatherError, match="one a member"):
        evolution.step(torch.zeros(3))
