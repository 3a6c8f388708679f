"""Steps of a calibrated run that see the whole model: its transforms, a rounding of all layers, and late corrections.

Each is judged on held-out windows against what there was before it, and taken back where that was better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.methods.quantize.base import Correction, HeldWeight
from featherweight.methods.quantize.treatment import scope_of
from featherweight.storage.codes import Code
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.work import changed_key
from featherweight.tasks.compress.finished import FinishedLayers
from featherweight.tasks.compress.guard import ModelGuard, Verdict, folded, likelihood_loss
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.compress.solve import Solved, code_without_data

TRANSFORMED, TUNED = 900_000, 900_001  # numbers, behind those of all blocks, of what whole models changed


@dataclass
class ModelSteps:
    """`transform`, `round` and `correct` in the course of a run.

    config : entries of config.json that must change with what transforms did
    """

    plan: Plan
    run: RunFolder
    calibration: Calibration
    finished: FinishedLayers
    seed: int
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.journal, self.notify = self.finished.journal, self.finished.journal.notify
        self.rounds = scope_of(self.plan.recipe.rounding) == "model"

    # Transforms ------------------------------------------------------------------------------------------------------

    def transform(self) -> None:
        """Model-scope transforms. They are done again in every run: what they give does not depend on data."""
        chosen = [t for t in self.plan.recipe.transforms if scope_of(t) == "model"]
        if not chosen:
            return
        with self.calibration.whole_model() as whole:
            for place, transform in enumerate(chosen):
                former, step = whole.state(), f"transform-{place}"
                known = self.run.verdict(step)
                before = None if known else likelihood_loss(whole)
                transform.transform_model(whole, self.notify, self.seed)
                if known is None:
                    after = likelihood_loss(whole)
                    verdict = folded(f"the transform {transform.kind}", before, after, len(whole.held_out))
                    known = self._state(step, verdict)
                if not known["kept"]:
                    whole.back_to(former)
            self.keep_changed(TRANSFORMED, whole.changed)
            self.config |= whole.config_changes

    # Rounding --------------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Model-scope rounding: the codes of all layers that have it, at once."""
        jobs = self.finished.jobs
        known = {n: self.finished.found(n) for n, job in jobs.items() if scope_of(job.treatment.rounding) == "model"}
        if not all(known.values()):
            with self.calibration.whole_model() as whole:
                codes, verdict = self._rounded(whole, [name for name in known if name in whole.layers])
                notes = {} if verdict.kept else {"fallback": "data-free", "reason": verdict.sentence}
                for name, code in codes.items():
                    self.finished.keep(name, HeldWeight(whole.weight(name)), Solved(code, notes))
                    known[name] = self.finished.found(name)
                self._state("rounding", verdict)
            self.run.end_training()
        for name, record in known.items():
            if record is not None:
                self.finished.report(name, record, resumed=False)

    def _rounded(self, whole: WholeModel, names: list[str]) -> tuple[dict[str, Code], Verdict]:
        """The codes that stay, those without data where these are better, and what says so."""
        rounding, jobs = self.plan.recipe.rounding, self.finished.jobs
        grids = {name: jobs[name].grid for name in names}
        store = self.run.training_of("rounding", self.notify)
        codes = rounding.quantize_model(whole, grids, self.plan.options, self.notify, self.seed, store)
        guard = ModelGuard(whole)
        plain = {
            name: code_without_data(jobs[name], whole.weight(name), self.plan.options, self.seed) for name in codes
        }
        verdict = guard.verdict(f"the rounding {rounding.kind}", guard.loss(plain), guard.loss(codes))
        return (codes if verdict.kept else plain), verdict

    # Corrections -----------------------------------------------------------------------------------------------------

    def correct(self) -> None:
        """Model-scope corrections: codes of all layers are changed together, once all blocks are done."""
        chosen = [c for c in self.plan.recipe.corrections if scope_of(c) == "model"]
        if not chosen or self.is_corrected():
            return
        self._check_original(chosen)
        with self.calibration.whole_model() as whole:
            codes = {name: self.finished.code(name) for name in self.finished.jobs if name in whole.layers}
            guard = ModelGuard(whole)
            found = guard.loss(codes)
            for place, correction in enumerate(chosen):
                former, before = whole.state(), found
                store = self.run.training_of(f"correction-{place}", self.notify)
                changed = {**codes, **correction.tune_model(whole, codes, self.notify, self.seed, store)}
                tensors = {n: t for n, t in whole.changed.items() if t is not former.changed.get(n)}
                later = whole.state()
                if tensors:
                    whole.back_to(former)  # the original's predictions are those without what was set
                after = guard.loss(changed, tensors)
                verdict = guard.verdict(f"the correction {correction.kind}", before, after)
                self._state(f"correction-{place}", verdict)
                if verdict.kept:
                    codes, found = changed, after
                    for name in tensors:
                        whole.set_tensor(name, later.changed[name])
            self.keep_changed(TUNED, {n: t for n, t in whole.changed.items() if n not in self.calibration.host.layers})
            self.finished.keep_tuned(codes, whole.weight)
        self.run.end_training()

    def is_corrected(self) -> bool:
        """Whether an earlier command has come to the end of `correct`."""
        return self.finished.is_tuned(self.calibration.host.layers)

    def _check_original(self, chosen: list[Correction]) -> None:
        """RecipeError where tensors have changed that corrections compare with."""
        own = (changed_key(TRANSFORMED), changed_key(TUNED))  # the latter left by a run that stopped just after it
        altered = [name for name, key in self.run.changed_tensors().items() if key not in own]
        if altered:
            kinds = ", ".join(correction.kind for correction in chosen)
            raise RecipeError(
                f"recipe {self.plan.recipe.name}: {kinds} compares with the original model, which no longer has the "
                f"norms that earlier steps changed ({altered[0]}, ...); leave one of them out"
            )

    # Keeping ---------------------------------------------------------------------------------------------------------

    def _state(self, step: str, verdict: Verdict) -> dict[str, Any]:
        """Store what came of a step that changed the whole model, and say it; its facts."""
        facts = verdict.facts()
        self.run.keep_verdict(step, facts)
        self.journal.note(verdict.sentence, whole_model=facts)
        return facts

    def keep_changed(self, place: int, tensors: Mapping[str, Tensor]) -> None:
        """Store changed plain tensors in the dtype of the source. place : number of a block, or one behind them."""
        layers = {job.layer.tensor for job in self.plan.jobs}
        as_stored = self.calibration.host.as_stored
        self.run.keep_changed(place, {n: as_stored(n, value) for n, value in tensors.items() if n not in layers})
