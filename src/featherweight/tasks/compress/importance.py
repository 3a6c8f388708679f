"""Scores of blocks for allocators that order them: ZD from the weights, LIM from a pass over a few windows of text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.budget.importance import lim_of, zd_of
from featherweight.methods.budget.top_order import TopOrder
from featherweight.methods.calibrate.runner import Calibration
from featherweight.model.network.streams import hidden_of
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.tasks.compress.plan import Plan

WINDOWS = 8
"""Of text that LIM is taken on: means of cosines settle after a few thousand tokens."""


def block_scores(plan: Plan, checkpoint: Checkpoint, windows: Tensor | None) -> dict[int, float]:
    """By block, how important it is, more for a higher value.

    windows : token ids int64 [n, T]; of them the first WINDOWS are run

    Raises
    ------
    RecipeError
        Without windows, for a score that needs them.
    """
    allocation = plan.recipe.allocation
    assert isinstance(allocation, TopOrder)
    if allocation.importance == "zd":
        return _by_weights(plan, checkpoint, allocation)
    if windows is None:
        raise RecipeError(
            f"recipe {plan.recipe.name}: blocks ordered by lim need text that the network runs on, which neither "
            "data-free recipes nor files of statistics have: use a calibrated rounding with text, or set "
            "allocation.score to zd"
        )
    with Calibration.open(checkpoint, plan.anatomy, windows[:WINDOWS], plan.recipe.calibration, ()) as calibration:
        states: list[list[Tensor]] = []
        with calibration.whole_model() as whole, torch.no_grad():
            for batch in calibration.batches:
                found: list[Tensor] = []
                hooks = [whole.host.blocks[0].register_forward_pre_hook(_before(found), with_kwargs=True)]
                hooks += [block.register_forward_hook(_behind(found)) for block in whole.host.blocks]
                try:
                    whole.run(batch)
                finally:
                    for hook in hooks:
                        hook.remove()
                states.append([state.flatten(0, 1) for state in found])
        return dict(enumerate(lim_of(states)))


def _before(found: list[Tensor]) -> Callable[..., None]:
    def note(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    return note


def _behind(found: list[Tensor]) -> Callable[..., None]:
    def note(module: object, args: object, output: object) -> None:
        found.append(hidden_of(output))

    return note


def _by_weights(plan: Plan, checkpoint: Checkpoint, allocation: TopOrder) -> dict[int, float]:
    found = {}
    for block in range(plan.anatomy.blocks):
        read = [
            (lambda layer=layer: LayerWeight(checkpoint, layer).rows(0, layer.shape[0]))
            for layer in plan.anatomy.layers
            if layer.block == block
        ]
        found[block] = -zd_of(read, allocation.threshold, allocation.two_sided)
    return found
