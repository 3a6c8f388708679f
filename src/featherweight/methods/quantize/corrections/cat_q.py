"""CAT-Q: one trit-plane from three learned factors a group and a low-rank change of the weights, soft first, then hard.

CAT-Q: Cost-efficient and Accurate Ternary Quantization for LLMs (arXiv 2606.26650). Its learnable modulation and
softened ternarization are in `featherweight.methods.quantize.modulated`. For the share `softened` of the training, the
sharpness of the soft trits rises in proportion to the steps up to `sharpness`; after that the trits are hard. What is
minimised is the Huber loss of a block's output on the stream quantised so far, towards the original's on its own; by
AdamW with two rates and clipped gradients. Nothing of the low-rank change is stored, nor are the groups' offsets.

The authors have released code for inference and configurations, not the training. Reconstructed here: everything
about the optimiser but its rates and the clip (warm-up and cosine of the rate, weight decay), the loss's delta, the
low-rank change's scale and start, sharpness by steps in place of epochs, and the gradients (see `modulated`). The
configuration's `phi_x_n: 3` is left out: what it does could not be read.

Where this departs: within a recipe a window is one block. The paper's windows of four, moved on by two, are those of
`feather heal --level blocks --window 4 --training cat-q`, where a block that two windows share starts anew in the
second. Held-out samples, measured with hard codes as they are stored, choose the step that is kept; the given code and
CAT-Q's own start are among the candidates. `against: model` is not in the paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.learn.batches import ShuffledRounds
from featherweight.methods.learn.loop import Schedule, Training, minimise
from featherweight.methods.learn.objectives import BlockObjective, Objective
from featherweight.methods.learn.optimisers import adamw
from featherweight.methods.quantize.base import Grid
from featherweight.methods.quantize.corrections.scale_tuning import Original, ScaleTuning
from featherweight.methods.quantize.decoding import TunableCode
from featherweight.methods.quantize.grids.ternary import TernaryGrid
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.modulated import LowRankChange, ModulatedCode, one_plane
from featherweight.methods.quantize.tuned import TunedState
from featherweight.model.network.access import BlockAccess
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.run.training_store import NO_STORE, TrainingStore
from featherweight.system.precision import Chosen

NEEDED = "it trains one trit-plane: take the grid ternary, or trit-planes with planes: 1"


@register("correction", "cat-q")
class CatQ(ScaleTuning):
    """Choose the trits and scales of a block anew, by learned factors of groups (see the module)."""

    against: Literal["block", "model"] = Field("block", description="match the float block's output, or predictions")
    steps: int = Field(3420, ge=1, description="optimiser steps; published: 60 epochs of 512 samples, 9 at a time")
    learning_rate: float = Field(1.5e-3, gt=0, description="of AdamW, for the factors; cosine to zero")
    low_rank_share: float = Field(0.2, gt=0, description="of the learning rate, for the low-rank change")
    rank: int = Field(64, ge=0, description="of the change of the weights; 0: none")
    low_rank_scale: float = Field(1.0, gt=0, description="what its product is multiplied by (reconstructed)")
    softened: float = Field(0.8, ge=0, lt=1, description="share of the steps with soft trits")
    sharpness: float = Field(30.0, gt=0, description="of soft trits, at their end")
    huber: float = Field(1.0, gt=0, description="error from which the loss of a block rises linearly (reconstructed)")
    clip: float = Field(1.0, gt=0, description="largest norm of a step's gradients")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW, towards the start (reconstructed)")

    def refusal(self, grid: Grid) -> str | None:
        plain = isinstance(grid, TernaryGrid) or (isinstance(grid, TritPlaneGrid) and grid.planes == 1)
        return None if plain else NEEDED

    def of_block(self, session: BlockAccess, precision: Chosen) -> BlockObjective:
        return BlockObjective(session, self.held_out_share, precision, huber=self.huber)

    def trainable(self, code: Code, weight: Original, name: str, device: torch.device) -> TunableCode:
        if not one_plane(code):
            raise RecipeError(f"cat-q cannot train {name}: {NEEDED}")
        change = LowRankChange(self.rank, self.low_rank_scale, self.low_rank_share)
        return ModulatedCode(code, weight(name), device, change)

    def sharpness_at(self, step: int) -> float | None:
        """Of the soft trits of step 1, 2, ...; None where they are hard."""
        share = step / self.steps
        return share / self.softened * self.sharpness if share <= self.softened else None

    def tune(
        self,
        objective: Objective,
        state: TunedState,
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> tuple[dict[str, Code], dict[str, Tensor]]:
        """The best codes and tensors by the held-out loss; the given ones and CAT-Q's start are candidates."""
        start = self._better(objective, state)
        if start is None:
            notify({"event": self.kind, "skipped": "nothing to train, or no held-out samples"})
            return state.given()
        done = torch.zeros(1, device="cpu")  # steps; trained values in which a state that is stored has it, too

        def gradients(batch: int) -> float:
            _soften(state, self.sharpness_at(int(done) + 1))
            loss = state.backward(objective, batch)
            state.clip(self.clip)
            return loss

        def count() -> None:
            done.add_(1)

        def now() -> tuple[dict[str, Code], dict[str, Tensor]]:
            return state.result() if done > 0 else start

        def check() -> float | None:
            codes, tensors = now()
            return objective.held_out_loss(*state.decoded(codes, tensors))

        schedule = Schedule(self.steps, self.learning_rate, self.warmup, self.checks)
        training = Training(self.kind, schedule, adamw(weight_decay=self.weight_decay))
        minimise(
            [*state.theta, done],
            gradients,
            training,
            ShuffledRounds(objective.batches, seed),
            check=check,
            project=count,
            notify=notify,
            store=store,
        )
        return now()

    def _better(self, objective: Objective, state: TunedState) -> tuple[dict[str, Code], dict[str, Tensor]] | None:
        """What the training begins with; None where there is nothing to train or to choose by."""
        if objective.batches == 0 or not state.theta:
            return None
        losses = {}
        candidates = [state.given(), state.result()]
        for number, candidate in enumerate(candidates):
            loss = objective.held_out_loss(*state.decoded(*candidate))
            if loss is None:
                return None
            losses[number] = loss
        return candidates[1 if losses[1] < losses[0] else 0]


def _soften(state: TunedState, sharpness: float | None) -> None:
    for code in state.codes.values():
        if isinstance(code, ModulatedCode):
            code.soften(sharpness)
