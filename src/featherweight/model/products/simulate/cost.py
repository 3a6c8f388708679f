"""Cycles and memory traffic of a table-lookup machine, for a layer and for a model.

TeLLMe (arXiv 2510.15926). The formulas are reconstructed from the loop bounds of the authors' sources: a product of T
tokens takes T ceil(K / 84) (84 / reads + ceil(N / 16)) cycles and a fill, loading its weights ceil(K / 84) ceil(N / 5)
words of one cycle each, side by side with the product. They are a lower bound on latency and predict no measured time:
attention, the output layer (which the device leaves to its host) and phases that do not overlap are not in them. The
paper reports 25 tokens a second where they allow 150.
"""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.model.products.simulate.table_lookup import TELLME, TableLookup


@dataclass(frozen=True)
class Cost:
    """Cycles of the product, cycles of the loader, cycles of both side by side, bytes of weights from memory."""

    compute_cycles: int = 0
    load_cycles: int = 0
    cycles: int = 0
    weight_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.compute_cycles + other.compute_cycles,
            self.load_cycles + other.load_cycles,
            self.cycles + other.cycles,
            self.weight_bytes + other.weight_bytes,
        )


@dataclass(frozen=True)
class ModelShape:
    """A decoder's matrices. The defaults are BitNet 0.73B's, with as many key-value heads as heads."""

    layers: int = 24
    hidden: int = 1536
    intermediate: int = 4096
    key_value: int = 1536

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of a block's q, k, v, o, gate, up and down."""
        h, f, kv = self.hidden, self.intermediate, self.key_value
        return (h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)


def linear_cost(outputs: int, inputs: int, tokens: int, machine: TableLookup = TELLME) -> Cost:
    """Of one matrix [outputs, inputs] and `tokens` tokens. For a single token the slower of product and loader counts,
    and so it does for many, where that is the product."""
    blocks = machine.blocks(inputs)
    building = -(-machine.block // machine.reads)
    compute = tokens * blocks * (building + -(-outputs // machine.lanes)) + machine.fill
    words = blocks * machine.words(outputs)
    return Cost(compute, words, max(compute, words), words * machine.word_bits // 8)


def model_cost(shape: ModelShape, tokens: int, machine: TableLookup = TELLME, planes: int = 1) -> Cost:
    """Of all matrices of all blocks. Further trit-planes stream and look up again but share the tables."""
    total = Cost()
    for outputs, inputs in shape.matrices():
        total += linear_cost(planes * outputs, inputs, tokens, machine)
    return Cost(*(shape.layers * getattr(total, name) for name in total.__dataclass_fields__))


def tokens_per_second(
    shape: ModelShape,
    tokens: int = 1,
    machine: TableLookup = TELLME,
    planes: int = 1,
    bandwidth: float | None = None,
) -> float:
    """Upper bound on the rate; `bandwidth` (bytes/s) bounds it too if memory gives no word a cycle."""
    cost = model_cost(shape, tokens, machine, planes)
    seconds = cost.cycles / machine.clock
    if bandwidth is not None:
        seconds = max(seconds, cost.weight_bytes / bandwidth)
    return tokens / seconds
