"""Compression with calibration: the network is run block by block, and each block's layers are solved in its course.

For every block: choices that see the whole block change it; then, set after set of layers that share an input, the
statistics of the stream as it is by then are gathered and the layers solved, each put back as what its code decodes to.
Finished layers are artifacts as in the data-free run; a run that was interrupted puts them back, moves the streams on,
and continues at the block and the set it was in, with the same statistics and so the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.statistics import gathered_names
from featherweight.methods.quantize.base import Correction, HeldWeight, LayerTransform
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.methods.recipe import Recipe
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.codes import Code
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.work import changed_key
from featherweight.tasks.compress.guard import BlockGuard, ModelGuard, Verdict, folded, likelihood_loss
from featherweight.tasks.compress.journal import Journal
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.compress.refusals import check_base
from featherweight.tasks.compress.solve import (
    HELD_OUT,
    InputGroup,
    Solved,
    group_seed,
    output_error,
    record_of,
    solve_layer,
)
from featherweight.tasks.compress.updates import model_update_range

TRANSFORMED, TUNED = 900_000, 900_001  # numbers, behind those of all blocks, of what whole models changed
# of a record whose code is exchanged
KEPT_NOTES = ("output_error", "held_out_error", "fallback", "reason", "unchecked", "damping")


@dataclass
class CalibratedRun:
    """The work of one command. `solve()` leaves an artifact for every job and the changed plain tensors of each block.

    base : for recipes that compare with the model a fine-tuned one came from, else None
    """

    plan: Plan
    checkpoint: Checkpoint
    run: RunFolder
    calibration: Calibration
    notify: Observer
    seed: int
    windows: Tensor
    base: Checkpoint | None = None
    config: dict[str, Any] = field(default_factory=dict)
    _floats: dict[str, Tensor] = field(default_factory=dict)  # the block's weights before they were solved

    def __post_init__(self) -> None:
        self.journal = Journal(self.plan, self.notify)
        self.jobs = {job.layer.name: (index, job) for index, job in enumerate(self.plan.jobs)}
        recipe = self.plan.recipe
        self.block_transforms = [t for t in recipe.transforms if t.scope == "block"]
        self.block_corrections = [c for c in recipe.corrections if c.scope == "block"]
        self.needs = tuple(name for name in recipe.needs if name not in ("base", "fisher"))
        self.compares = recipe.calibration.held_out > 0
        self.compared = compared(recipe)
        if "layer" in self.compared or (self.compares and "gram" in self.needs and recipe.rounding.scope == "layer"):
            self.needs = (*self.needs, HELD_OUT)

    def solve(self) -> list[dict[str, Any]]:
        """Records of all jobs in the plan's order."""
        if not self.compares:
            self.journal.note(
                "calibration.held_out is 0: nothing is compared with its data-free form, whatever comes out"
            )
        if self.base is not None:
            check_base([job.layer for job in self.plan.jobs], self.checkpoint, self.base)
        if not self._is_tuned():
            self.run.drop_tuned()  # some of them may be left, and must not be taken for layers as they were solved
        self._transform_model()
        if self.plan.recipe.rounding.scope == "model":
            self._solve_model()
        else:
            for session in self.calibration.blocks():
                self._block(session)
        self._outside_blocks()
        self._tune_model()
        return self.journal.in_order()

    # The whole model -------------------------------------------------------------------------------------------------

    def _transform_model(self) -> None:
        """Model-scope transforms. They are done again in every run: what they give does not depend on data."""
        chosen = [t for t in self.plan.recipe.transforms if t.scope == "model"]
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
            self._keep_changed(TRANSFORMED, whole.changed)
            self.config |= whole.config_changes

    def _state(self, step: str, verdict: Verdict) -> dict[str, Any]:
        """Store what came of a step that changed the whole model, and say it; its facts."""
        facts = verdict.facts()
        self.run.keep_verdict(step, facts)
        self.journal.note(verdict.sentence, whole_model=facts)
        return facts

    def _solve_model(self) -> None:
        """Model-scope rounding: all codes at once."""
        known = {name: self._known(name) for name in self.jobs}
        if not all(known.values()):
            rounding, grids = self.plan.recipe.rounding, {name: job.grid for name, (_, job) in self.jobs.items()}
            with self.calibration.whole_model() as whole:
                inside = {name: grid for name, grid in grids.items() if name in whole.layers}
                codes = rounding.quantize_model(
                    whole,
                    inside,
                    self.plan.options,
                    self.notify,
                    self.seed,
                    self.run.training_of("rounding", self.notify),
                )
                guard = ModelGuard(whole)
                plain = {name: self._plain(name, whole.weight(name)) for name in codes}
                verdict = guard.verdict(f"the rounding {rounding.kind}", guard.loss(plain), guard.loss(codes))
                notes = {} if verdict.kept else {"fallback": "data-free", "reason": verdict.sentence}
                for name, code in (codes if verdict.kept else plain).items():
                    index, job = self.jobs[name]
                    source = HeldWeight(whole.weight(name))
                    self.run.keep(index, code, record_of(job, source, Solved(code, notes), self.plan.options.threads))
                    known[name] = self._known(name)
                self._state("rounding", verdict)
            self.run.end_training()
        for name, record in known.items():
            if record is not None:
                self.journal.finish(self.jobs[name][0], record, resumed=False)

    def _tune_model(self) -> None:
        """Model-scope corrections: codes of all layers are changed together, once all blocks are done."""
        chosen = [c for c in self.plan.recipe.corrections if c.scope == "model"]
        if not chosen:
            return
        if self._is_tuned():
            return
        own = (changed_key(TRANSFORMED), changed_key(TUNED))  # the latter left by a run that stopped just after it
        altered = [name for name, key in self.run.changed_tensors().items() if key not in own]
        if altered:
            kinds = ", ".join(correction.kind for correction in chosen)
            raise RecipeError(
                f"recipe {self.plan.recipe.name}: {kinds} compares with the original model, which no longer has the "
                f"norms that earlier steps changed ({altered[0]}, ...); leave one of them out"
            )
        with self.calibration.whole_model() as whole:
            codes = {name: self._code(name) for name in self.jobs if name in whole.layers}
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
            self._keep_changed(TUNED, {n: t for n, t in whole.changed.items() if n not in self.calibration.host.layers})
            tuned = {}
            for name, code in codes.items():
                index, job = self.jobs[name]
                kept = {k: v for k, v in self.journal.records[index].items() if k in KEPT_NOTES}
                source = HeldWeight(whole.weight(name))
                record = record_of(job, source, Solved(code, kept), self.plan.options.threads)
                self.journal.records[index] = record
                tuned[index] = (code, record)
            self.run.keep_tuned(tuned)
        self.run.end_training()

    def _is_tuned(self) -> bool:
        return self.run.is_tuned([self.jobs[name][0] for name in self.jobs if name in self.calibration.host.layers])

    def _keep_changed(self, place: int, tensors: Mapping[str, Tensor]) -> None:
        """Store changed plain tensors in the dtype of the source."""
        layers = {job.layer.tensor for _, job in self.jobs.values()}
        as_stored = self.calibration.host.as_stored
        self.run.keep_changed(place, {n: as_stored(n, value) for n, value in tensors.items() if n not in layers})

    # One block -------------------------------------------------------------------------------------------------------

    def _block(self, session: BlockSession) -> None:
        names = [name for name in session.names if name in self.jobs]
        known = {name: self._known(name) for name in names}
        changed = self.run.changed(session.index)
        if names and changed is not None and all(known.values()):
            session.skip({name: self._code(name).decode() for name in names}, changed)
            for name, found in known.items():
                assert found is not None
                self.journal.finish(self.jobs[name][0], found, resumed=True)
            return
        if not names:
            session.skip({}, {})
            return
        if self.block_corrections or "block" in self.compared:
            known = dict.fromkeys(names)  # codes that are there may have been changed: the block is done from its start
        self.notify({"event": "block", "number": session.index + 1, "layers": len(names)})
        guard = self._guard(session, names)
        fixed = self._transform(session, names)
        self._solve_sets(session, names, known, fixed)
        for correction in self.block_corrections:
            if type(correction).correct_block is Correction.correct_block:
                continue
            codes = {name: self._code(name) for name in names}
            for name, code in correction.correct_block(session, codes, self.notify, self.seed).items():
                self._replace(session, name, code)
        if guard is not None:
            self._judge(session, guard)
        self._keep_changed(session.index, session.changed)
        self._floats.clear()
        session.advance()

    def _guard(self, session: BlockSession, names: list[str]) -> BlockGuard | None:
        """What a block that is changed as a whole is compared with by the end; None where nothing does that."""
        if "block" not in self.compared:
            return None
        if session.index >= len(self.calibration.host.blocks):
            text = "what was done to it with the output layer in view is not compared with its data-free form"
            self.journal.note(f"{names[0]}: {text}", layer=names[0])
            return None
        session.remembers = True
        return BlockGuard(session, {name: self._plain(name, session.weight(name)) for name in names})

    def _judge(self, session: BlockSession, guard: BlockGuard) -> None:
        """Make the block what the recipe gives without data, if it came out worse."""
        verdict = guard.verdict()
        self.notify({"event": "block guard", "block": session.index, **verdict.facts()})
        if verdict.before is None:
            self.journal.note(verdict.sentence, block=session.index)
        if verdict.kept:
            return
        session.restore()
        self._floats = {name: session.weight(name) for name in guard.plain}
        for name, code in guard.plain.items():
            self._replace(session, name, code, {"fallback": "data-free", "reason": verdict.sentence})
        self.journal.note(f"block {session.index} is compressed without data: {verdict.sentence}", block=session.index)

    def _plain(self, name: str, weight: Tensor) -> Code:
        """The code that the recipe gives a weight without data."""
        job = self.jobs[name][1]
        group = InputGroup({}, group_seed(self.seed, job.layer.input_group))
        return solve_layer(self.plan.recipe, job, HeldWeight(weight), group, self.plan.options, (), Nearest()).code

    def _transform(self, session: BlockSession, names: list[str]) -> dict[str, tuple[LayerTransform, ...]]:
        """Block-scope transforms, in the recipe's order; what each layer's input must go through on top."""
        fixed: dict[str, tuple[LayerTransform, ...]] = {}
        grids = {name: self.jobs[name][1].grid for name in names}
        for transform in self.block_transforms:
            gathered = self._gather(session, names, transform.needs)
            statistics = {name: {**gathered.get(name, {}), **self._own(name, transform.needs)} for name in names}
            options = self.plan.options
            for name, made in transform.transform_block(
                session, names, grids, statistics, options, self.notify
            ).items():
                fixed[name] = (*fixed.get(name, ()), made)
            session.rebase()
        return fixed

    def _solve_sets(
        self,
        session: BlockSession,
        names: list[str],
        known: dict[str, dict[str, Any] | None],
        fixed: dict[str, tuple[LayerTransform, ...]],
    ) -> None:
        rounding = self.plan.recipe.rounding
        if rounding.scope == "block":
            missing = [name for name in names if known[name] is None]
            codes: dict[str, Code] = {}
            if missing:
                grids = {name: self.jobs[name][1].grid for name in names}
                statistics = self._gather(session, names, self.needs)
                options = self.plan.options
                codes = rounding.quantize_block(session, names, grids, statistics, options, self.notify, self.seed)
            for name in names:
                self._settle(session, name, known[name], lambda name=name: Solved(codes[name]))  # type: ignore[misc]
            return
        for names_of_set in self._sets(session, names):
            statistics = {}
            if any(known[name] is None for name in names_of_set):
                statistics = self._gather(session, names_of_set, self.needs)
            groups: dict[str, InputGroup] = {}
            for name in names_of_set:
                layer = session.layers[name]
                place = layer.input_group
                if place not in groups:
                    groups[place] = InputGroup(statistics.get(name, {}), group_seed(self.seed, place))
                group = self._own_statistics(groups[place], name)
                self._settle(session, name, known[name], lambda n=name, g=group: self._solve(session, n, g, fixed))  # type: ignore[misc]
            self._after(session, names_of_set)

    def _after(self, session: BlockSession, names: list[str]) -> None:
        """Corrections that act between sets (norm biases, absorbed scales)."""
        if not self.block_corrections:
            return
        done = {n: self._code(n) for n in session.names if n in self.jobs and self.jobs[n][0] in self.journal.records}
        for group in session.groups:
            members = [name for name in group if name in names]
            for correction in self.block_corrections if members else ():
                for name, code in correction.after_group(session, members, done, self.notify).items():
                    self._replace(session, name, code)
                    done[name] = code

    def _sets(self, session: BlockSession, names: list[str]) -> Iterator[list[str]]:
        """Layers to solve on statistics gathered at once."""
        if not self.plan.recipe.calibration.sequential:
            yield names
            return
        for stage in session.stages:
            chosen = [name for name in stage if name in names]
            if chosen:
                yield chosen

    def _solve(
        self, session: BlockSession, name: str, group: InputGroup, fixed: dict[str, tuple[LayerTransform, ...]]
    ) -> Solved:
        job, recipe, options = self.jobs[name][1], self.plan.recipe, self.plan.options
        source, before = HeldWeight(self._floats[name]), fixed.get(name, ())
        reason = self._without_data(session, name)
        if reason is None:
            solved = solve_layer(recipe, job, source, group, options, before)
        else:
            plain = solve_layer(recipe, job, source, InputGroup({}, group.seed), options, before, Nearest())
            solved = Solved(plain.code, {**plain.notes, "fallback": "data-free", "reason": reason})
        self.journal.note_fallback(name, solved.notes)
        if reason is None and "layer" in self.compared and HELD_OUT not in group.statistics:
            unchecked = "no held-out token reached it"
            self.journal.note(f"{name} is not compared with its data-free form: {unchecked}", layer=name)
            solved = Solved(solved.code, {**solved.notes, "unchecked": unchecked})
        gram = group.statistics.get("gram")
        if gram is None or reason is not None:
            return solved
        return Solved(solved.code, {**solved.notes, "output_error": output_error(source.weight, solved.code, gram)})

    def _without_data(self, session: BlockSession, name: str) -> str | None:
        """Why the statistics of a layer cannot be used, or None."""
        if name in session.non_finite:
            place = ", ".join(f"{what} {number}" for what, number in session.non_finite[name].items())
            return f"its inputs are not finite from {place} on"
        if name in session.starved:
            return f"only {session.starved[name]} calibration tokens reached it"
        if "fisher" in self.plan.recipe.needs:
            fisher = self.calibration.fisher(name)
            if not bool(torch.isfinite(fisher).all()):
                return "its Fisher information is not finite"
            if not bool(fisher.any()):
                return "its Fisher information is zero, as if no calibration token reached it"
        return None

    def _gather(self, session: BlockSession, names: list[str], needs: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        known = gathered_names()
        wanted = tuple(name for name in needs if name in known)
        return session.gather(names, wanted) if wanted else {}

    def _own_statistics(self, group: InputGroup, name: str) -> InputGroup:
        layer_choices = [choice for choice in self.plan.recipe.choices if getattr(choice, "scope", "layer") == "layer"]
        own = self._own(name, tuple(need for choice in layer_choices for need in choice.needs))
        return group.having(own) if own else group

    def _own(self, name: str, needs: tuple[str, ...]) -> dict[str, Tensor]:
        """A layer's own statistics beside those of its input: its weight before fine-tuning, its Fisher information."""
        own: dict[str, Tensor] = {}
        if "base" in needs:
            own["base"] = self._base_weight(name)
        if "update_range" in needs:
            own["update_range"] = self._update_range
        if "fisher" in needs:
            own["fisher"] = self.calibration.fisher(name)
        return own

    @cached_property
    def _update_range(self) -> Tensor:
        """Of all compressed layers of the blocks; see `featherweight.tasks.compress.updates`."""
        assert self.base is not None
        layers = [job.layer for _, job in self.jobs.values() if job.layer.block is not None]
        return model_update_range(self.checkpoint, self.base, layers, self.plan.options, self.notify)

    def _base_weight(self, name: str) -> Tensor:
        if self.base is None:
            raise RecipeError(
                f"recipe {self.plan.recipe.name} compares with the model this one was fine-tuned from: "
                "name its folder with base_model= (on the command line --base-model)"
            )
        source = LayerWeight(self.base, self.jobs[name][1].layer)
        source.scan(self.plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
        weight = source.rows(0, source.shape[0]).float()
        source.release(0, source.shape[0])
        return weight

    # One layer -------------------------------------------------------------------------------------------------------

    def _settle(
        self, session: BlockSession, name: str, known: dict[str, Any] | None, solve: Callable[[], Solved]
    ) -> None:
        """Put a layer's code into the block, from its artifact or from work."""
        index, job = self.jobs[name]
        self._floats[name] = session.weight(name)
        record = known
        if record is None:
            solved = solve()
            record = record_of(job, HeldWeight(self._floats[name]), solved, self.plan.options.threads)
            self.run.keep(index, solved.code, record)
            code = solved.code
        else:
            code = self._code(name)
        session.set_weight(name, code.decode())
        self.journal.finish(index, record, resumed=known is not None)

    def _replace(self, session: BlockSession, name: str, code: Code, notes: Mapping[str, Any] | None = None) -> None:
        """Exchange the code of a finished layer; `notes` take the place of what its record said of the former one."""
        index, job = self.jobs[name]
        kept = (
            {k: v for k, v in self.journal.records[index].items() if k in KEPT_NOTES} if notes is None else dict(notes)
        )
        record = record_of(job, HeldWeight(self._floats[name]), Solved(code, kept), self.plan.options.threads)
        self.run.keep(index, code, record)
        self.journal.records[index] = record
        session.set_weight(name, code.decode())

    def _known(self, name: str) -> dict[str, Any] | None:
        return self.run.record(self.jobs[name][0], name)

    def _code(self, name: str) -> Code:
        return self.run.code(self.jobs[name][0])

    def _outside_blocks(self) -> None:
        """Layers that no block holds are compressed without data."""
        for name, (index, job) in self.jobs.items():
            if index in self.journal.records:
                continue
            record = self._known(name)
            resumed = record is not None
            if record is None:
                source = LayerWeight(self.checkpoint, job.layer)
                source.scan(self.plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
                group = InputGroup({}, group_seed(self.seed, job.layer.input_group))
                solved = solve_layer(self.plan.recipe, job, source, group, self.plan.options, (), Nearest())
                reason = "calibration does not run through it"
                solved = Solved(solved.code, {**solved.notes, "fallback": "data-free", "reason": reason})
                self.journal.note_fallback(name, solved.notes)
                record = record_of(job, source, solved, self.plan.options.threads)
                self.run.keep(index, solved.code, record)
            self.journal.finish(index, record, resumed)


def compared(recipe: Recipe) -> set[str]:
    """At which scopes a run compares what it makes with its data-free form on held-out windows: layer, block, model."""
    if recipe.calibration.held_out == 0:
        return set()
    own = (*recipe.transforms, recipe.grid, recipe.rounding, *recipe.corrections)
    scopes = {_scope(choice) for choice in own} & {"block", "model"}
    if recipe.rounding.scope == "layer" and any(choice.needs for choice in own if _scope(choice) == "layer"):
        scopes.add("layer")
    return scopes


def _scope(choice: Any) -> str:
    """How much of the network a choice sees at once."""
    return str(getattr(choice, "scope", "layer"))
