"""What a compression will do and need, before it starts: every source tensor accounted for, bytes, memory, disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from featherweight.errors import CheckpointError, FeatherError, shown
from featherweight.methods.budget.base import LayerCandidates
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.learn.objectives import CHUNK_ELEMENTS
from featherweight.methods.quantize.base import Choice, Grid, Rounding, SolveOptions
from featherweight.methods.quantize.grids.dense import DenseGrid
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.methods.quantize.treatment import Treatment, scope_of
from featherweight.methods.recipe import Recipe
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.codes import code_layout, describe_code
from featherweight.system.memory import available_bytes, resident_bytes
from featherweight.system.units import size_text
from featherweight.tasks.compress.account import accounted_anatomy
from featherweight.tasks.compress.fates import Fate, counts_of, fates_of
from featherweight.tasks.compress.plain import COPY_WINDOW
from featherweight.tasks.compress.refusals import check_ends, check_layers, check_recipe

SHARD_BYTES = 4_000_000_000
WINDOWS = tuple(1 << bits for bits in range(23, 17, -1))  # 8 MiB down to 256 KiB
MARGIN = 32 << 20  # allocator and thread stacks; docs/results.md has estimates beside measured peaks
SOURCE_DTYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float64: "float32",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Job:
    """One layer to compress, and what is done to it."""

    layer: LinearLayer
    treatment: Treatment

    @property
    def grid(self) -> Grid:
        return self.treatment.grid

    @property
    def nbytes(self) -> int:
        """Stored bytes to expect (scales that need float32 add to it)."""
        return self.treatment.nbytes(self.layer.shape)

    def without_data(self) -> Job:
        """The same layer with what it gets where it cannot be calibrated."""
        return replace(self, treatment=self.treatment.without_data())


@dataclass(frozen=True)
class Plan:
    """jobs : layers to compress, in model order
    copied : names of source tensors that are copied byte by byte
    replaced : names of source tensors whose place the jobs' tensors take
    dropped : source tensor -> reason; nothing is dropped silently
    notes : what is odd about the checkpoint, a sentence each
    renamed : name -> name in the source, of tensors that carry a wrapper's prefix there
    candidates : layer -> treatments that the recipe's allocation may choose from by measured errors; until it has
        (`featherweight.tasks.compress.allocate`), jobs hold the largest
    most_code_bytes : until then, an upper bound of `code_bytes`
    max_memory : resident memory that must not be passed, if it was said
    bytes_are : what `code_bytes` says: "at most" so many, the "planned" ones, or these "after measuring" layers
    keeps_codes : something of an earlier compression stays in the output: codes, or biases that it gave
    decoding : of tensors that are codes in the source, the memory that reading takes by windows of so many bytes
    """

    anatomy: Anatomy
    recipe: Recipe
    jobs: tuple[Job, ...]
    copied: tuple[str, ...]
    replaced: tuple[str, ...]
    dropped: dict[str, str]
    copied_bytes: int
    source_bytes: int
    parameters: int
    linear_weights: int
    linear_dense_bytes: int
    options: SolveOptions
    notes: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    keeps_codes: bool = False
    decoding: Mapping[str, Callable[[int], int]] = field(default_factory=dict)

    @property
    def fates(self) -> tuple[Fate, ...]:
        """What becomes of every tensor of the source, one entry each.

        Tensors that calibration is going to change (norms, say) are among the copied ones before it has done so.
        """
        layers: dict[str, list[tuple[str, str]]] = {}
        for job in self.jobs:
            code = describe_code(job.grid.spec(job.layer.shape))
            layers.setdefault(job.layer.tensor, []).append((job.layer.name, code))
        return fates_of(self.copied, layers, self.dropped, self.renamed, self.plain)

    @property
    def plain(self) -> bool:
        """Whether all layers become plain values, so that the output is an ordinary checkpoint."""
        every: list[Recipe | Treatment] = [self.recipe, *self.treatments]
        kinds = {scope_of(choice) for one in every for choice in (*one.transforms, *one.corrections)}
        dtypes: dict[str, set[str]] = {}
        for job in self.jobs:
            spec = job.grid.spec(job.layer.shape)
            if spec["kind"] != "dense":
                return False
            dtypes.setdefault(job.layer.tensor, set()).add(spec["dtype"])
        return not self.keeps_codes and kinds <= {"model"} and all(len(found) == 1 for found in dtypes.values())

    candidates: Mapping[str, tuple[Treatment, ...]] = field(default_factory=dict)
    most_code_bytes: int | None = None
    bytes_are: Literal["at most", "planned", "planned after measuring"] = "planned"
    max_memory: int | None = None

    @property
    def treatments(self) -> tuple[Treatment, ...]:
        """Of all jobs, each object once."""
        return tuple({id(job.treatment): job.treatment for job in self.jobs}.values())

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that any layer's treatment needs, in alphabetical order."""
        return tuple(sorted({name for treatment in self.treatments for name in treatment.needs}))

    @property
    def weights(self) -> int:
        return sum(job.layer.parameters for job in self.jobs)

    @property
    def code_bytes(self) -> int:
        planned = sum(job.nbytes for job in self.jobs)
        return planned if self.most_code_bytes is None else min(planned, self.most_code_bytes)

    @property
    def outside(self) -> tuple[Job, ...]:
        """Jobs of matrices outside the blocks: the token embedding, the output layer."""
        return tuple(job for job in self.jobs if job.layer in self.anatomy.outside)

    @property
    def outside_bits(self) -> float | None:
        """Bits per weight of these; None where there are none."""
        weights = sum(job.layer.parameters for job in self.outside)
        return 8 * sum(job.nbytes for job in self.outside) / weights if weights else None

    @property
    def inside_bits(self) -> float:
        """Bits per weight of the compressed layers of the blocks; of all that are compressed where these are none."""
        outside = self.outside if len(self.outside) < len(self.jobs) else ()
        weights = self.weights - sum(job.layer.parameters for job in outside)
        return 8 * (self.code_bytes - sum(job.nbytes for job in outside)) / max(1, weights)

    @property
    def output_bytes(self) -> int:
        return self.code_bytes + self.copied_bytes

    @property
    def disk_bytes(self) -> int:
        """Room needed while working: the output, and the artifacts of the shard being assembled once more."""
        return self.output_bytes + min(self.code_bytes, SHARD_BYTES) + self.aside_bytes

    @property
    def aside_bytes(self) -> int:
        """Room beside it: layers before a stage that changes all of them, states of trainings, weights of tokens."""
        late, layers = any(scope_of(choice) == "model" for choice in self.recipe.corrections), len(self.jobs)
        return self.code_bytes * late + self.training_state_bytes + self.recipe.calibration.guidance_bytes(layers)

    def memory_bytes(self) -> int:
        """Expected peak of resident memory."""
        return resident_bytes() + MARGIN + self._working(self.options)

    def spare_bytes(self, free: int) -> int:
        """Memory that a calibrated run may fill to save time, of so much that is free."""
        return free if self.max_memory is None else max(0, self.max_memory - self.memory_bytes())

    def _working(self, options: SolveOptions) -> int:
        needs = [job.grid.working_bytes(job.layer.shape, options) + self._pages(job.layer) for job in self.jobs]
        solving = max([*needs, COPY_WINDOW])
        return solving + self.calibration_bytes() if self.recipe.calibrated else solving

    def calibration_bytes(self) -> int:
        """Memory of running the network: a block (or the whole model) in float32, streams, and one set's statistics."""
        settings, needs = self.recipe.calibration, self.needs
        choices = [choice for treatment in self.treatments for choice in treatment.choices]
        blocks: dict[int | None, int] = {}
        for layer in self.anatomy.layers:
            blocks[layer.block] = blocks.get(layer.block, 0) + layer.parameters
        block = max(blocks.values(), default=0)
        two_streams = bool({"cross", "targets"} & set(needs))
        wide = {scope_of(choice) for choice in choices}
        whole = "model" in wide or "fisher" in needs
        held = 4 * (self.parameters if whole else block * (1 + two_streams))
        held += 4 * sum(job.layer.parameters for job in self.outside)  # what they decode to
        held += self._largest_decoded()
        held += 4 * block * ("block" in wide)  # the weights the block was loaded with
        held += max((self._training_bytes(choice, block) for choice in choices), default=0)
        if "fisher" in needs:  # gradients and their squares; the squares stay
            held += 8 * self.linear_weights + self._passing_bytes(settings.length, True)
        solved = [job for job in self.jobs if job.treatment.calibrated] or self.jobs
        widest = max(job.layer.shape[1] for job in solved)
        tallest = max(job.layer.shape[0] for job in solved)
        hidden = min(job.layer.shape[1] for job in self.jobs)
        stream = 4 * settings.sequences * settings.length * hidden * (1 + two_streams)
        moments = sum(name in ("gram", "cross") for name in needs) + (settings.held_out > 0)
        if settings.guidance or "output_gram" in needs:  # a second stream for rounds, weights, one block's way back
            held += stream + settings.guidance_bytes(len(self.jobs))
            held += self._passing_bytes(max(settings.batch_tokens, settings.length), False)
        # moments and their copies in a transformed space, a float64 factor, the weight with its error and target
        return held + stream + widest * (widest * (8 * moments + 16) + 4 * tallest * 4)

    def _largest_decoded(self) -> int:
        """Bytes of the largest tensor that is decoded as a whole before it is put into the network."""
        sizes: dict[str, int] = {}
        for layer in (*self.anatomy.layers, *self.anatomy.outside):
            if layer.tensor in self.decoding:
                sizes[layer.tensor] = sizes.get(layer.tensor, 0) + 4 * layer.parameters
        return max(sizes.values(), default=0)

    def _training_bytes(self, choice: Choice, block: int) -> int:
        """Memory of a choice that trains, on top of the network's float weights."""
        if not choice.training_bytes:
            return 0
        whole = scope_of(choice) == "model"
        tokens = tokens_a_step(choice, self.recipe.calibration)
        return choice.training_bytes * (self.weights if whole else block) + self._passing_bytes(tokens, whole)

    def _passing_bytes(self, tokens: int, whole: bool) -> int:
        """What a forward pass keeps of so many tokens for the way back: what goes into layers, comes out of them and is
        between them; with the whole model also logits, a chunk at a time."""
        touched = sum(sum(layer.shape) for layer in self.anatomy.layers)
        if not whole:
            return 6 * tokens * touched // max(1, self.anatomy.blocks)
        hidden = min(layer.shape[1] for layer in self.anatomy.layers)
        vocabulary = (
            self.parameters - self.linear_weights
        ) // hidden  # or more: the head is not told from the embedding
        return 6 * tokens * touched + 24 * min(CHUNK_ELEMENTS, tokens * vocabulary)

    @property
    def training_state_bytes(self) -> int:
        """Most room that saved states of trainings of the whole model take: a new one is written beside the last."""
        sizes = [0]
        for choice in self.recipe.choices:
            if choice.training_bytes and scope_of(choice) == "model":
                trained = self.weights if isinstance(choice, Rounding) else self._stored_floats()
                sizes.append(2 * 16 * trained)  # value, two moments and the best value, in float32
        return sum(sizes)

    def _stored_floats(self) -> int:
        """Scales, tables and the like of all codes."""
        layouts = [code_layout(job.grid.spec(job.layer.shape)) for job in self.jobs]
        return sum(math.prod(t.shape) for layout in layouts for t in layout.values() if t.dtype.is_floating_point)

    def _pages(self, layer: LinearLayer) -> int:
        """Mapped pages of the source that are resident at once."""
        whole, window = 4 * layer.parameters, self.options.window_bytes
        decoding = self.decoding[layer.tensor](window) if layer.tensor in self.decoding else 0
        return decoding + (whole if layer.transposed or layer.fused_slice else min(whole, 4 * window))

    def summary(self) -> dict[str, Any]:
        """JSON-able account."""
        return {
            "recipe": self.recipe.name,
            "family": self.anatomy.family,
            "blocks": self.anatomy.blocks,
            "parameters": self.parameters,
            "weights": self.weights,
            "layers": len(self.jobs),
            "tensors": counts_of(self.fates),
            "bits_per_weight": self.inside_bits,
            "bits_per_weight_outside": self.outside_bits,
            "bits_per_weight_model": 8 * self.output_bytes / max(1, self.parameters),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes(),
            "needs": sorted({*self.needs, *self.recipe.allocation.needs}),
            "bytes_are": self.bytes_are,
            "roles": self.roles(),
        }

    def roles(self) -> list[dict[str, Any]]:
        """Per role: layers, weights, bits, bytes; copied linear layers are listed as dense."""
        table: dict[tuple[str, str], dict[str, Any]] = {}
        for job in self.jobs:
            code = describe_code(job.grid.spec(job.layer.shape))
            row = table.setdefault(
                (job.layer.role, code),
                {"role": job.layer.role, "code": code, "layers": 0, "weights": 0, "bytes": 0},
            )
            row["layers"] += 1
            row["weights"] += job.layer.parameters
            row["bytes"] += job.nbytes
        for row in table.values():
            row["bits_per_weight"] = 8 * row["bytes"] / row["weights"]
        return list(table.values())


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, threads: int | None = None, max_memory: int | None = None
) -> Plan:
    """Assign every tensor of the checkpoint a fate and choose window sizes within `max_memory`.

    Raises CheckpointError where the tensors are not those of the model that config.json describes.
    """
    found = checkpoint.quantization_config
    if found is not None:
        raise CheckpointError(_quantised(checkpoint, found))
    check_recipe(recipe)
    anatomy, notes, dropped = accounted_anatomy(checkpoint)
    treatments = recipe.candidates_for(anatomy)
    layers = [*anatomy.layers, *anatomy.outside]
    candidates = {x.name: LayerCandidates.of(x, treatments[x.name]) for x in layers if x.name in treatments}
    measures = recipe.allocation.measures
    given = _largest(candidates) if measures else recipe.allocation.assign(candidates)
    chosen_tensors = {layer.tensor for layer in layers if layer.name in given}
    jobs = []
    for layer in layers:
        if layer.name in given:
            jobs.append(Job(layer, given[layer.name]))
        elif layer.tensor in chosen_tensors:  # the other slices of a tensor of which some are compressed
            stored = SOURCE_DTYPES.get(checkpoint.plain_dtype(layer.tensor), "bfloat16")
            jobs.append(Job(layer, Treatment(DenseGrid(dtype=stored), Nearest())))
    check_ends(recipe, anatomy, checkpoint, [job.layer.name for job in jobs])
    check_layers(
        recipe,
        anatomy,
        ((j.layer.name, treatments.get(j.layer.name, (j.treatment,)) if measures else (j.treatment,)) for j in jobs),
    )
    dropped |= _copies_of(anatomy, chosen_tensors, checkpoint)
    copied = tuple(name for name in checkpoint.names if name not in chosen_tensors and name not in dropped)
    linear = {layer.tensor for layer in anatomy.layers}
    plan = Plan(
        anatomy=anatomy,
        recipe=recipe,
        jobs=tuple(jobs),
        copied=copied,
        replaced=tuple(name for name in checkpoint.names if name in chosen_tensors),
        dropped=dropped,
        notes=notes,
        copied_bytes=sum(checkpoint.stored_bytes(name) for name in copied),
        source_bytes=checkpoint.total_bytes,
        parameters=checkpoint.parameters,
        linear_weights=sum(checkpoint.entry(name).elements for name in linear),
        linear_dense_bytes=sum(checkpoint.stored_bytes(name) for name in linear - chosen_tensors),
        options=SolveOptions(threads=threads),
        renamed={name: stored for stored, name in checkpoint.renamed.items() if stored != name},
        candidates=treatments if measures else {},
        most_code_bytes=_most_bytes(recipe, candidates, jobs) if measures else None,
        bytes_are="at most" if measures else "planned",
        keeps_codes=bool(checkpoint.given_biases) or any(checkpoint.codes_of(name) for name in copied),
        decoding={n: partial(checkpoint.reading_bytes, n) for n in checkpoint.names if checkpoint.codes_of(n)},
    )
    assert len(plan.copied) + len(plan.replaced) + len(plan.dropped) == len(checkpoint.names)
    return plan if max_memory is None else _within(plan, max_memory)


def _copies_of(anatomy: Anatomy, chosen: set[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Output layers stored beside a tied embedding that is compressed, with the reason why they are left out."""
    stored = {f"{head}.weight": embedding for head, embedding in anatomy.tied if embedding in chosen}
    return {name: f"a copy of {of}, which is compressed" for name, of in stored.items() if name in checkpoint.names}


def _quantised(checkpoint: Checkpoint, found: dict[str, Any]) -> str:
    """Why a folder of another tool is no source, and what to do."""
    return (
        f"{checkpoint.folder} is quantised already (quant_method {shown(found.get('quant_method'))}); "
        "start from the original weights"
    )


def _largest(candidates: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
    """By layer, the candidate that stores most; what plans hold before layers are measured."""
    return {name: max(one.candidates, key=lambda c: c.nbytes).treatment for name, one in candidates.items()}


def _most_bytes(recipe: Recipe, candidates: Mapping[str, LayerCandidates], jobs: Sequence[Job]) -> int:
    """Bytes of all codes that an allocation keeps to; slices that stay dense are none of its layers."""
    others = sum(job.nbytes for job in jobs if job.layer.name not in candidates)
    return recipe.allocation.most_bytes(candidates) + others


def tokens_a_step(choice: Choice, settings: CalibrationSettings) -> int:
    """Tokens that a step of a choice that trains runs forwards and backwards: windows of the model, or a batch."""
    if scope_of(choice) == "model":
        return settings.length * int(getattr(choice, "batch_size", 1))
    return settings.batch_tokens


def _within(plan: Plan, max_memory: int) -> Plan:
    """The plan with the largest windows whose expected peak stays within `max_memory`."""
    for window in WINDOWS:
        trial = replace(plan, options=plan.options.model_copy(update={"window_bytes": window}))
        if trial.memory_bytes() <= max_memory:
            return replace(trial, max_memory=max_memory)
    smallest = replace(plan, options=plan.options.model_copy(update={"window_bytes": WINDOWS[-1]}))
    too_little = f"--max-memory {size_text(max_memory)} is too little: "
    if plan.recipe.calibrated:
        raise FeatherError(
            f"{too_little}recipe {plan.recipe.name} needs about {size_text(smallest.memory_bytes())} for this model; "
            f"{_with_less_memory(plan.recipe)}"
        )
    largest = max(smallest.jobs, key=lambda job: job.grid.working_bytes(job.layer.shape, smallest.options))
    raise FeatherError(
        f"{too_little}layer {largest.layer.name} [{largest.layer.shape[0]}, {largest.layer.shape[1]}] needs "
        f"{size_text(smallest.memory_bytes())}"
    )


def check_memory(plan: Plan) -> None:
    """FeatherError if the network has to be run and there is not the memory: the system would end it hours later.

    Recipes without data keep to one tensor, and have windows that can be made small.
    """
    free, need = available_bytes(), plan.memory_bytes() - resident_bytes()
    if not plan.recipe.calibrated or not free or need <= free:
        return
    raise FeatherError(
        f"recipe {plan.recipe.name} needs about {size_text(need)} of memory for this model, and {size_text(free)} "
        f"are free: {_with_less_memory(plan.recipe)}, or name what may be used with --max-memory"
    )


def _with_less_memory(recipe: Recipe) -> str:
    """What to do where a recipe that runs the network needs too much."""
    whole = [c.kind for c in recipe.choices if scope_of(c) == "model"]
    if whole:
        return (
            f"the whole model is in memory at once for {' and '.join(whole)}; take a recipe that treats one block at a "
            "time, like trit-2-blockwise, trit-1-blockwise or gptq"
        )
    if "fisher" in recipe.needs:
        return "it takes gradients of the whole model at once; take a recipe that treats one block at a time, like gptq"
    settings = recipe.calibration
    return (
        f"take fewer or shorter windows than {settings.sequences} of {settings.length} tokens "
        "(--set calibration.sequences=N calibration.length=N)"
    )
