"""What a run needs of a device's memory at its fullest, and how many windows of text go together so that it fits.

A run has phases, of which one is on the device at a time: running a block and gathering its statistics, solving a
layer, training. Each has what it needs in any case and what every window of text adds. docs/architecture.md has how far
the sums are from what was measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from featherweight.methods.calibrate.groups import groups_of, stages_of
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.learn.objectives import CACHE_BYTES, CHUNK_ELEMENTS
from featherweight.methods.quantize.base import Choice, SolveOptions
from featherweight.methods.quantize.treatment import scope_of
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.devices import free_bytes, solving_device
from featherweight.tasks.compress.data import CalibrationData, calibration_needs, pass_precision
from featherweight.tasks.compress.device_share import NOWHERE, DeviceShare, Phase
from featherweight.tasks.compress.plan import WINDOWS, Job, Plan, tokens_a_step

LIBRARIES = 96 << 20  # what CUDA's libraries take for themselves once they are used
MOMENTS = ("gram", "cross", "held_out_gram")
EXPERTS_A_TOKEN = 8  # at most so many experts see a token; what they make of it is counted
SCORES = 3  # matrices of attention that are alive at once where no fused kernel takes them apart


def placed(
    plan: Plan, checkpoint: Checkpoint, device: torch.device, limit: int | None, data: CalibrationData | None = None
) -> tuple[Plan, DeviceShare]:
    """The plan with its layers solved on a device where they can be, and what that takes there.

    data : what it is calibrated with; a file of statistics spares running the network
    """
    plan = replace(plan, options=plan.options.on(solving_device(device)))
    if device.type == "cpu":
        return plan, NOWHERE
    recipe, settings = plan.recipe, plan.recipe.calibration
    runs = recipe.calibrated and (data is None or data.stored is None)
    load = Load.of(plan.anatomy, checkpoint, settings, calibration_needs(recipe), device)
    load = replace(load, itemsize=4 if pass_precision(recipe, None, device) == "float32" else 2)
    phases = list(_network_phases(plan, load)) if runs else []
    solved = [job for job in plan.jobs if _solved_there(job)] if plan.options.device != "cpu" else []
    if solved:
        phases.append(_solving(solved, load if runs else None, plan.options, recipe.needs))
    share = _shared(device, phases, load.length, limit)
    if runs or not solved:
        return plan, share
    options = plan.options
    for window in WINDOWS:  # rows of weights that are solved without data: fewer where these do not fit
        if share.limit is None or share.nbytes <= share.limit:
            break
        options = plan.options.model_copy(update={"window_bytes": window})
        share = _shared(device, [_solving(solved, None, options, recipe.needs)], load.length, limit)
    return replace(plan, options=options), share


def gathering_share(
    anatomy: Anatomy, checkpoint: Checkpoint, settings: CalibrationSettings, needs: Collection[str],
    device: torch.device, limit: int | None,
) -> DeviceShare:  # fmt: skip
    """What gathering the statistics of a whole network takes of a device."""
    if device.type == "cpu":
        return NOWHERE
    load = Load.of(anatomy, checkpoint, settings, needs, device)
    load = replace(load, itemsize=settings.torch_dtype(None, device).itemsize)
    phases = [load.gathering(1), *([load.gradients()] if settings.guidance else [])]
    return _shared(device, phases, load.length, limit)


def _shared(device: torch.device, phases: Sequence[Phase], length: int, limit: int | None) -> DeviceShare:
    known = free_bytes(device) if limit is None else limit
    taken = LIBRARIES if device.type == "cuda" else 0
    phases = tuple(replace(phase, fixed={**phase.fixed, "CUDA's libraries": taken}) for phase in phases)
    share = DeviceShare(str(device), phases, length, known or None, limit is not None)
    if not known or share.nbytes <= known:
        return share
    most = max((phase.wanted for phase in phases), default=0)
    fitting = (n for n in range(most, 0, -1) if all(phase.nbytes(n) <= known for phase in phases))
    return replace(share, windows=next(fitting, 0))


@dataclass(frozen=True)
class Load:
    """A network as it lies on a device, and text that runs through it.

    layers : of the block with the most weights
    block, outside : bytes of its weights, and of what stands outside of blocks
    itemsize : bytes of a number in forward passes
    length : tokens a window
    heads : of attention, where its matrices are made whole; else 0
    """

    anatomy: Anatomy
    settings: CalibrationSettings
    needs: frozenset[str]
    layers: tuple[LinearLayer, ...]
    parameters: int
    length: int
    heads: int
    itemsize: int = field(default=4)

    @classmethod
    def of(
        cls,
        anatomy: Anatomy,
        checkpoint: Checkpoint,
        settings: CalibrationSettings,
        needs: Collection[str],
        device: torch.device,
    ) -> Load:
        from featherweight.model.text.windows import context_of
        from featherweight.storage.checkpoint.anatomy.geometry import HEADS

        blocks: dict[int | None, list[LinearLayer]] = {}
        for layer in anatomy.layers:
            blocks.setdefault(layer.block, []).append(layer)
        heaviest = max(blocks.values(), key=lambda layers: sum(x.parameters for x in layers), default=[])
        context = context_of(checkpoint.config)
        config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
        heads = next((config[name] for name in HEADS if isinstance(config.get(name), int)), 1)
        return cls(
            anatomy, settings, frozenset(needs), tuple(heaviest), checkpoint.parameters,
            min(settings.length, context or settings.length), 0 if device.type == "cuda" else heads,
        )  # fmt: skip

    @property
    def block(self) -> int:
        return self.itemsize * sum(layer.parameters for layer in self.layers)

    @property
    def outside(self) -> int:
        inside = sum(layer.parameters for layer in self.anatomy.layers)
        return self.itemsize * max(0, self.parameters - inside)

    @property
    def batch(self) -> int:
        """Windows a batch."""
        return max(1, self.settings.batch_tokens // self.length)

    @property
    def streams(self) -> int:
        """Whether a second stream of hidden states goes through the original weights, and these are kept: 1 or 2."""
        return 2 if {"cross", "targets"} & self.needs or self.settings.stream == "original" else 1

    def fixed(self, copies: int) -> dict[str, int]:
        """What lies there in every phase of a walk over blocks. copies : of the block's weights beside their own"""
        held = {"the weights of a block": self.block, "embedding, output layer and norms": self.outside}
        return held | {"copies of the block's weights": copies * self.block}

    def gathering(self, copies: int) -> Phase:
        """A pass over a block with the statistics of one stage."""
        inputs = self._stages()
        count = sum(name in self.needs for name in MOMENTS)
        moments = max((sum(4 * width * width for width in stage) for stage in inputs), default=0) * max(1, count)
        seen = max((sum(stage) for stage in inputs), default=0) * self.itemsize * self.streams
        widest = max((layer.shape[1] for layer in self.layers), default=0)
        a_token = self._passing() + seen + 4 * widest * (2 + self.streams)
        fixed = {**self.fixed(copies), "statistics": moments}
        return Phase("gathering statistics", fixed, self.length * a_token, self.batch)

    def gradients(self) -> Phase:
        """A block's pass with its way back, for guided statistics, after the logits of one window."""
        hidden = max(1, min((layer.shape[1] for layer in self.layers), default=1))
        logits = 16 * self.length * (self.outside // self.itemsize // hidden)
        factors = max((4 * (sum(layer.shape) ** 2) for layer in self.layers), default=0) * ("output_gram" in self.needs)
        fixed = {**self.fixed(0), "logits": logits, "factors of the Fisher information": factors * len(self.layers)}
        return Phase("the loss's gradients (guidance)", fixed, self.length * self.backwards(), self.batch)

    def _stages(self) -> list[list[int]]:
        """Widths of the inputs whose statistics are gathered in one pass; a layer with guided ones has its own."""
        known = {layer.name: layer for layer in self.layers}
        groups, runs = groups_of(self.layers), self.settings.guidance
        stages = stages_of(groups, known) if self.settings.sequential else [list(known)]
        each = 0 if not runs else 1 + (runs if runs > 1 else 0)
        return [
            [known[g[0]].shape[1] for g in groups if g[0] in set(stage) for _ in range(each * len(g) or 1)]
            for stage in stages
        ]

    def _passing(self) -> int:
        """Bytes of a token that are alive at the fullest moment of a pass without gradients."""
        return self.itemsize * (self._touched() + SCORES * self.heads * self.length)

    def _touched(self) -> int:
        """Numbers that go into a block's layers and come out of them, for one token."""
        plain = [layer for layer in self.layers if layer.expert is None]
        experts = [layer for layer in self.layers if layer.expert is not None]
        many = len({layer.expert for layer in experts})
        shared = sum(sum(layer.shape) for layer in experts) * min(many, EXPERTS_A_TOKEN) // max(1, many)
        return sum(sum(layer.shape) for layer in plain) + shared

    def backwards(self) -> int:
        """Bytes of a token that a pass through the block keeps for the way back, in float32."""
        return 2 * 4 * (self._touched() + SCORES * self.heads * self.length)


def _network_phases(plan: Plan, load: Load) -> list[Phase]:
    """Phases of a run that runs the network on the device."""
    choices = [choice for treatment in plan.treatments for choice in treatment.choices]
    wide = {scope_of(choice) for choice in choices}
    copies = (load.streams > 1) + 2 * ("block" in wide)  # as it was, as it was loaded, as its codes decode
    coded = load.itemsize * sum(job.layer.parameters for job in plan.outside)
    if "model" in wide and plan.recipe.rounding.scope == "model":
        phases = []
    else:
        phases = [load.gathering(copies)]
        phases[0] = replace(phases[0], fixed={**phases[0].fixed, "embedding and output layer as coded": coded})
    for choice in choices:
        if scope_of(choice) == "block" and choice.training_bytes:
            trained = choice.training_bytes * load.block // load.itemsize
            fixed = {**load.fixed(copies), f"the training of {choice.kind}": trained}
            phases.append(Phase(f"training a block ({choice.kind})", fixed, load.length * load.backwards(), load.batch))
        elif scope_of(choice) == "model":
            phases.append(_whole(plan, load, choice))
    if "fisher" in load.needs:
        phases.append(_fisher(plan, load))
    if load.settings.guidance or "output_gram" in load.needs:
        phases.append(load.gradients())
    return list({phase.name: phase for phase in phases}.values())


def _whole(plan: Plan, load: Load, choice: Choice) -> Phase:
    """The whole model there, and trained if the choice does so."""
    tokens = tokens_a_step(choice, load.settings)
    windows = max(1, tokens // load.settings.length) if choice.training_bytes else 1
    logits = 24 * min(CHUNK_ELEMENTS, load.length * (load.outside // load.itemsize // _hidden(load)))
    taught = min(CACHE_BYTES, 4 * load.settings.sequences * load.length * _hidden(load))
    fixed = {
        "the weights of the whole model": 4 * load.parameters,
        f"the training of {choice.kind}": choice.training_bytes * plan.weights,
        "logits": logits,
        "the original's hidden states": taught if choice.training_bytes else 0,
    }
    a_window = load.length * (load.backwards() * load.anatomy.blocks if choice.training_bytes else load._passing())
    return Phase(f"the whole model at once ({choice.kind})", fixed, a_window, windows)


def _fisher(plan: Plan, load: Load) -> Phase:
    """Gradients of the whole model, a window at a time, and their squares."""
    inside = sum(layer.parameters for layer in load.anatomy.layers)
    logits = 24 * load.length * (load.outside // load.itemsize // _hidden(load))
    fixed = {"the weights of the whole model": load.itemsize * load.parameters, "logits": logits}
    fixed |= {"gradients and their squares": (load.itemsize + 4) * inside}
    a_window = load.length * load.backwards() * load.anatomy.blocks
    return Phase("gradients of the whole model (fisher)", fixed, a_window, 1)


def _hidden(load: Load) -> int:
    return max(1, min((layer.shape[1] for layer in load.layers), default=1))


def _solved_there(job: Job) -> bool:
    return job.treatment.rounding.portable and job.treatment.grid.portable


def _solving(jobs: Sequence[Job], load: Load | None, options: SolveOptions, needs: Collection[str]) -> Phase:
    """The layer that takes most while it is solved. load : the network that is there meanwhile"""
    worst = max(jobs, key=lambda job: _solver_bytes(job, options, needs))
    held = {} if load is None else load.fixed(load.streams - 1)
    fixed = {**held, f"the solver, for {worst.layer.name}": _solver_bytes(worst, options, needs)}
    return Phase(f"solving {worst.layer.name} {list(worst.layer.shape)}", fixed)


def _solver_bytes(job: Job, options: SolveOptions, needs: Collection[str]) -> int:
    """Of one layer: weights with errors and targets, and moments with their factor in float64; without data windows of
    rows in the solver's numbers."""
    rows, columns = job.layer.shape
    without_data = job.grid.device_bytes(job.layer.shape, options)
    if not job.treatment.calibrated:
        return without_data
    moments = sum(name in needs for name in ("gram", "cross")) + 1  # and the held-out one
    return columns * columns * (4 * moments + 3 * 8) + max(without_data, 6 * 4 * rows * columns)
