"""ECO: identical without rounding, errors come back whole, no stall, and a state that resumes to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.learn.optimisers import optimiser_named
from featherweight.methods.train.eco import Eco
from featherweight.methods.train.quantisers import Codes, Fp8, Quantiser, Ternary, Uniform

Base = Callable[[list[Tensor]], torch.optim.Optimizer]
BASES: dict[str, Base] = {
    "heavy ball": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "mean": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.02),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}
if hasattr(torch.optim, "Muon"):
    BASES["muon"] = lambda p: torch.optim.Muon(p, lr=0.02)
    BASES["muon, plain"] = lambda p: torch.optim.Muon(p, lr=0.02, nesterov=False, adjust_lr_fn="match_rms_adamw")


def to_grid(step: float) -> Quantiser:
    return lambda weight: (weight / step).round() * step


def noisy_steps(optimiser: torch.optim.Optimizer, p: Tensor, steps: range) -> None:
    for t in steps:
        p.grad = p.detach().clone() + torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p.dtype)
        optimiser.step()


@pytest.mark.parametrize("name", BASES)
def test_without_rounding_it_is_the_base_bit_by_bit(name: str) -> None:
    start = torch.randn(6, 4)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    noisy_steps(Eco(BASES[name]([ours]), {ours: lambda w: w}), ours, range(50))
    noisy_steps(BASES[name]([theirs]), theirs, range(50))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


def exact(start: Tensor, gradient: Callable[[Tensor], Tensor], q: Quantiser, rates: list[float], beta: float) -> Any:
    """The exact form for SGD with an exponential mean, weight decay 0.1: every error is kept for a step. -> all w~."""
    decay = 0.1
    w, error = q(start), start - q(start)
    m = -(1 - rates[0] * decay) / (beta * rates[0]) * error
    for now, after in zip(rates[:-1], rates[1:], strict=True):
        mixed = beta * m + (1 - beta) * gradient(w)
        wanted = (1 - now * decay) * w - now * mixed
        w, before = q(wanted), error
        error = wanted - w
        m = mixed + (1 - now * decay) / now * before - (1 - after * decay) / (beta * after) * error
        yield wanted


@pytest.mark.parametrize("last", [1.0, 0.1])
def test_the_exact_form_is_the_run_with_master_weights(last: float) -> None:
    """Which is why the injection is what it is: Eco's differs from it by what e_t - e_(t+1) gives."""
    q, curvature = to_grid(0.05), torch.linspace(0.1, 2, 30, dtype=torch.float64)
    rates = [0.05 * (1 + (last - 1) * t / 400) for t in range(401)]
    master = torch.randn(30, dtype=torch.float64)
    m = torch.zeros_like(master)
    worst = 0.0
    for rate, wanted in zip(rates, exact(master, lambda w: curvature * w, q, rates, 0.9), strict=False):
        m = 0.9 * m + 0.1 * curvature * q(master)
        master = (1 - rate * 0.1) * master - rate * m
        worst = max(worst, float((wanted - master).abs().max()))
    assert worst < 1e-12


@pytest.mark.parametrize("name", ["heavy ball", "mean", "nesterov", "adam"])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95])
def test_an_error_comes_back_whole(name: str, beta: float) -> None:
    """Steps after one error, without gradients. Adam's divisor is held at 1 by its eps, and its correction by time."""
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    base: torch.optim.Optimizer
    if name == "adam":
        base = torch.optim.Adam([p], lr=0.01, betas=(beta, 0.0), eps=1.0)
    else:
        dampening = beta if name == "mean" else 0.0
        base = torch.optim.SGD([p], lr=0.02, momentum=beta, dampening=dampening, nesterov=name == "nesterov")
    rounding = False
    lost = torch.tensor([0.3, -0.2, 0.01], dtype=torch.float64)
    eco = Eco(base, {p: lambda w: w - lost if rounding else w})
    p.grad = torch.zeros_like(p)
    for step in range(2000):
        rounding = step == 1200
        eco.step()
    torch.testing.assert_close(p.detach(), torch.zeros_like(p), rtol=0, atol=1e-12)


@pytest.mark.skipif("muon" not in BASES, reason="this PyTorch has no Muon")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_given_what_its_own_matrix_brings_back(shape: tuple[int, int], nesterov: bool) -> None:
    p = torch.zeros(shape, requires_grad=True)
    base = torch.optim.Muon([p], lr=0.1, momentum=0.8, weight_decay=0.0, nesterov=nesterov, adjust_lr_fn="original")
    p.grad = torch.randn(shape)
    plain = copy.deepcopy(base)
    plain.param_groups[0]["params"][0].grad = p.grad.clone()
    plain.step()
    error = 1e-3 * torch.randn(shape)
    Eco(base, {p: lambda w: w - error * (w != 0)}).step()
    added = base.state[p]["momentum_buffer"] - next(iter(plain.state.values()))["momentum_buffer"]
    m = 0.2 * p.grad
    mixed = (0.2 * p.grad + 0.8 * m) if nesterov else m
    u, s, v = torch.linalg.svd(mixed, full_matrices=False)
    polar_root = (v.T / s @ v) if shape[0] >= shape[1] else (u / s @ u.T)  # (M'M)^(-1/2) or (MM')^(-1/2)
    back = added @ polar_root if shape[0] >= shape[1] else polar_root @ added
    reach = (0.8**2 if nesterov else 0.8) / 0.2
    rate = 0.1 * max(1, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(-rate * reach * back, error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("beta", "most"), [(0.9, 5.0), (0.95, 10.0)])
def test_small_steps_do_not_stall(beta: float, most: float) -> None:
    """A constant gradient whose step is below half a level's distance: the naive removal never moves."""
    grid, rate, slope = 0.05, 0.01, 0.3

    def run(feedback: bool) -> tuple[Tensor, float]:
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        base = torch.optim.SGD([p], lr=rate, momentum=beta, dampening=beta)
        optimiser, lag = Eco(base, {p: to_grid(grid)}, feedback=feedback), 0.0
        p.grad = torch.full_like(p, slope)
        for t in range(1, 5001):
            optimiser.step()
            lag = max(lag, abs(p.item() + rate * slope * t) / grid)
        return p, lag

    stalled, _ = run(False)
    assert stalled.item() == 0
    moved, lag = run(True)
    assert 0.5 < lag <= most
    assert moved.item() < -rate * slope * 4800


def quadratic(rate: float, kind: str) -> float:
    """The mean loss after 4000 steps on 200 curvatures from 0.1 to 2, on a grid of 0.05."""
    curvature = torch.linspace(0.1, 2, 200, dtype=torch.float64)
    goal = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    q = to_grid(0.05)
    p = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    base = torch.optim.SGD([p], lr=rate, momentum=0.9, dampening=0.9)
    optimiser = base if kind == "master" else Eco(base, {p: q}, feedback=kind == "eco")
    for _ in range(4000):
        p.grad = curvature * ((q(p.detach()) if kind == "master" else p.detach()) - goal)
        optimiser.step()
    return float((curvature * (q(p.detach()) - goal).square()).mean() / 2)


@pytest.mark.parametrize(("rate", "known"), [(0.05, (2.6e-4, 5.1e-2, 2.2e-4)), (0.01, (2.2e-4, 0.41, 2.4e-4))])
def test_on_a_quadratic_it_is_near_masters_and_far_from_the_naive_removal(
    rate: float, known: tuple[float, float, float]
) -> None:
    """The naive removal gets worse as the rate falls. Other draws of goals gave the known values."""
    for kind, loss in zip(("master", "naive", "eco"), known, strict=True):
        assert quadratic(rate, kind) == pytest.approx(loss, rel=0.4), kind


def test_adams_injection_becomes_that_of_sgd() -> None:
    """With a divisor of one, and the first moment's correction over."""
    grid = to_grid(0.1)
    state = torch.randn(8, dtype=torch.float64)
    found = []
    for kind in ("adam", "sgd"):
        p = state.clone().requires_grad_()
        base: torch.optim.Optimizer
        if kind == "adam":
            base = torch.optim.Adam([p], lr=0.03, betas=(0.9, 0.0), eps=1.0)
        else:
            base = torch.optim.SGD([p], lr=0.03, momentum=0.9, dampening=0.9)
        p.grad = torch.zeros_like(p)
        rounding = False
        eco = Eco(base, {p: lambda w: grid(w) if rounding else w})  # noqa: B023
        for step in range(600):
            rounding = step == 599
            eco.step()
        found.append(base.state[p]["exp_avg" if kind == "adam" else "momentum_buffer"])
    assert float(found[1].abs().max()) > 0
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_beside_moments(dtype: torch.dtype) -> None:
    p = torch.randn(8, 64).to(dtype).requires_grad_()
    base = torch.optim.AdamW([p], lr=1e-3)
    eco = Eco(base, {p: Fp8(True, exact_in_bfloat16=True)})
    noisy_steps(eco, p, range(3))
    tensors = {key: kept for key, kept in eco.state[p].items() if kept.dim()}
    assert set(tensors) == {"exp_avg", "exp_avg_sq"}
    assert all(kept.dtype == torch.float32 for kept in tensors.values())
    assert eco.nbytes() == {"weights": 8 * 64 + 4, "state": 2 * 4 * 8 * 64 + 8}
    assert torch.equal(p.detach(), Fp8(exact_in_bfloat16=True)(p.detach().float()).to(dtype))


def test_errors_of_a_narrow_type_come_back_too() -> None:
    """Steps far below what bfloat16 holds beside 1: with their errors handed on they add up."""
    moved = {}
    for feedback in (False, True):
        p = torch.ones(16, 4, dtype=torch.bfloat16, requires_grad=True)
        eco = Eco(torch.optim.SGD([p], lr=1e-4, momentum=0.9, dampening=0.9), {p: lambda w: w}, feedback=feedback)
        p.grad = torch.full_like(p, 1.0)
        for _ in range(1000):
            eco.step()
        moved[feedback] = 1 - float(p.float().mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_to_the_bit(name: str, dtype: torch.dtype) -> None:
    start = torch.randn(6, 8).to(dtype)

    def made() -> tuple[Tensor, Eco]:
        p = start.clone().requires_grad_()
        return p, Eco(BASES[name]([p]), {p: Uniform(True, 4, 4)}, seed=3)

    whole, eco = made()
    noisy_steps(eco, whole, range(9))
    first, eco = made()
    noisy_steps(eco, first, range(4))
    kept = copy.deepcopy(eco.state_dict())
    second, eco = made()
    with torch.no_grad():
        second.copy_(first)
    eco.load_state_dict(kept)
    noisy_steps(eco, second, range(4, 9))
    assert torch.equal(whole, second)


def test_a_rate_of_zero_changes_nothing() -> None:
    p = torch.randn(4, 4, requires_grad=True)
    base = torch.optim.AdamW([p], lr=0.0)
    eco = Eco(base, {p: Uniform(True, 3)})
    before = p.detach().clone()
    noisy_steps(eco, p, range(3))
    assert torch.equal(p, before)
    base.param_groups[0]["lr"] = 0.1
    noisy_steps(eco, p, range(3, 5))
    assert bool(p.isfinite().all())
    assert not torch.equal(p, before)


QUANTISERS: dict[str, Codes] = {
    "uniform": Uniform(bits=4, group_size=8),
    "uniform, rows": Uniform(bits=8),
    "fp8": Fp8(),
    "fp8, powers": Fp8(exact_in_bfloat16=True),
    "ternary": Ternary(),
}


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantisers_round_to_neighbours(name: str, dtype: torch.dtype) -> None:
    weight, quantiser = torch.randn(16, 32, dtype=dtype), QUANTISERS[name]
    rounded = quantiser(weight)
    assert rounded.dtype == dtype
    inside = weight.abs() <= rounded.abs().amax()  # beyond the last level, ternary codes saturate
    half = quantiser.spacing(weight) / 2
    assert bool(((weight - rounded).abs() <= half * (1 + 1e-5))[inside].all())
    assert torch.equal(quantiser.decode(*quantiser.encode(weight)).to(dtype), rounded)
    if name == "fp8, powers":
        assert torch.equal(rounded.bfloat16().to(dtype), rounded)
    if name.startswith("fp8"):
        assert float(((weight - rounded).abs() / weight.abs())[weight.abs() > 1e-2].max()) <= 1 / 16 * 1.0001
    assert torch.equal(quantiser(torch.zeros(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("quantiser", [Uniform(True, 4, 8), Fp8(True), Ternary(True, torch.tensor(0.8))])
def test_stochastic_rounding_has_the_weight_as_its_mean(quantiser: Codes) -> None:
    weight = torch.randn(4, 16).clamp(-0.7, 0.7)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([quantiser(weight, generator) for _ in range(4000)])
    assert bool((draws.std(0) > 0).any())
    tolerance = 5 * float(quantiser.spacing(weight).max()) / 2 / 4000**0.5
    torch.testing.assert_close(draws.mean(0), weight, rtol=0, atol=tolerance)


def test_fixed_scales_stay_and_clipped_errors_stay_small() -> None:
    p = torch.randn(4, 8, requires_grad=True)
    for quantiser in (Ternary().fixed(p), Uniform().fixed(p)):
        buffers = []
        for clip in (None, 0.5):
            value = p.detach().clone().requires_grad_()
            eco = Eco(torch.optim.SGD([value], lr=0.01, momentum=0.9), {value: quantiser}, clip=clip)
            value.grad = torch.full_like(value, -3.0)  # far beyond the last level
            for _ in range(300):
                eco.step()
            buffers.append(float(eco.state[value]["momentum_buffer"].abs().max()))
            assert torch.equal(value.detach().amax(), quantiser(torch.full_like(p, 1e3)).amax())
        assert buffers[1] < buffers[0] / 5


def test_what_cannot_be_is_said() -> None:
    p = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(FeatherError, match="does not know the momentum of Adagrad"):
        Eco(torch.optim.Adagrad([p]), {})
    with pytest.raises(FeatherError, match="does not train"):
        Eco(torch.optim.SGD([p], lr=0.1), {torch.zeros(2): Fp8()})
    with pytest.raises(FeatherError, match="counts distances"):
        Eco(torch.optim.SGD([p], lr=0.1), {p: lambda w: w}, clip=1.0)
    with pytest.raises(FeatherError, match="divides"):
        Uniform(group_size=5)(torch.zeros(2, 8))
    with pytest.raises(FeatherError, match="2 to 8 bits"):
        Uniform(bits=1)
    with pytest.raises(FeatherError, match="has no setting"):
        optimiser_named("eco", bits=3)
    with pytest.raises(FeatherError, match="new Eco"):
        Eco(torch.optim.SGD([p], lr=0.1), {}).add_param_group({"params": []})
