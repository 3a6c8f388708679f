"""The safeguard of choices that see more than a layer: judged on held-out windows, against what there was before.

A layer's own code is judged in `solve.py`. Here a block as a whole is compared with the block in
its data-free form, by its output; and the whole model with what it was before a step that changed all of it, by its
predictions. What turns out worse is taken back by `block_steps.py` and `model_steps.py`, which also say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.methods.calibrate.fitting import fitting
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.methods.learn.objectives import ModelObjective
from featherweight.methods.quantize.treatment import Treatment, scope_of
from featherweight.storage.codes import Code
from featherweight.tasks.compress.solve import MARGIN

BATCH = 4  # windows a pass through the whole model
SAME_FUNCTION = 1e-2  # nats a token that are put down to storing rotated tensors in the model's dtype


def compared(treatment: Treatment, held_out: float) -> set[str]:
    """At which scopes a layer is compared with its data-free form on held-out windows: "layer", "block", "model".

    held_out : the share of windows that is kept apart; with none, nothing is compared
    """
    if held_out == 0:
        return set()
    scopes = {scope_of(choice) for choice in treatment.choices} & {"block", "model"}
    if scope_of(treatment.rounding) == "layer" and any(choice.needs for choice in treatment.of_layer):
        scopes.add("layer")
    return scopes


@dataclass(frozen=True)
class Verdict:
    """A step and its effect on held-out windows, JSON-able by `facts`.

    step : what was done: "block 3", "scale-tuning"
    measure : what is compared, with its unit
    before, after : without and with the step; None where nothing could be measured
    windows : how many held-out windows there were
    kept : whether the step stays
    """

    step: str
    measure: str
    before: float | None
    after: float | None
    windows: int
    kept: bool

    @property
    def sentence(self) -> str:
        """The verdict for people."""
        if self.before is None or not math.isfinite(self.before):
            reason = (
                "the values computed for the held-out windows are not finite"
                if self.windows
                else "no windows are held out"
            )
            return f"{self.step} was not compared with what there was before: {reason}"
        change = f"{self.before:.4g} before and {self.after:.4g} after it on {self.windows} held-out windows"
        end = "it is kept" if self.kept else "that is worse, so the former state is kept"
        return f"{self.step}: {self.measure} {change}; {end}"

    def facts(self) -> dict[str, Any]:
        """All fields; None for what is not finite, which JSON cannot hold."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


class BlockGuard:
    """A block's output with its weights as they are by the end, against that of its data-free codes.

    Made before anything in the block changes. Errors are ||output - target||^2 / ||target||^2 over the held-out tokens
    with finite targets; the target is the original block's output, on the original stream where there are two.

    plain : the codes that the recipe makes without data, by layer
    """

    def __init__(self, session: BlockSession, plain: Mapping[str, Code]) -> None:
        self.session, self.plain = session, dict(plain)
        if session.calibration.two_streams:
            self._targets = list(session.held_out_targets)
        else:
            self._targets = fitting(session.calibration, self._outputs, session.halved)
        with session.overridden({name: code.decode() for name, code in plain.items()}):
            self.without = fitting(session.calibration, self._error, session.halved)

    def verdict(self) -> Verdict:
        """On the block as it is now."""
        found = fitting(self.session.calibration, self._error, self.session.halved)
        kept = self.without is None or found is None or found <= MARGIN * self.without
        windows = sum(len(batch) for batch in self.session.held_out_inputs)
        step = f"what was done to block {self.session.index}"
        return Verdict(step, "its relative output error is", self.without, found, windows, kept)

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.session.run(x, i).detach().to("cpu") for i, x in self._held_out()]

    def _held_out(self) -> list[tuple[int, Any]]:
        """Held-out batches as they are now, with their numbers."""
        return list(enumerate(self.session.held_out_inputs, self.session.calibration.batches_seen))

    def _aligned(self) -> list[Tensor]:
        """The targets of the batches as they are now: these may have been halved since."""
        sizes = [len(batch) for _, batch in self._held_out()]
        if len(sizes) != len(self._targets):
            self._targets = list(torch.split(torch.cat(self._targets), sizes))
        return self._targets

    def _error(self) -> float | None:
        """inf where the output is not finite and the target is; None if no target is finite."""
        tokens = 0
        missed = total = 0.0
        with torch.no_grad():
            for (i, inputs), target in zip(self._held_out(), self._aligned(), strict=True):
                output = self.session.run(inputs, i).to("cpu")
                sound = torch.isfinite(target).all(-1)
                wanted = target[sound].double()
                tokens += len(wanted)
                missed += float((output[sound].double() - wanted).square().sum())
                total += float(wanted.square().sum())
        if tokens == 0:
            return None
        if not math.isfinite(missed):
            return math.inf
        return missed / total if total > 0 else 0.0


class ModelGuard:
    """The divergence of a whole model's predictions from the original's, on held-out windows, for several states."""

    def __init__(self, whole: WholeModel) -> None:
        self.windows = len(whole.held_out)
        self._objective = ModelObjective(whole, BATCH) if self.windows else None
        self.measure = "the divergence from the original's predictions, in nats a token, is"
        if not whole.predicts:
            self.measure = "the relative squared error of its last hidden states is"

    def loss(self, codes: Mapping[str, Code], tensors: Mapping[str, Tensor] | None = None) -> float | None:
        """With the weights of these codes and these plain tensors; None without held-out windows."""
        if self._objective is None:
            return None
        return self._objective.held_out_loss({name: code.decode() for name, code in codes.items()}, tensors or {})

    def verdict(self, step: str, before: float | None, after: float | None) -> Verdict:
        """`after` must not be more than `before`; what cannot be measured is kept, and that is said."""
        kept = before is None or after is None or after <= before or not math.isfinite(before)
        return Verdict(step, self.measure, before, after, self.windows, kept)


def likelihood_loss(whole: WholeModel) -> float | None:
    """Mean negative log-likelihood of the held-out tokens, in nats, with the model as it is; None if it has none."""
    if not whole.held_out or not whole.predicts:
        return None
    total, count = 0.0, 0
    with torch.no_grad():
        for window in whole.held_out:
            logits = whole.head(whole.hidden(window.unsqueeze(0)))[0]
            total += float(
                torch.nn.functional.cross_entropy(logits[:-1], window[1:].to(logits.device), reduction="sum")
            )
            count += len(window) - 1
    return total / max(1, count)


def folded(step: str, before: float | None, after: float | None, windows: int) -> Verdict:
    """The verdict on a change that should not touch the function: `SAME_FUNCTION` nats are allowed for."""
    kept = before is None or after is None or after <= before + SAME_FUNCTION or not math.isfinite(before)
    return Verdict(step, "the negative log-likelihood, in nats a token, is", before, after, windows, kept)
