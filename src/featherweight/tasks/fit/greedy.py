"""A control: divergences of one tensor at a time added up, and the bytes given out step by step.

As GGUF-Tool-Suite does it, for its types of llama.cpp: every layer begins with its smallest way, and while bytes are
left, the step up that saves most a byte is taken, one way at a time in the order of bytes. No true model is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.methods.budget.knapsack import Option


def greedy(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The place of each item's option. ValueError where the smallest options take more than the budget."""
    orders = [sorted(range(len(item)), key=lambda p, item=item: (item[p].nbytes, item[p].cost)) for item in items]  # type: ignore[misc]
    reached = [0] * len(items)
    room = budget - sum(item[order[0]].nbytes for item, order in zip(items, orders, strict=True))
    if room < 0:
        raise ValueError("the smallest options take more than the budget")
    while True:
        best: tuple[float, int] | None = None
        for number, (item, order) in enumerate(zip(items, orders, strict=True)):
            if reached[number] + 1 == len(order):
                continue
            now, then = item[order[reached[number]]], item[order[reached[number] + 1]]
            more = then.nbytes - now.nbytes
            if more <= room:
                gain = (now.cost - then.cost) / max(more, 1)
                if best is None or gain > best[0]:
                    best = (gain, number)
        if best is None:
            return [order[place] for order, place in zip(orders, reached, strict=True)]
        number = best[1]
        item, order = items[number], orders[number]
        room -= item[order[reached[number] + 1]].nbytes - item[order[reached[number]]].nbytes
        reached[number] += 1
