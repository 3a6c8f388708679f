"""What a fit chooses among, and how much it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from featherweight.tasks.fit.choosing import Pool
from featherweight.tasks.fit.targets import vllm_ways_named
from featherweight.tasks.fit.ways import Way, own_ways, ways_named

DEFAULT = "kl"
"""Measure of what hangs on each layer, where there is text."""


@dataclass(frozen=True)
class FitSettings:
    """What is chosen among, and how.

    ways : names of choices for the layers of the blocks (`feather fit --help`); default: planes and bits
    data_free : no text: rounding to the nearest, errors of weights
    alike : queries, keys and values go one way together, as do gates and the layers beside them
    pools : bytes for layers by their names, in place of one budget
    refine : rounds in which the true model corrects the choice; 0: what adds up is taken
    windows, length : of calibration text for statistics and for the result
    tokens : of calibration text on which divergences are taken
    sensitivity : how it is found what hangs on each layer: kl, gradient, fisher, lim, zd, fidelity or weights
    checks : random choices on which the linear model of the divergence is compared with the truth; fewer than 4: none
    corrections : of the whole model, as in a recipe, after the layers: [{"kind": "scale-tuning"}]
    target : "llama.cpp" takes ggml's own types as choices and makes a plain GGUF, `ways` then names types; "vllm" takes
        what its own kernels read, and keeps embedding and output layer; "featherweight" is the same as None
    tensor_parallel : processes that must be able to share every layer of the blocks without cutting groups
    tokens_per_second : least rate of decoding in products with the layers, by rates measured here; None for any
    solver : "knapsack"; "greedy" adds up divergences of single tensors step by step, a control
    score : tokens of held-out text on which result and original are compared; 0: not
    """

    ways: tuple[str, ...] = ()
    data_free: bool = False
    alike: bool = False
    pools: tuple[Pool, ...] = ()
    refine: int = 2
    windows: int = 64
    length: int = 1024
    tokens: int = 2048
    sensitivity: str = DEFAULT
    checks: int = 8
    corrections: tuple[Mapping[str, Any], ...] = ()
    score: int = 16384
    seed: int = 0
    target: Literal["llama.cpp", "vllm", "featherweight"] | None = None
    tensor_parallel: int = 1
    tokens_per_second: float | None = None
    solver: Literal["knapsack", "greedy"] = "knapsack"

    @cached_property
    def choices(self) -> tuple[Way, ...]:
        if self.target == "vllm":
            return vllm_ways_named(self.ways)
        return ways_named(self.ways) if self.ways and not self.gguf else own_ways()

    @property
    def gguf(self) -> bool:
        """Whether a GGUF of ggml's types is made."""
        return self.target == "llama.cpp"

    @property
    def together(self) -> bool:
        """Whether layers that programs fuse go one way."""
        return self.alike or self.target == "vllm"

    @property
    def calibration(self) -> dict[str, Any]:
        return {"sequences": self.windows, "length": self.length, "seed": self.seed}
