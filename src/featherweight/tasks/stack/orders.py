"""In which order the blocks of all layers are worth their bytes. A layer's own blocks always come in their order.

`average` is that of BitStack (arXiv 2410.23918): for b = 1, 2, ... all layers have b blocks, each alone is given one
more, and layers go by the perplexity of that, so that every layer has b blocks before any has b + 2. `local` and
`knapsack` go by what a block saves a byte: of the layer's own error, and of that times what hangs on the layer in the
true model; where a later block saves more than one before it, both go together. `random` is there to compare with.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from featherweight.methods.budget.knapsack import Option, frontier

Order = Literal["average", "knapsack", "local", "random"]
ORDERS: tuple[Order, ...] = ("average", "knapsack", "local", "random")


def by_level(losses: Sequence[Mapping[str, float]]) -> list[str]:
    """Layers level by level, the smallest loss first; losses that are no numbers come last, by those of the next level.

    losses : of each level, by layer: the model's where this layer alone has the next block
    """
    found: list[str] = []
    for level, here in enumerate(losses):
        later = losses[level + 1] if level + 1 < len(losses) else {}

        def key(name: str, here: Mapping[str, float] = here, later: Mapping[str, float] = later) -> tuple[float, float]:
            return (here[name], 0.0) if math.isfinite(here[name]) else (math.inf, later.get(name, math.inf))

        found += sorted(here, key=key)
    return found


def by_saving(costs: Mapping[str, Sequence[float]], nbytes: Mapping[str, Sequence[int]]) -> list[str]:
    """Layers by what their next block saves a byte.

    costs : by layer, what is lost with one block, two, ...
    nbytes : by layer, bytes with one block, two, ...
    """
    names = list(costs)
    items = [[Option(size, cost) for size, cost in zip(nbytes[n], costs[n], strict=True)] for n in names]
    taken, found = [0] * len(names), list[str]()
    for solution in frontier(items):
        for place, level in enumerate(solution.chosen):
            found += [names[place]] * (level - taken[place])
            taken[place] = max(level, taken[place])
    for place, name in enumerate(names):  # blocks that save nothing
        found += [name] * (len(nbytes[name]) - 1 - taken[place])
    return found


def shuffled(blocks: Mapping[str, int], seed: int) -> list[str]:
    """Layers at random, each as often as it has blocks beyond its first."""
    found = [name for name, count in blocks.items() for _ in range(count - 1)]
    random.Random(seed).shuffle(found)
    return found
