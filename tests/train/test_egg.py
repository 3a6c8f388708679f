"""The integer language model: closed in its types, exact under perturbation, chance moves what it should, it learns."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.errors import FeatherError
from featherweight.methods.train.egg import EXP2, NOISE, Egg, EggSettings

SMALL = EggSettings(layers=2, width=32, pairs=8, tokens=3)


class WholeNumbers(TorchDispatchMode):
    """Fails at the first tensor of floating point; counts the operations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            assert not isinstance(one, Tensor) or not one.is_floating_point(), f"{function} made {one.dtype}"
        self.count += 1
        return result


def test_no_floating_point_and_nothing_leaves_its_range() -> None:
    text = torch.randint(256, (50,), dtype=torch.uint8)
    with WholeNumbers() as mode:
        egg = Egg(SMALL)
        for weight in egg.weights.values():  # as large as can be
            weight.copy_(torch.where(weight >= 0, 127, -127))
        state, at = egg.start(16), torch.arange(8) * 6
        noise = egg.noise()
        logits, state = egg.forward(torch.full((16,), 255), state, noise)
        logits, state = egg.forward(torch.zeros(16, dtype=torch.int64), state, noise)
        assert int(logits.abs().max()) == 127
        assert int(state.abs().max()) <= 127
        at, state, total = egg.update(text, at, state)
    assert mode.count > 500
    assert total.dtype == state.dtype == torch.int32
    assert at.tolist() == [(6 * i + 3) % 50 for i in range(8)]
    assert all(weight.dtype == torch.int8 and int(weight.min()) >= -127 for weight in egg.weights.values())


def test_it_has_the_papers_number_of_weights() -> None:
    assert sum(math.prod(shape) for shape in Egg(SMALL).shapes.values()) == 513 * 32 + 2 * (4 * 32 + 12 * 32**2)


def by_hand(egg: Egg, byte: int, state: list[list[int]], noise: Any, member: int) -> tuple[list[int], list[list[int]]]:
    """One member's forward pass in Python's whole numbers."""
    pair, sign, d = member // 2, 1 - 2 * (member % 2), egg.settings.width
    shift = 4 + egg.settings.noise_shift
    w = {name: weight.tolist() for name, weight in egg.weights.items()}
    parts = {name: (a[pair].tolist(), b[pair].tolist()) for name, (a, b) in noise.parts.items()}

    def clip(x: int) -> int:
        return max(-127, min(127, x))

    def product(u: list[int], name: str) -> list[int]:
        a, b = parts[name]
        dot = sum(x * y for x, y in zip(u, b, strict=True))
        sums = [sum(x * y for x, y in zip(u, row, strict=True)) for row in w[name]]
        return [clip((s + ((dot * sign * a[i]) >> shift)) // (16 * math.isqrt(len(u)))) for i, s in enumerate(sums)]

    def vector(name: str) -> list[int]:
        return [clip(v + ((sign * a * b) >> shift)) for v, a, b in zip(w[name], *parts[name], strict=True)]

    def norm(x: list[int], name: str) -> list[int]:
        mean = max(1, sum(map(abs, x)) // d)
        return [clip(v * g // mean) for v, g in zip(x, vector(name), strict=True)]

    a, b = parts["embedding"]
    x = [clip(v + ((sign * a[byte] * n) >> shift)) for v, n in zip(w["embedding"][byte], b, strict=True)]
    states = []
    for i in range(egg.settings.layers):
        u, s = norm(x, f"{i}.norm.1"), state[i]
        sums = zip(
            product(u, f"{i}.forget.input"), product(s, f"{i}.forget.state"), vector(f"{i}.forget.bias"), strict=True
        )
        f = [clip(sum(three)) + 127 for three in sums]
        p = [(g * v) >> 8 for g, v in zip(f, s, strict=True)]
        sums = zip(product(u, f"{i}.new.input"), product(p, f"{i}.new.state"), vector(f"{i}.new.bias"), strict=True)
        h = [clip(sum(three)) for three in sums]
        states.append([v + ((g * (n - v)) >> 8) for g, v, n in zip(f, s, h, strict=True)])
        x = [clip(v + n) for v, n in zip(x, states[-1], strict=True)]
        x = [
            clip(v + n)
            for v, n in zip(x, product(product(norm(x, f"{i}.norm.2"), f"{i}.up"), f"{i}.down"), strict=True)
        ]
    return product(norm(x, "norm"), "head"), states


def test_the_batched_forward_is_that_of_each_member_to_the_bit() -> None:
    egg = Egg(EggSettings(layers=2, width=16, pairs=2, noise_shift=1))
    noise, state = egg.noise(), egg.start(4)
    states = [[[0] * 16 for _ in range(2)] for _ in range(4)]
    for byte in (7, 200, 31):
        logits, state = egg.forward(torch.full((4,), byte), state, noise)
        for member in range(4):
            expected, states[member] = by_hand(egg, byte, states[member], noise, member)
            assert logits[member].tolist() == expected
            assert state[member].tolist() == states[member]
    assert not torch.equal(logits[0], logits[1])


def test_the_logarithm_and_the_score() -> None:
    egg = Egg(SMALL)
    for value in (1, 2, 3, 16, 17, 1000, 2**29 - 1, *torch.randint(1, 2**29, (200,)).tolist()):
        assert int(egg.log2(torch.tensor([value], dtype=torch.int32))) == math.floor(16 * math.log2(value)), value
    assert EXP2[:3].tolist() == [16, 16, 17]
    assert [int(EXP2[i]) for i in (16, 32, 255)] == [32, 64, int(16 * 2 ** (255 / 16))]
    logits = torch.randint(-60, 60, (20, 256), dtype=torch.int32)
    byte = torch.randint(256, (20,))
    exact = torch.log_softmax(logits.double() * math.log(2) / 16, 1) / math.log(2) * 16
    found = egg.log_likelihood(logits, byte)
    wanted = exact.gather(1, byte.unsqueeze(1)).squeeze(1)
    assert float((found - wanted).abs().max()) < 1.2


@pytest.mark.parametrize(("share", "known"), [(0.5, 0.50), (0.1, 0.09), (0.01, 0.008)])
def test_random_fitness_moves_the_share_that_is_asked_for(share: float, known: float) -> None:
    egg = Egg(EggSettings(layers=1, width=64, pairs=512, decay=1 / share - 1))
    egg.updates = 1
    fitness = torch.randint(2, (512,), dtype=torch.int8) * 2 - 1
    moved = egg.step(fitness, egg.noise())
    names = [name for name, weight in egg.weights.items() if weight.dim() == 2]
    found = sum(moved[name] for name in names) / sum(egg.weights[name].numel() for name in names)
    assert found == pytest.approx(known, rel=0.25)
    assert float(NOISE.double().std()) == pytest.approx(0.97 * 16, rel=0.01)


def test_a_draw_of_all_pairs_moves_nothing() -> None:
    egg = Egg(SMALL)
    assert sum(egg.step(torch.zeros(8, dtype=torch.int8), egg.noise()).values()) == 0
    assert egg.updates == 1


def test_the_state_begins_anew_where_the_text_does() -> None:
    egg = Egg(EggSettings(layers=1, width=16, pairs=1, tokens=4))
    text = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    _, state = egg.read(text, torch.tensor([0]), egg.start(1) + 50)
    _, same = egg.read(text, torch.tensor([0]), egg.start(1) - 3)
    assert torch.equal(state, same)
    _, other = egg.read(text, torch.tensor([1]), egg.start(1) + 50)
    _, round_ = egg.read(text, torch.tensor([1]), egg.start(1))
    assert not torch.equal(other, round_)


def bits_after(settings: EggSettings, updates: int, text: Tensor) -> float:
    """Bits a byte of the model itself, over a round of the text, after so many updates."""
    egg = Egg(settings)
    at = torch.arange(settings.pairs) % len(text)
    state = egg.start(2 * settings.pairs)
    for _ in range(updates):
        at, state, _ = egg.update(text, at, state)
    where = torch.arange(len(text))
    _, state = egg.read(text, where, egg.start(len(text)))
    total, _ = egg.read(text, (where + settings.tokens) % len(text), state)
    return -float(total.double().mean()) / 16 / settings.tokens


def test_it_learns_a_text_that_repeats() -> None:
    text = torch.tensor(list(b"abcdefgh"), dtype=torch.uint8)  # three bits a byte, if each is foretold by itself
    settings = EggSettings(layers=1, width=16, pairs=512, tokens=2)
    assert bits_after(settings, 0, text) > 6
    found = bits_after(settings, 30, text)
    assert found < 2.5, found


@pytest.mark.skipif("FEATHERWEIGHT_LONG_TESTS" not in os.environ, reason="set FEATHERWEIGHT_LONG_TESTS=1")
def test_a_model_of_two_layers_learns_a_text_that_repeats() -> None:
    text = torch.tensor(list(b"the cat sat on the mat; "), dtype=torch.uint8)
    counts = torch.bincount(text.long()).double()
    share = counts[counts > 0] / len(text)
    unigram = -float((share * share.log2()).sum())
    found = bits_after(EggSettings(layers=2, width=32, pairs=1024, tokens=8), 300, text)
    assert found < unigram - 1


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(FeatherError, match="give 1 or more"):
        EggSettings(pairs=0)
    with pytest.raises(FeatherError, match="leave int32"):
        EggSettings(width=512)
