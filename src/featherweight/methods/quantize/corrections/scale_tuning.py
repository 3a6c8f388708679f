"""Scale tuning: after rounding, train the stored scales with all digits fixed.

Every floating-point tensor of a code (scales, offsets, tables, factors) moves; what is stored keeps its size. Of block
scope, against the float block's output on the float stream, so that errors of earlier blocks are made up for; of model
scope, against the original model's predictions (KL on calibration windows). Related: the end-to-end phase of
EfficientQAT (arXiv 2407.11062) and the norm tuning of several low-bit methods; here the teacher is the original model.

Adam on relative changes: a value v is v0 + u theta, with u = max(|v0|, a tenth of the root mean square of its row).
The loss over held-out samples, measured with the values as they are stored, chooses the step that is kept; the start
is among the candidates, so the result is never worse on them. How high a rate may be depends on the model: where the
first checks are far above the start's, the tuning begins again from the start at a fifth of the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.events import Observer, silent
from featherweight.methods.learn.batches import ShuffledRounds
from featherweight.methods.learn.loop import Schedule, Training, minimise
from featherweight.methods.learn.objectives import BlockObjective, ModelObjective, ModelTrainingWork, Objective
from featherweight.methods.learn.optimisers import adam
from featherweight.methods.quantize.base import Correction, Scope
from featherweight.methods.quantize.decoding import TunableCode
from featherweight.methods.quantize.tuned import TunedState
from featherweight.model.network.access import BlockAccess, ModelAccess
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.run.training_store import NO_STORE, TrainingStore
from featherweight.system.precision import Chosen, Precision, choose_precision

Original = Callable[[str], Tensor]
"""What gives the original's weight [out, in] of a layer by its name."""
RETREATS = 3  # from the learning rate of a small model to a hundredth of it


@register("correction", "scale-tuning")
class ScaleTuning(Correction):
    """Train the stored scales of all codes of a block, or of the whole model, with the digits fixed."""

    against: Literal["block", "model"] = Field("model", description="match the float block's output, or predictions")
    steps: int = Field(200, ge=1, description="optimiser steps")
    learning_rate: float = Field(1e-2, gt=0, description="of Adam, relative to each value; cosine to zero")
    batch_size: int = Field(4, ge=1, description="model scope: windows a step")
    token_share: float = Field(
        1.0, gt=0, le=1, description="model scope: part of a window's tokens whose predictions are compared"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    checks: int = Field(8, ge=1, description="how often the held-out samples are measured")
    held_out_share: float = Field(0.125, gt=0, lt=1, description="of the samples, if none are apart: only for choosing")
    norms: bool = Field(False, description="also train the norms that feed the layers; they are stored anew")
    precision: Precision = Field("float32", description="of training passes; auto: the faster here; measured in fp32")

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """What the setting `against` asks for."""
        return self.against

    @property
    def training_bytes(self) -> int:
        return 16  # digits, weights as decoded, their gradients, and values with moments, which are few

    @property
    def needs(self) -> tuple[str, ...]:
        return ("targets",) if self.against == "block" else ()

    @property
    def alters(self) -> bool:
        return self.norms and self.against == "block"

    def model_work(self, windows: int, held_out: int) -> ModelTrainingWork:
        """Of scope "model", with so many windows to learn from and to choose by; the original's states are kept."""
        learned = self.steps * self.batch_size
        checks = 1 + min(self.checks, self.steps)
        return ModelTrainingWork(learned, checks * held_out, min(learned, windows) + held_out)

    def of_block(self, session: BlockAccess, precision: Chosen) -> BlockObjective:
        """What a block, or some of them as one, are trained for."""
        return BlockObjective(session, self.held_out_share, precision)

    def correct_block(
        self, session: BlockAccess, codes: Mapping[str, Code], notify: Observer = silent, seed: int = 0
    ) -> dict[str, Code]:
        """Codes with tuned scales. Norms, if asked for, are set in the session."""
        objective = self.of_block(session, choose_precision(self.precision, notify, session.device))
        norms = {name: session.tensor(name) for name in self._norms(session.layers, codes)}
        trained = {n: self.trainable(code, _original(session), n, session.device) for n, code in codes.items()}
        tuned, tensors = self.tune(objective, TunedState(trained, norms, objective.device), notify, seed)
        for name, value in tensors.items():
            session.set_tensor(name, value)
        return tuned

    def tune_model(
        self,
        model: ModelAccess,
        codes: Mapping[str, Code],
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> dict[str, Code]:
        """Codes with tuned scales. Norms, if asked for, are set in the session."""
        objective = ModelObjective(
            model,
            self.batch_size,
            choose_precision(self.precision, notify, model.device),
            self.held_out_share,
            self.token_share,
        )
        norms = {name: model.tensor(name) for name in self._norms(model.layers, codes)}
        trained = {n: self.trainable(code, _original(model), n, model.device) for n, code in codes.items()}
        tuned, tensors = self.tune(objective, TunedState(trained, norms, objective.device), notify, seed, store)
        for name, value in tensors.items():
            model.set_tensor(name, value)
        return tuned

    def _norms(self, layers: Mapping[str, Any], codes: Mapping[str, Code]) -> list[str]:
        found = dict.fromkeys(layers[name].norm for name in codes if layers[name].norm) if self.norms else {}
        return list(found)

    def trainable(self, code: Code, weight: Original, name: str, device: torch.device) -> TunableCode:
        """What of a layer's code is trained: all its scales. `weight` gives the original's, where it counts."""
        return TunableCode(code, device=device)

    def tune(
        self,
        objective: Objective,
        state: TunedState,
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> tuple[dict[str, Code], dict[str, Tensor]]:
        """The best codes and tensors by the held-out loss, the given ones among the candidates."""
        if objective.held_out_loss(*state.stored()) is None or objective.batches == 0 or not state.theta:
            notify({"event": self.kind, "skipped": "no held-out samples" if state.theta else "nothing to tune"})
            return state.given()
        schedule = Schedule(self.steps, self.learning_rate, self.warmup, self.checks)
        minimise(
            state.theta,
            lambda batch: state.backward(objective, batch),
            Training(self.kind, schedule, adam(betas=(0.9, 0.99)), RETREATS),
            ShuffledRounds(objective.batches, seed),
            check=lambda: objective.held_out_loss(*state.stored()),
            notify=notify,
            store=store,
        )
        return state.result()


def _original(network: BlockAccess | ModelAccess) -> Original:
    """What gives the original's weight of a layer [out, in]."""

    def weight(name: str) -> Tensor:
        with network.original():
            return network.weight(name)

    return weight
