"""One block of a calibrated run: transforms that see all of it, its layers set after set, corrections, its guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.quantize.base import Choice, Correction, HeldWeight, LayerTransform
from featherweight.methods.quantize.treatment import scope_of
from featherweight.storage.codes import Code
from featherweight.tasks.compress.finished import FinishedLayers
from featherweight.tasks.compress.guard import BlockGuard, compared
from featherweight.tasks.compress.layer_statistics import LayerStatistics
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.compress.solve import (
    HELD_OUT,
    InputStatistics,
    Solved,
    code_without_data,
    output_error,
    solve_layer,
)

Known = Mapping[str, dict[str, Any] | None]
"""Records of layers that need not be solved again, None for the others."""


@dataclass
class BlockSteps:
    """What is done to one block; made anew for each.

    blocks : how many blocks the network has; the head is a session of its own behind them
    names : its layers that have a job, in order of execution
    """

    plan: Plan
    session: BlockSession
    blocks: int
    finished: FinishedLayers
    statistics: LayerStatistics
    seed: int
    _floats: dict[str, Tensor] = field(default_factory=dict)  # weights before they were solved

    def __post_init__(self) -> None:
        self.journal, self.notify = self.finished.journal, self.finished.journal.notify
        self.jobs = self.finished.jobs
        self.names = [name for name in self.session.names if name in self.jobs]
        self._fixed: dict[str, tuple[LayerTransform, ...]] = {}
        recipe = self.plan.recipe
        self.transforms = [(t, self._with(t)) for t in recipe.transforms if scope_of(t) == "block"]
        self.corrections = [(c, self._with(c)) for c in recipe.corrections if scope_of(c) == "block"]

    def _with(self, choice: Choice) -> list[str]:
        """The layers whose treatment has a choice."""
        return [name for name in self.names if choice in self.jobs[name].treatment.choices]

    def compared(self, name: str) -> set[str]:
        """At which scopes a layer is compared with its data-free form."""
        return compared(self.jobs[name].treatment, self.plan.recipe.calibration.held_out)

    def put_back(self, known: Known, changed: Mapping[str, Tensor]) -> None:
        """Finish a block that an earlier command has done. changed : its plain tensors that are not the source's."""
        self.session.skip({name: self.finished.code(name).decode() for name in self.names}, changed)
        for name in self.names:
            record = known[name]
            assert record is not None
            self.finished.report(name, record, resumed=True)

    def work(self, known: Known) -> None:
        """Everything but storing what changed beside the layers, and moving on."""
        as_a_whole = any("block" in self.compared(name) for name in self.names)
        if as_a_whole or any(names for _, names in self.corrections):
            # codes that are there may have been changed: the block is done from its start
            known = dict.fromkeys(self.names)
        self.notify({"event": "block", "number": self.session.index + 1, "layers": len(self.names)})
        guard = self._guard() if as_a_whole else None
        self._transform()
        self._solve_sets(known)
        self._solve_together(known)
        for correction, names in self.corrections:
            if type(correction).correct_block is Correction.correct_block:
                continue
            codes = {name: self.finished.code(name) for name in names}
            for name, code in correction.correct_block(self.session, codes, self.notify, self.seed).items():
                self._exchange(name, code)
        if guard is not None:
            self._judge(guard)

    # The block as a whole --------------------------------------------------------------------------------------------

    def _guard(self) -> BlockGuard | None:
        """What a block that is changed as a whole is compared with by the end; None where that cannot be."""
        if self.session.index >= self.blocks:
            text = "what was done to it with the output layer in view is not compared with its data-free form"
            self.journal.note(f"{self.names[0]}: {text}", layer=self.names[0])
            return None
        self.session.remembers = True
        return BlockGuard(self.session, {name: self._plain(name) for name in self.names})

    def _plain(self, name: str) -> Code:
        """The code that a layer's present weight gets without data."""
        return code_without_data(self.jobs[name], self.session.weight(name), self.plan.options, self.seed)

    def _judge(self, guard: BlockGuard) -> None:
        """Make the block what the recipe gives without data, if it came out worse."""
        verdict, block = guard.verdict(), self.session.index
        self.notify({"event": "block guard", "block": block, **verdict.facts()})
        if verdict.before is None:
            self.journal.note(verdict.sentence, block=block)
        if verdict.kept:
            return
        self.session.restore()
        self._floats = {name: self.session.weight(name) for name in guard.plain}
        for name, code in guard.plain.items():
            self._exchange(name, code, {"fallback": "data-free", "reason": verdict.sentence})
        self.journal.note(f"block {block} is compressed without data: {verdict.sentence}", block=block)

    def _transform(self) -> None:
        """Block-scope transforms, in the recipe's order; what each layer's input must go through on top is kept."""
        for transform, names in self.transforms:
            if not names:
                continue
            gathered = self.statistics.gather(self.session, names, transform.needs)
            statistics = {n: {**gathered.get(n, {}), **self.statistics.own(n, transform.needs)} for n in names}
            grids = {name: self.jobs[name].grid for name in names}
            made = transform.transform_block(self.session, names, grids, statistics, self.plan.options, self.notify)
            for name, one in made.items():
                self._fixed[name] = (*self._fixed.get(name, ()), one)
            self.session.rebase()

    # Its layers ------------------------------------------------------------------------------------------------------

    def _solve_together(self, known: Known) -> None:
        """Block-scope rounding: the codes of all layers that have it, at once."""
        names = [name for name in self.names if scope_of(self.jobs[name].treatment.rounding) == "block"]
        codes: dict[str, Code] = {}
        if any(known[name] is None for name in names):
            grids = {name: self.jobs[name].grid for name in names}
            statistics = self.statistics.gather_together(self.session, names)
            codes = self.plan.recipe.rounding.quantize_block(
                self.session, grids, statistics, self.plan.options, self.notify, self.seed
            )
        for name in names:
            self._settle(name, known[name], lambda name=name: Solved(codes[name]))  # type: ignore[misc]

    def _solve_sets(self, known: Known) -> None:
        """Layers that are rounded one by one: set after set, each with what reaches it by then."""
        for names in self._sets():
            gathered: dict[str, dict[str, Tensor]] = {}
            if any(known[name] is None for name in names):
                gathered = self.statistics.gather_together(self.session, names)
            for name, inputs in self.statistics.inputs_of(self.session, names, gathered).items():
                self._settle(name, known[name], lambda n=name, i=inputs: self._solve(n, i))  # type: ignore[misc]
            self._after(names)

    def _sets(self) -> Iterator[list[str]]:
        """Layers to solve on statistics gathered at once."""
        alone = [name for name in self.names if scope_of(self.jobs[name].treatment.rounding) == "layer"]
        stages = self.session.stages if self.plan.recipe.calibration.sequential else [alone]
        for stage in stages:
            chosen = [name for name in stage if name in alone]
            if chosen:
                yield chosen

    def _after(self, names: list[str]) -> None:
        """Corrections that act between sets (norm biases, absorbed scales)."""
        acting = [(c, set(having)) for c, having in self.corrections if having]
        if not acting:
            return
        done = {name: self.finished.code(name) for name in self.names if self.finished.is_done(name)}
        for group in self.session.groups:
            for correction, having in acting:
                members = [name for name in group if name in names and name in having]
                if members:
                    codes = {name: code for name, code in done.items() if name in having}
                    found = correction.after_group(self.session, members, codes, self.notify)
                    for name, code in found.items():
                        self._exchange(name, code)
                        done[name] = code

    def _solve(self, name: str, inputs: InputStatistics) -> Solved:
        job, options = self.jobs[name], self.plan.options
        source, fixed = HeldWeight(self._floats[name]), self._fixed.get(name, ())
        inputs = self.statistics.with_own(inputs, name)
        reason = self.statistics.unusable(self.session, name)
        if reason is None:
            solved = solve_layer(job, source, inputs, options, fixed)
        else:
            plain = solve_layer(job.without_data(), source, InputStatistics({}, inputs.seed), options, fixed)
            solved = replace(plain, notes={**plain.notes, "fallback": "data-free", "reason": reason})
        self.journal.note_fallback(name, solved.notes)
        if reason is None and "layer" in self.compared(name) and HELD_OUT not in inputs.statistics:
            unchecked = "no held-out token reached it"
            self.journal.note(f"{name} is not compared with its data-free form: {unchecked}", layer=name)
            solved = replace(solved, notes={**solved.notes, "unchecked": unchecked})
        effective = self.session.weighing.effective.get(name)
        if effective is not None and reason is None:
            solved = replace(solved, notes={**solved.notes, "effective_tokens": effective})
        gram = inputs.statistics.get("gram")
        if gram is None or reason is not None:
            return solved
        return replace(solved, notes={**solved.notes, "output_error": output_error(source.weight, solved.code, gram)})

    def _settle(self, name: str, known: dict[str, Any] | None, solve: Callable[[], Solved]) -> None:
        """Put a layer's code into the block, from its artifact or from work."""
        self._floats[name] = self.session.weight(name)
        if known is None:
            solved = solve()
            record = self.finished.keep(name, HeldWeight(self._floats[name]), solved)
            code = solved.code
        else:
            record, code = known, self.finished.code(name)
        self.session.set_weight(name, code.decode())
        self.finished.report(name, record, resumed=known is not None)

    def _exchange(self, name: str, code: Code, notes: Mapping[str, Any] | None = None) -> None:
        """Give a finished layer of the block another code."""
        self.finished.exchange(name, code, self._floats[name], notes)
        self.session.set_weight(name, code.decode())
