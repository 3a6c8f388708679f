"""The trainings of a healing: the whole model at once, or window after window of blocks; and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from featherweight.events import Observer
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.methods.learn.objectives import ModelObjective, Objective
from featherweight.methods.quantize.corrections.cat_q import CatQ
from featherweight.methods.quantize.corrections.healing import Healing
from featherweight.methods.quantize.corrections.scale_tuning import ScaleTuning
from featherweight.methods.quantize.tuned import TunedState
from featherweight.model.network.skeleton import Skeleton
from featherweight.storage.codes import Code, code_from
from featherweight.storage.run.folder import RunFolder
from featherweight.system.precision import Chosen
from featherweight.tasks.heal.settings import HealSettings
from featherweight.tasks.heal.student import Student
from featherweight.tasks.heal.window import BlockWindow, starts

LEAST_STEPS = 8
CHECKS = 10
TRIED = 5
"""Steps whose time is taken, without their effect; the first ones of a process are slower than all that follow."""
WHOLE = "healed"


@dataclass(frozen=True)
class _Task:
    """One training.

    key : of its state and of what comes of it
    network : gives the originals of the layers
    codes, norms : what is trained; fixed : what else takes the place of the original's
    parts : so many trainings, this one among them, share the time that is left
    """

    key: str
    objective: Objective
    network: WholeModel | BlockWindow
    codes: Mapping[str, Code]
    norms: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    parts: int = 1


@dataclass
class Healer:
    """Trains a student within the original.

    seconds_left : what the training may take, as a function of time; None where steps are given
    before, after : loss on held-out windows, of each training in turn; steps : how many each took
    curve : of all of them, a point for each word: step, loss, held_out
    """

    student: Student
    settings: HealSettings
    run: RunFolder
    notify: Observer
    precision: Chosen
    seconds_left: Callable[[], float] | None
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def whole(self, calibration: Calibration) -> tuple[dict[str, Code], dict[str, Tensor]]:
        """Codes and norms, trained together against the original's predictions."""
        known = self._known(WHOLE)
        if known is not None:
            return known
        student, settings = self.student, self.settings
        with calibration.whole_model() as model:
            objective = ModelObjective(
                model, settings.batch, self.precision, loss=settings.loss, original=self.precision
            )
            codes = {name: code for name, code in student.codes.items() if name in model.layers}
            made = self._train(_Task(WHOLE, objective, model, codes, student.norms, student.fixed))
        self._keep(WHOLE, *made)
        return made

    def blocks(self, calibration: Calibration) -> tuple[dict[str, Code], dict[str, Tensor]]:
        """The same, window after window of blocks; what precedes a window is as it was healed."""
        student, host = self.student, calibration.host
        codes, norms = dict(student.codes), dict(student.norms)
        calibration.embeddings.update(student.fixed)
        windows = dict(starts(len(host.blocks), self.settings.window))
        block_of = {name: layer.block for name, layer in host.layers.items()}
        for session in calibration.blocks():
            here = session.index
            if here in windows:
                self._window(calibration, session, windows, (codes, norms))
            for name, block in block_of.items():
                if block == here and name in codes:
                    session.set_weight(name, codes[name].decode())
            for name, value in norms.items():
                if _belongs(calibration, name, here):
                    session.set_tensor(name, value)
            session.advance()
        return codes, norms

    def _window(
        self,
        calibration: Calibration,
        session: Any,
        windows: Mapping[int, int],
        now: tuple[dict[str, Code], dict[str, Tensor]],
    ) -> None:
        """Train one window; `now` gets what came of it."""
        first, last = session.index, windows[session.index]
        key = f"healed-blocks-{first:06d}"
        made = self._known(key)
        if made is None:
            window = BlockWindow(calibration, session, last)
            codes = {name: now[0][name] for name in window.names if name in now[0]}
            norms = {
                name: value
                for name, value in now[1].items()
                if any(_belongs(calibration, name, block) for block in window.blocks)
            }
            objective = self._trainer().of_block(window, self.precision)  # type: ignore[arg-type]
            left = sum(begin >= first for begin in windows)
            stage = f"healing blocks {first + 1} to {last + 1}"
            self.notify({"event": "step", "stage": stage, "number": len(windows) - left + 1, "of": len(windows)})
            made = self._train(_Task(key, objective, window, codes, norms, parts=left))
            window.close()
            self._keep(key, *made)
        now[0].update(made[0])
        now[1].update(made[1])

    # One training -----------------------------------------------------------------------------------------------------

    def _trainer(self) -> ScaleTuning:
        kind = ScaleTuning if self.settings.level == "scales" else Healing
        kind = CatQ if self.settings.training == "cat-q" else kind
        return kind(learning_rate=self.settings.rate, steps=self.settings.steps or 1, checks=CHECKS)

    def _train(self, task: _Task) -> tuple[dict[str, Code], dict[str, Tensor]]:
        trainer, device = self._trainer(), task.objective.device
        weight = task.network.weight
        trained = {name: trainer.trainable(code, weight, name, device) for name, code in task.codes.items()}
        stays = isinstance(trainer, CatQ)  # as published, norms do
        norms, fixed = ({}, {**task.fixed, **task.norms}) if stays else (task.norms, task.fixed)
        state = TunedState(trained, norms, device, fixed)
        steps = self.settings.steps or self._steps(task, state)
        trainer = trainer.model_copy(update={"steps": steps})
        self.steps.append(steps)
        store = self.run.training_of(task.key, self.notify)
        return trainer.tune(task.objective, state, self._heard, self.settings.seed, store)

    def _steps(self, task: _Task, state: TunedState) -> int:
        """As many as fit into what is left of the time, measured once; a run that goes on takes the same."""
        assert self.seconds_left is not None
        objective = task.objective
        begun = time.monotonic()
        objective.held_out_loss(*state.stored())
        check = time.monotonic() - begun
        took = []
        for batch in range(min(TRIED + 1, objective.batches)):
            begun = time.monotonic()
            state.backward(objective, batch)
            took.append(time.monotonic() - begun)
        step = min(took[1:] or took)
        room = self.seconds_left() / task.parts - (CHECKS + 1) * check
        steps = max(LEAST_STEPS, int(room / (1.05 * step)))
        return int(self.run.remembered(f"steps of {task.key}", str(steps)))

    def _heard(self, event: dict[str, Any]) -> None:
        if "held_out_before" in event:
            self.before.append(event["held_out_before"])
            self.after.append(event["held_out_after"])
        if "step" in event and "loss" in event:
            point = {name: event.get(name) for name in ("step", "loss", "held_out")}
            self.curve.append({name: value for name, value in point.items() if value is not None})
        self.notify(event)

    # Keeping ----------------------------------------------------------------------------------------------------------

    def _keep(self, key: str, codes: Mapping[str, Code], norms: Mapping[str, Tensor]) -> None:
        names = list(codes)
        tensors = {f"{i}.{name}": t for i, module in enumerate(names) for name, t in codes[module].tensors().items()}
        tensors |= {f"norm.{name}": value for name, value in norms.items()}
        record = {
            "layers": names,
            "specs": [codes[name].spec for name in names],
            "before": self.before[-1:],
            "after": self.after[-1:],
            "steps": self.steps[-1:],
            "curve": self.curve,
        }
        self.run.store.keep(key, tensors, record)
        self.run.end_training()

    def _known(self, key: str) -> tuple[dict[str, Code], dict[str, Tensor]] | None:
        """What an earlier command has left of a training."""
        record = self.run.store.record(key) if self.run.store.has(key) else None
        if record is None:
            return None
        tensors = self.run.store.tensors(key)
        codes = {}
        for i, (name, spec) in enumerate(zip(record["layers"], record["specs"], strict=True)):
            prefix = f"{i}."
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            codes[name] = code_from(spec, own)
        norms = {name.removeprefix("norm."): t for name, t in tensors.items() if name.startswith("norm.")}
        self.before += record["before"]
        self.after += record["after"]
        self.steps += record["steps"]
        self.curve = list(record["curve"])
        return codes, norms


def _belongs(calibration: Calibration, tensor: str, block: int) -> bool:
    """Whether a tensor of the checkpoint is one of a block's."""
    host = calibration.host
    assert isinstance(host, Skeleton)
    return host.tensor_slot(tensor).parameter.startswith(f"{host.block_paths[block]}.")
