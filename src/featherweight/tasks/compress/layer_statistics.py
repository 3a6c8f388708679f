"""What calibration tells of single layers: statistics of their inputs, and their own, by what each treatment needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.statistics import gathered_names
from featherweight.methods.quantize.treatment import Treatment, scope_of
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.tasks.compress.guard import compared
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.compress.solve import HELD_OUT, OWN, InputStatistics, group_seed
from featherweight.tasks.compress.updates import model_update_range


@dataclass
class LayerStatistics:
    """Where the statistics of layers come from.

    base : the model that this one was fine-tuned from, for treatments that compare the two, else None
    """

    plan: Plan
    checkpoint: Checkpoint
    calibration: Calibration
    notify: Observer
    seed: int
    base: Checkpoint | None = None

    def __post_init__(self) -> None:
        self.jobs = {job.layer.name: job for job in self.plan.jobs}
        self._needs: dict[int, tuple[str, ...]] = {}  # by identity of the treatment

    def needs_of(self, name: str) -> tuple[str, ...]:
        """Statistics that passes over a layer's block must give for its treatment, and to judge it."""
        treatment = self.jobs[name].treatment
        if id(treatment) not in self._needs:
            self._needs[id(treatment)] = gathered_needs(treatment, self.plan.recipe.calibration.held_out)
        return self._needs[id(treatment)]

    def gather(self, session: BlockSession, names: Sequence[str], needs: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Statistics by layer from a pass over the block; empty where nothing is asked for that a pass gives."""
        known = gathered_names()
        wanted = tuple(name for name in needs if name in known)
        return session.gather(names, wanted) if wanted else {}

    def gather_together(self, session: BlockSession, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """What the treatments of the layers need, from one pass over the block; layers that need nothing are left out.

        A layer gets its treatment's statistics alone, whatever others were gathered for.
        """
        needing = [name for name in names if self.needs_of(name)]
        union = {need for name in needing for need in self.needs_of(name)}
        ordered = (*sorted(union - {HELD_OUT}), *(union & {HELD_OUT}))
        found = self.gather(session, needing, ordered)
        return {
            name: {k: v for k, v in statistics.items() if k not in union or k in self.needs_of(name)}
            for name, statistics in found.items()
        }

    def inputs_of(
        self, session: BlockSession, names: Sequence[str], gathered: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, InputStatistics]:
        """What is known of the input of each layer; layers with the same input and needs share it."""
        shared: dict[tuple[str, tuple[str, ...]], InputStatistics] = {}
        found = {}
        for name in names:
            place = session.layers[name].input_group
            guided = name if self.plan.recipe.calibration.guidance else place
            key = (guided, self.needs_of(name))
            if key not in shared:
                shared[key] = InputStatistics(gathered.get(name, {}), group_seed(self.seed, place))
            found[name] = shared[key]
        return found

    def with_own(self, inputs: InputStatistics, name: str) -> InputStatistics:
        """What is known of the input of a layer, with what the layer itself brings for its choices of layer scope."""
        own = self.own(name, tuple(need for choice in self.jobs[name].treatment.of_layer for need in choice.needs))
        return inputs.having(own) if own else inputs

    def own(self, name: str, needs: Sequence[str]) -> dict[str, Tensor]:
        """A layer's own statistics beside those of its input: its weight before fine-tuning, its Fisher information."""
        own: dict[str, Tensor] = {}
        if "base" in needs:
            own["base"] = self._base_weight(name)
        if "update_range" in needs:
            own["update_range"] = self._update_range
        if "fisher" in needs:
            own["fisher"] = self.calibration.fisher(name)
        if "output_gram" in needs:
            factors = self.calibration.fisher_factors(name)
            if factors is not None:
                own["gram"], own["output_gram"] = factors
        return own

    def unusable(self, session: BlockSession, name: str) -> str | None:
        """Why the statistics of a layer cannot be used; None where they can, or its treatment needs none."""
        treatment = self.jobs[name].treatment
        if not treatment.needs:
            return None
        if name in session.non_finite:
            place = ", ".join(f"{what} {number}" for what, number in session.non_finite[name].items())
            return f"its inputs are not finite from {place} on"
        if name in session.starved:
            return f"only {session.starved[name]} calibration tokens reached it"
        if "output_gram" in treatment.needs and self.calibration.fisher_factors(name) is None:
            return "no gradient of the loss reached it"
        if "fisher" in treatment.needs:
            fisher = self.calibration.fisher(name)
            if not bool(torch.isfinite(fisher).all()):
                return "its Fisher information is not finite"
            if not bool(fisher.any()):
                return "its Fisher information is zero, as if no calibration token reached it"
        return None

    @cached_property
    def _update_range(self) -> Tensor:
        """Of all compressed layers of the blocks; see `featherweight.tasks.compress.updates`."""
        assert self.base is not None
        layers = [job.layer for job in self.plan.jobs if job.layer.block is not None]
        return model_update_range(self.checkpoint, self.base, layers, self.plan.options, self.notify)

    def _base_weight(self, name: str) -> Tensor:
        if self.base is None:
            raise RecipeError(
                f"recipe {self.plan.recipe.name} compares with the model this one was fine-tuned from: "
                "name its folder with base_model= (on the command line --base-model)"
            )
        source = LayerWeight(self.base, self.jobs[name].layer)
        source.scan(self.plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
        weight = source.rows(0, source.shape[0]).float()
        source.release(0, source.shape[0])
        return weight


def gathered_needs(treatment: Treatment, held_out: float) -> tuple[str, ...]:
    """Statistics that a pass must give for a treatment, and to judge what comes out.

    held_out : share of the windows that only judge
    """
    needs = tuple(name for name in treatment.needs if name not in OWN)
    judged = held_out > 0 and "gram" in needs and scope_of(treatment.rounding) == "layer"
    return (*needs, HELD_OUT) if judged or "layer" in compared(treatment, held_out) else needs
