"""EGGROLL: evolution strategies with low-rank perturbations, for any score of any network (arXiv 2511.16652).

Member i of a population has every matrix M moved by sigma * s_i * E, E = A B' / sqrt(r), A and B of normal numbers,
s_i = +1 and -1 for the two members of a pair, who share E. A population runs as the batch of one forward pass: one
product with M, and a small correction for each member. Noise is a function of (seed, parameter, epoch, pair), made
where it is needed and never kept. Nothing is differentiated. Written from the formulas of an account of the paper and
of its programs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError
from featherweight.methods.learn.optimisers import Optimiser, sgd

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""Of the generator splitmix64, as the numbers of 64 bits with sign that they are here."""


def key_of(*names: object) -> int:
    """A key of 64 bits, with sign, of what noise is for."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little", signed=True)


def random_words(key: int, first: int, count: int, size: int, device: torch.device) -> Tensor:
    """Rows first to first + count of a table of random 64-bit words, int64 [count, size]; nothing else is made."""
    rows = torch.arange(first, first + count, device=device).unsqueeze(1)
    place = rows * size + torch.arange(size, device=device)
    word = (place + 1) * GOLDEN + key
    word = (word ^ _right(word, 30)) * MIX_1
    word = (word ^ _right(word, 27)) * MIX_2
    return word ^ _right(word, 31)


def _right(word: Tensor, by: int) -> Tensor:
    """A shift that fills with zeros."""
    return (word >> by) & ((1 << (64 - by)) - 1)


def normal_rows(key: int, first: int, count: int, size: int, device: torch.device) -> Tensor:
    """As `random_words`, normal numbers of mean 0 and variance 1, float32 (Box and Muller)."""
    word = random_words(key, first, count, size, device)
    low, high = (word & 0xFFFFFFFF).float(), _right(word, 32).float()
    radius = ((low + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
    return radius.mul_((high * (2 * math.pi * 2.0**-32)).cos_())


@dataclass(frozen=True)
class Evolving:
    """Settings.

    population : members, an even number; a pair has the same noise with opposite signs
    sigma : standard deviation of an entry's perturbation
    rank : of a perturbation
    shaping : "z-score" over the population; "group": the mean of the group is subtracted, and all divided by the
        deviation of the population; "sign": which of a pair was better, and nothing of by how much
    group_size : neighbouring members that saw the same prompt, for "group"
    biases : perturb biases of linear layers, too, with noise of full rank
    noise_reuse : steps with the same noise
    """

    population: int = 64
    sigma: float = 1e-3
    rank: int = 1
    shaping: Literal["z-score", "group", "sign"] = "z-score"
    group_size: int = 8
    biases: bool = False
    noise_reuse: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 2 or self.population % 2:
            raise FeatherError(f"a population of {self.population} is not made of pairs: give an even number")
        if self.shaping == "group" and self.population % self.group_size:
            raise FeatherError(f"groups of {self.group_size} do not fill a population of {self.population}")
        for name in ("sigma", "rank", "group_size", "noise_reuse"):
            if getattr(self, name) <= 0:
                raise FeatherError(f"{name} is {getattr(self, name)}: give a number above 0")

    def shaped(self, scores: Tensor) -> Tensor:
        """[population] scores, higher is better -> what members weigh; of equal scores, nothing."""
        scores = scores.float()
        if self.shaping == "sign":
            better = (scores[::2] - scores[1::2]).sign()
            return torch.stack((better, -better), 1).flatten() / 2
        if self.shaping == "group":
            groups = scores.reshape(-1, self.group_size)
            centred = (groups - groups.mean(1, keepdim=True)).flatten()
            return centred / (scores.var(correction=0) + 1e-5).sqrt()
        deviation = scores.std(correction=0)
        return (scores - scores.mean()) / torch.where(deviation > 0, deviation, 1.0)


class Evolution:
    """A model that is trained by the scores of perturbed copies of itself.

    model : weights of its `nn.Linear` and `nn.Embedding` modules are perturbed and learn, all else stays. A weight that
        several modules share is perturbed alike in each, as long as each is such a module
    optimiser : gets -sqrt(population) * mean(score * sigma * s * E) as the gradient

    FeatherError: the model has no such weight.
    """

    def __init__(
        self, model: nn.Module, settings: Evolving, optimiser: Optimiser | None = None, rate: float = 1.0
    ) -> None:
        self.model, self.settings, self.epoch = model, settings, 0
        self.names: dict[Tensor, str] = {}
        self.modules: list[nn.Module] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                self.modules.append(module)
                self.names.setdefault(module.weight, f"{name}.weight")
                if settings.biases and getattr(module, "bias", None) is not None:
                    self.names.setdefault(module.bias, f"{name}.bias")  # type: ignore[arg-type]
        if not self.modules:
            raise FeatherError("the model has no nn.Linear and no nn.Embedding: there is nothing to perturb")
        self.optimiser = (optimiser or sgd())(list(self.names), rate)

    def _pairs(self, parameter: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """Noise of pairs: A [pairs, rows, rank] and B [pairs, columns, rank] of a matrix, [pairs, size] of a bias."""
        key = key_of(self.settings.seed, self.names[parameter], self.epoch // self.settings.noise_reuse)
        sizes = [size * (self.settings.rank if parameter.dim() == 2 else 1) for size in parameter.shape]
        drawn = normal_rows(key, first, count, sum(sizes), parameter.device).to(parameter.dtype)
        parts: tuple[Tensor, ...] = torch.split(drawn, sizes, dim=1)
        return tuple(p.reshape(count, -1, self.settings.rank) for p in parts) if parameter.dim() == 2 else parts

    def _members(self, parameter: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """Noise of members, the first part times sigma * sign / sqrt(rank)."""
        begin, end = first // 2, (first + count + 1) // 2
        member = torch.arange(first, first + count, device=parameter.device)
        a, *rest = (part[member // 2 - begin] for part in self._pairs(parameter, begin, end - begin))
        scale = self.settings.sigma / (math.sqrt(self.settings.rank) if parameter.dim() == 2 else 1)
        signs = (1 - 2 * (member % 2)).to(parameter.dtype).reshape(-1, *[1] * (a.dim() - 1))
        return (a * (signs * scale), *rest)

    def perturbation(self, parameter: Tensor, member: int) -> Tensor:
        """What is added to a parameter for a member, of its shape."""
        parts = self._members(parameter, member, 1)
        return parts[0][0] @ parts[1][0].T if parameter.dim() == 2 else parts[0][0]

    @contextmanager
    def perturbed(self, first: int = 0, count: int | None = None) -> Iterator[None]:
        """Within it, calls of the model have members first to first + count as the outer part of their batch.

        The first dimension of what enters a layer is count * (samples of a member), one member after the other, as
        `copies` makes it. No gradients are kept.
        """
        count = self.settings.population - first if count is None else count
        if not 0 <= first < first + count <= self.settings.population:
            raise FeatherError(
                f"members {first} to {first + count} are not in a population of {self.settings.population}"
            )

        noise = {parameter: self._members(parameter, first, count) for parameter in self.names}

        def add(module: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
            x = given[0]
            if x.shape[0] % count:
                raise FeatherError(
                    f"{count} members cannot share a batch of {x.shape[0]}: repeat the samples for each, with `copies`"
                )
            a, b = noise[module.weight]  # type: ignore[index]
            if isinstance(module, nn.Embedding):
                own = a.gather(1, x.reshape(count, -1, 1).expand(-1, -1, a.shape[2])) @ b.transpose(1, 2)
            else:
                own = x.reshape(count, -1, x.shape[-1]) @ b @ a.transpose(1, 2)
            bias = getattr(module, "bias", None)
            if bias is not None and bias in noise:
                own = own + noise[bias][0].unsqueeze(1)
            return result + own.reshape(result.shape)

        handles = [module.register_forward_hook(add) for module in self.modules]
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, score: Callable[[int, int], Tensor], at_once: int | None = None) -> Tensor:
        """All members' scores: score(first, count) -> [count] is called with so many members at once."""
        whole = self.settings.population
        size = at_once or whole
        parts = []
        for first in range(0, whole, size):
            count = min(size, whole - first)
            with self.perturbed(first, count):
                parts.append(score(first, count))
        return torch.cat(parts)

    def estimate(self, scores: Tensor, parameter: Tensor) -> Tensor:
        """mean(score * s * E) over the population, of the parameter's shape: one product of [pairs * rank] columns."""
        pairs = self.settings.population // 2
        parts = self._pairs(parameter, 0, pairs)
        weights = (scores[::2] - scores[1::2]).to(parameter) / self.settings.population
        if parameter.dim() == 1:
            return weights @ parts[0]
        a, b = (part.transpose(1, 2).reshape(-1, part.shape[1]) for part in parts)  # [pairs * rank, rows or columns]
        each = (weights / math.sqrt(self.settings.rank)).repeat_interleave(self.settings.rank)
        return (a * each.unsqueeze(1)).T @ b

    def step(self, scores: Tensor) -> None:
        """Learn from the scores [population] of this epoch's members; the next has noise of its own."""
        if scores.shape != (self.settings.population,):
            raise FeatherError(
                f"there are {tuple(scores.shape)} scores for a population of {self.settings.population}: one a member"
            )
        shaped = self.settings.shaped(scores)
        factor = -math.sqrt(self.settings.population) * self.settings.sigma
        with torch.no_grad():
            for parameter in self.names:
                parameter.grad = factor * self.estimate(shaped, parameter)
        self.optimiser.step()
        for parameter in self.names:
            parameter.grad = None
        self.epoch += 1


def copies(samples: Tensor, members: int) -> Tensor:
    """[samples, ...] -> [members * samples, ...]: all samples for each member, one member after the other."""
    return samples.repeat(members, *[1] * (samples.dim() - 1))
