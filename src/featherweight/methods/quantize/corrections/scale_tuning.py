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

from collections.abc import Mapping
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
from featherweight.model.network.access import BlockAccess, ModelAccess
from featherweight.registry import register
from featherweight.storage.codes import Code
from featherweight.storage.run.training_store import NO_STORE, TrainingStore
from featherweight.system.precision import Precision, choose_precision

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

    def correct_block(
        self, session: BlockAccess, codes: Mapping[str, Code], notify: Observer = silent, seed: int = 0
    ) -> dict[str, Code]:
        """Codes with tuned scales. Norms, if asked for, are set in the session."""
        objective = BlockObjective(
            session, self.held_out_share, choose_precision(self.precision, notify, session.device)
        )
        norms = {name: session.tensor(name) for name in self._norms(session.layers, codes)}
        tuned, tensors = self.tune(objective, codes, norms, notify, seed)
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
        tuned, tensors = self.tune(objective, codes, norms, notify, seed, store)
        for name, value in tensors.items():
            model.set_tensor(name, value)
        return tuned

    def _norms(self, layers: Mapping[str, Any], codes: Mapping[str, Code]) -> list[str]:
        found = dict.fromkeys(layers[name].norm for name in codes if layers[name].norm) if self.norms else {}
        return list(found)

    def tune(
        self,
        objective: Objective,
        codes: Mapping[str, Code],
        tensors: Mapping[str, Tensor],
        notify: Observer = silent,
        seed: int = 0,
        store: TrainingStore = NO_STORE,
    ) -> tuple[dict[str, Code], dict[str, Tensor]]:
        """The best codes and tensors by the held-out loss, the given ones among the candidates."""
        state = _State(codes, tensors, objective.device)
        if objective.held_out_loss(*state.stored()) is None or objective.batches == 0 or not state.theta:
            notify({"event": "scale-tuning", "skipped": "no held-out samples" if state.theta else "nothing to tune"})
            return dict(codes), dict(tensors)
        schedule = Schedule(self.steps, self.learning_rate, self.warmup, self.checks)
        minimise(
            state.theta,
            lambda batch: state.backward(objective, batch),
            Training("scale-tuning", schedule, adam(betas=(0.9, 0.99)), RETREATS),
            ShuffledRounds(objective.batches, seed),
            check=lambda: objective.held_out_loss(*state.stored()),
            notify=notify,
            store=store,
        )
        return state.result()


class _State:
    """Relative changes theta of all values, and what they stand for, on one device; codes are in main memory."""

    def __init__(self, codes: Mapping[str, Code], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.codes = {name: TunableCode(code, device=device) for name, code in codes.items()}
        self.tensors = {name: value.to(device) for name, value in tensors.items()}
        keys = [(name, path, v) for name, code in self.codes.items() for path, v in code.parameters.items()]
        keys += [("", name, value.float()) for name, value in self.tensors.items()]
        self._keys = [(name, path) for name, path, _ in keys]
        self._start = [value for _, _, value in keys]
        self._unit = [_unit(value) for value in self._start]
        self.theta = [torch.zeros_like(value).requires_grad_() for value in self._start]

    def values(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Values by layer and path, and tensors by name; differentiable in theta."""
        by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in self.codes}
        tensors: dict[str, Tensor] = {}
        for (name, path), start, unit, theta in zip(self._keys, self._start, self._unit, self.theta, strict=True):
            value = torch.addcmul(start, unit, theta)
            if name:
                by_layer[name][path] = value
            else:
                tensors[path] = value
        return by_layer, tensors

    def backward(self, objective: Objective, batch: int) -> float:
        """One batch's loss; gradients go to theta through leaves, so that the network's graph ends at the weights."""
        for theta in self.theta:
            theta.grad = None
        by_layer, tensors = self.values()
        weights = {name: code.decode(by_layer[name]) for name, code in self.codes.items()}
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        tensor_leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
        loss = objective.backward(leaves, tensor_leaves, batch)
        roots = [(weights[n], leaf.grad) for n, leaf in leaves.items()]
        roots += [(tensors[n], leaf.grad) for n, leaf in tensor_leaves.items()]
        used = [(root, gradient) for root, gradient in roots if gradient is not None and root.requires_grad]
        torch.autograd.backward([root for root, _ in used], [gradient for _, gradient in used])
        return loss

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Decoded weights and tensors as they would be stored now."""
        codes, tensors = self.result()
        return {name: code.decode() for name, code in codes.items()}, tensors

    def result(self) -> tuple[dict[str, Code], dict[str, Tensor]]:
        with torch.no_grad():
            by_layer, tensors = self.values()
            codes = {name: code.stored(by_layer[name]) for name, code in self.codes.items()}
            return codes, {name: value.to("cpu", self.tensors[name].dtype) for name, value in tensors.items()}


def _unit(value: Tensor) -> Tensor:
    """The scale of a change of each value."""
    rows = value.reshape(value.shape[0], -1) if value.dim() > 1 else value.reshape(1, -1)
    typical = rows.square().mean(1).sqrt()
    shaped = typical.view(-1, *([1] * (value.dim() - 1))) if value.dim() > 1 else typical
    return torch.maximum(value.abs(), 0.1 * shaped)
