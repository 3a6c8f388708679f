"""EGG: a language model of bytes in whole numbers alone, trained by evolution (EGGROLL, arXiv 2511.16652).

Weights, activations and noise are int8 in [-127, 127], sums int32; 16 stands for 1. A recurrent block (GRU) and two
layers of a perceptron, repeated; no exponential and no square root: what saturates is the non-linearity. A step moves
weights by -1, 0 or 1. No tensor of floating point is made, in the forward pass or in training. Written from the
formulas of an account of the paper and of its program; departs from the program where that account finds faults
(weights without a signal stay).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.train.evolution import key_of, random_words

ONE, MOST, BYTES = 16, 127, 256
CHUNK = 1 << 16
"""Pairs whose votes are added in int32: 127 * 127 times as many stay below 2**31."""


def _root_16(value: int) -> int:
    """Whole part of the sixteenth root, by four square roots."""
    for _ in range(4):
        value = math.isqrt(value)
    return value


EXP2 = torch.tensor([_root_16(1 << (64 + i)) for i in range(BYTES)], dtype=torch.int32, device="cpu")
"""[256] whole parts of 16 * 2**(i / 16)."""
SIXTEENTHS = torch.tensor([_root_16(1 << (j + 16 * 29)) + 1 for j in range(1, 16)], dtype=torch.int32, device="cpu")
"""[15] the least whole numbers above 2**(29 + j / 16)."""
NOISE = torch.tensor(
    [int(16 * NormalDist().inv_cdf((i + 0.5) / 65536)) for i in range(65536)], dtype=torch.int8, device="cpu"
)
"""[65536] quantiles of 16 times a normal number, cut to whole numbers; their deviation is 0.97 * 16."""


@dataclass(frozen=True)
class EggSettings:
    """Sizes, and how it is trained.

    layers, width : of the model; it has 513 * width + layers * (4 * width + 12 * width**2) weights
    noise_shift : noise is divided by 2 to this power: the deviation is 2**-noise_shift
    pairs : members with noise of opposite sign; both read the same text
    tokens : bytes that are read for an update
    decay : the share of weights that an update t would move if there were nothing to learn is 1 / (decay * t + 1)
    """

    layers: int = 6
    width: int = 256
    noise_shift: int = 4
    pairs: int = 1024
    tokens: int = 100
    decay: float = 0.015
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "pairs", "tokens"):
            if getattr(self, name) < 1:
                raise FeatherError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.width > 256:
            raise FeatherError(f"the width is {self.width}: above 256 sums with noise leave int32")


@dataclass(frozen=True)
class Noise:
    """Noise bytes of pairs for one update: of a matrix A [pairs, rows] and B [pairs, columns], of a vector two.

    signs : int32 [1, 2, 1], +1 and -1 for the members 2 p and 2 p + 1 of pair p
    shift : products of two bytes are divided by 2 to this power
    """

    parts: dict[str, tuple[Tensor, Tensor]]
    signs: Tensor
    shift: int

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """int32 [pairs, 1, rows], [pairs, 1, columns]."""
        a, b = (part.to(torch.int32).unsqueeze(1) for part in self.parts[name])
        return a, b

    def added(self, first: Tensor, second: Tensor) -> Tensor:
        """What a product [pairs, 1 or 2, size] adds for each member, int32 [members, size]."""
        product = (first * second * self.signs) >> self.shift
        return product.reshape(-1, product.shape[2])


class Egg:
    """The model: `weights` by name, int8. `forward` reads one byte, `update` learns from a text."""

    def __init__(self, settings: EggSettings, device: torch.device | str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)
        d = settings.width
        shapes: dict[str, tuple[int, ...]] = {"embedding": (BYTES, d), "head": (BYTES, d), "norm": (d,)}
        for i in range(settings.layers):
            shapes |= {f"{i}.{name}": (d, d) for name in ("forget.input", "forget.state", "new.input", "new.state")}
            shapes |= {f"{i}.{name}": (d,) for name in ("forget.bias", "new.bias", "norm.1", "norm.2")}
            shapes |= {f"{i}.up": (4 * d, d), f"{i}.down": (d, 4 * d)}
        self.shapes = shapes
        self.weights: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            if len(shape) == 2:
                self.weights[name] = self._bytes(key_of(settings.seed, "start", name), 0, *shape)
            else:
                value = ONE if "norm" in name else 0
                self.weights[name] = torch.full(shape, value, dtype=torch.int8, device=self.device)
        self.exp2, self.sixteenths = EXP2.to(self.device), SIXTEENTHS.to(self.device)
        self.updates = 0

    def _bytes(self, key: int, first: int, count: int, size: int) -> Tensor:
        """Noise bytes, int8 [count, size]: 16 times a normal number. Four of a word."""
        words = random_words(key, first, count, -(-size // 4), self.device)
        quarters = torch.stack([(words >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], 2)
        return NOISE.to(self.device)[quarters.reshape(count, -1)[:, :size]]

    def noise(self) -> Noise:
        """That of the present update."""
        pairs, parts = self.settings.pairs, {}
        for name, shape in self.shapes.items():
            rows, columns = shape if len(shape) == 2 else shape * 2
            drawn = self._bytes(key_of(self.settings.seed, self.updates, name), 0, pairs, rows + columns)
            parts[name] = (drawn[:, :rows], drawn[:, rows:])
        signs = 1 - 2 * torch.arange(2, dtype=torch.int32, device=self.device)
        return Noise(parts, signs.reshape(1, 2, 1), 4 + self.settings.noise_shift)

    def start(self, members: int) -> Tensor:
        """The state before the first byte, int32 [members, layers, width]."""
        size = (members, self.settings.layers, self.settings.width)
        return torch.zeros(size, dtype=torch.int32, device=self.device)

    def _product(self, u: Tensor, name: str, noise: Noise | None) -> Tensor:
        """u [members, columns] times the transposed matrix, perturbed, divided by 16 sqrt(columns): int32."""
        matrix = self.weights[name]
        total = torch._int_mm(u.to(torch.int8), matrix.T)
        if noise is not None:
            a, b = noise.of(name)
            dot = (u.reshape(-1, 2, u.shape[1]) * b).sum(2, keepdim=True, dtype=torch.int32)
            total = total + noise.added(dot, a)
        return _clip(torch.div(total, ONE * math.isqrt(matrix.shape[1]), rounding_mode="floor"))

    def _vector(self, name: str, noise: Noise | None) -> Tensor:
        """A vector as it is for each member, int32 [members or 1, width]."""
        value = self.weights[name].to(torch.int32).unsqueeze(0)
        if noise is None:
            return value
        return _clip(value + noise.added(*noise.of(name)))

    def _row(self, byte: Tensor, noise: Noise | None) -> Tensor:
        """The embedding of a byte for each member, int32 [members, width]."""
        rows = self.weights["embedding"].to(torch.int32)[byte]
        if noise is None:
            return rows
        a, b = noise.parts["embedding"]
        own = a.gather(1, byte.reshape(-1, 2)).to(torch.int32).unsqueeze(2)
        return _clip(rows + noise.added(own, b.to(torch.int32).unsqueeze(1)))

    def _norm(self, x: Tensor, name: str, noise: Noise | None) -> Tensor:
        mean = torch.div(x.abs().sum(1, keepdim=True, dtype=torch.int32), x.shape[1], rounding_mode="floor")
        return _clip(torch.div(x * self._vector(name, noise), mean.clamp(min=1), rounding_mode="floor"))

    def _recur(self, u: Tensor, state: Tensor, i: int, noise: Noise | None) -> Tensor:
        """The next state of layer i."""
        forget = self._product(u, f"{i}.forget.input", noise) + self._product(state, f"{i}.forget.state", noise)
        forget = _clip(forget + self._vector(f"{i}.forget.bias", noise)) + MOST  # 0 to 254
        past = (forget * state) >> 8
        new = self._product(u, f"{i}.new.input", noise) + self._product(past, f"{i}.new.state", noise)
        new = _clip(new + self._vector(f"{i}.new.bias", noise))
        return state + ((forget * (new - state)) >> 8)

    def forward(self, byte: Tensor, state: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Read a byte.

        Parameters
        ----------
        byte : int64 [members], what each reads
        state : int32 [members, layers, width], that of `start` at first
        noise : that of `noise()`, for all 2 * pairs members; None for the model itself

        Returns
        -------
        int32 [members, 256] logits in sixteenths of a bit, from -127 to 127; and the state after it.
        """
        x, states = self._row(byte, noise), []
        for i in range(self.settings.layers):
            states.append(self._recur(self._norm(x, f"{i}.norm.1", noise), state[:, i], i, noise))
            x = _clip(x + states[-1])
            hidden = self._product(self._norm(x, f"{i}.norm.2", noise), f"{i}.up", noise)
            x = _clip(x + self._product(hidden, f"{i}.down", noise))
        return self._product(self._norm(x, "norm", noise), "head", noise), torch.stack(states, 1)

    def log_likelihood(self, logits: Tensor, byte: Tensor) -> Tensor:
        """int32 [members] sixteenths of a bit, at most 0 but for rounding: logit - 16 log2 sum 2**(logit / 16)."""
        place = logits + 128
        total = (
            self.exp2.index_select(0, place.flatten()).reshape(place.shape).sum(1, dtype=torch.int32)
        )  # 16 * sum 2**(place / 16), below 2**29
        return place.gather(1, byte.unsqueeze(1)).squeeze(1) - (self.log2(total) - 4 * 16)

    def log2(self, value: Tensor) -> Tensor:
        """Whole part of 16 log2 of whole numbers from 1 to 2**30 - 1, int32."""
        whole, left = torch.zeros_like(value), value
        for by in (16, 8, 4, 2, 1):  # the place of the first bit
            above = (left >> by) > 0
            whole, left = whole + by * above.to(torch.int32), torch.where(above, left >> by, left)
        mantissa = value << (29 - whole).clamp(min=0)
        part = (mantissa.unsqueeze(-1) >= self.sixteenths).sum(-1, dtype=torch.int32)
        return 16 * whole + part

    def read(self, text: Tensor, at: Tensor, state: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Read `tokens` bytes of a text and foretell each next one; the text goes round, with a new state at its start.

        Parameters
        ----------
        text : uint8 [bytes]
        at : int64 [members], where each begins
        state : as in `forward`

        Returns
        -------
        int32 [members] log-likelihoods, summed, in sixteenths of a bit; the state.
        """
        total = torch.zeros(at.shape, dtype=torch.int32, device=self.device)
        for step in range(self.settings.tokens):
            place = (at + step) % len(text)
            state = state * (place != 0).to(torch.int32).reshape(-1, 1, 1)
            logits, state = self.forward(text[place].to(torch.int64), state, noise)
            total = total + self.log_likelihood(logits, text[(place + 1) % len(text)].to(torch.int64))
        return total, state

    def step(self, fitness: Tensor, noise: Noise) -> dict[str, int]:
        """Move weights by the votes of pairs.

        Parameters
        ----------
        fitness : int8 [pairs], the sign of what the first member did better than the second
        noise : what they had

        Returns
        -------
        How many weights of each name have moved.
        """
        share = 1 / (self.settings.decay * self.updates + 1)
        quantile = int(16 * NormalDist().inv_cdf(1 - share / 2)) if share < 1 else 0
        bound = quantile * 16 * math.isqrt(len(fitness))
        moved = {}
        for name, weight in self.weights.items():
            votes = _votes(fitness.to(torch.int8), *noise.parts[name], weight.dim())
            change = votes.sign() * ((votes.abs() >= bound) & (votes != 0))
            self.weights[name] = _clip(weight.to(torch.int32) + change.to(torch.int32)).to(torch.int8)
            moved[name] = int((self.weights[name] != weight).sum())
        self.updates += 1
        return moved

    def update(self, text: Tensor, at: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update: 2 * pairs members read `tokens` bytes each, and the weights move.

        Parameters
        ----------
        text : uint8 [bytes]
        at : int64 [pairs], where each pair is in the text
        state : that of `start(2 * pairs)`, then what this returned

        Returns
        -------
        Where the pairs are now, the state, and all members' log-likelihoods int32 [2 * pairs], in sixteenths of a bit.
        """
        noise = self.noise()
        total, state = self.read(text, at.repeat_interleave(2), state, noise)
        self.step((total[::2] - total[1::2]).sign(), noise)
        return (at + self.settings.tokens) % len(text), state, total


def _votes(fitness: Tensor, a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Sum over pairs of fitness * A B' (of a vector: fitness * A * B), int64."""
    total: Tensor | None = None
    for first in range(0, len(fitness), CHUNK):
        part = slice(first, first + CHUNK)
        own = a[part] * fitness[part].unsqueeze(1)
        if dim == 2:
            votes = torch._int_mm(own.T.contiguous(), b[part])
        else:
            votes = (own.to(torch.int32) * b[part]).sum(0, dtype=torch.int32)
        total = votes.to(torch.int64) if total is None else total + votes
    assert total is not None
    return total


def _clip(values: Tensor) -> Tensor:
    return values.clamp(-MOST, MOST)
