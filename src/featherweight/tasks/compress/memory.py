"""`quantize`: a model in memory, whose layers are exchanged for compressed ones where they stand.

The codes are those that `compress` makes of the same weights: the choices, their order and the comparison on held-out
samples are the same, and so is the code that makes them. What differs is where things are: weights and finished layers
in memory, not in a checkpoint and a run folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError, RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.quantize.base import HeldWeight, SolveOptions, WeightSource
from featherweight.methods.quantize.treatment import scope_of
from featherweight.methods.recipe import Recipe, load_recipe
from featherweight.pages.notebook import progress_here
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.codes import Code
from featherweight.storage.run.training_store import NO_STORE, TrainingStore
from featherweight.system.devices import solving_device
from featherweight.system.threads import use_threads
from featherweight.tasks.compress.calibrated import CalibratedRun
from featherweight.tasks.compress.data import QUIET, calibration_needs, check_calibration
from featherweight.tasks.compress.journal import Journal
from featherweight.tasks.compress.linear_layers import LinearLayers
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.refusals import check_recipe
from featherweight.tasks.compress.solve import InputStatistics, group_seed, record_of, solve_layer

Forward = Callable[[nn.Module, Any], Any]


def quantize(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    calibration: str | Path | Tensor | Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    changes: Sequence[str] = (),
    forward: Forward | None = None,
    blocks: str | None = None,
    convolutions: bool = False,
    threads: int | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> nn.Module:
    """Compress the linear layers of a model in memory, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Any module with linear layers, on any device. A model of transformers can be saved with `save_pretrained`
        afterwards, and loaded like a folder that `compress` made.
    recipe : str, Path, mapping or Recipe
        The name of a preset, a YAML file, what such a file holds, or a Recipe; with choices of layers and blocks.
    calibration : str, Path, Tensor or sequence, optional
        What the network is run on, for recipes that do so. For language models a text as `compress` takes it (a file, a
        folder or hf:DATASET; None: the shipped text) or token ids int64 [sequences, length]; for every model a list of
        batches for `forward`. Data-free recipes do not read it.
    tokenizer : PreTrainedTokenizer, optional
        Of transformers, for calibration with text.
    changes : sequence of str
        Like "grid.planes=3", applied to the recipe.
    forward : callable, optional
        Runs the model on one batch of a list. Default: `model(**batch)` for a mapping, `model(*batch)` for a tuple or
        list, else `model(batch)`.
    blocks : str, optional
        Path of the model's list of blocks, which are calibrated one after the other; None looks for it, "" takes the
        whole model as one block.
    convolutions : bool
        Convolutions are layers, too, each the matrix [out, in / groups * product of kernel]. Of those in groups no
        statistics are gathered: they are compressed without data.
    threads : int, optional
        Of native kernels and PyTorch. Default: as `featherweight.system.threads` decides.
    seed : int
        For recipes with random choices.
    observer : callable, optional
        Called with the events that `compress` logs.

    Returns
    -------
    torch.nn.Module
        The model itself (a new layer where the model is nothing but one linear layer).

    Raises
    ------
    RecipeError
        The recipe is wrong, sees the whole model at once, which needs a checkpoint (use `compress`), or cannot treat
        these layers.
    CalibrationError
        There is nothing to calibrate with, or the model cannot be run on it.
    NonFiniteError
        A weight is NaN or infinite.
    FeatherError
        There is nothing to compress; it is the base of all of these.

    Notes
    -----
    Token embedding and output layer become what the recipe says of them, tied as they were; of models whose family is
    not known they stay, as do linear layers with a forward function of their own. An embedding is compressed without
    data, and the blocks are calibrated on what its code decodes to. Calibration runs the model in its own dtype, where
    `compress` takes bfloat16 or float32, whichever is faster. Layers are solved on the device where they lie, as far as
    grid and rounding can be (`portable`) and the device has float64; codes are put there. If it fails half-way, layers
    may have been rounded already: load the model again.
    """
    notify = observer or progress_here("compressing") or silent
    chosen = load_recipe(recipe, changes)
    _check(chosen, calibration, convolutions)
    feed = Feed(calibration, tokenizer, forward, blocks, convolutions)
    with use_threads(threads), torch.no_grad():
        found = LinearLayers.of(model, convolutions)
        if chosen.embedding != "keep" and found.embedding is None:
            chosen = chosen.model_copy(update={"embedding": "keep"})
            kind = type(model).__name__
            found.notes.append(f"{kind} has no token embedding that is known as one: none is compressed")
        plan = found.plan(chosen, SolveOptions(threads=threads))
        notify({"event": "plan", **plan.summary()})
        for note in found.notes:
            notify({"event": "note", "text": note})
        if chosen.calibrated:
            codes, rest = _embedded(plan, found, seed, notify)
            with torch.enable_grad():
                codes |= _calibrated(rest, found, feed, seed, notify)
        else:
            codes = _data_free(plan, found, seed, notify)
        compressed = found.put(codes)
    _mark(model, {name: codes[name] for name in plan_names(plan)}, chosen)
    return compressed


@dataclass(frozen=True)
class Feed:
    """How a model in memory is run on samples; see `quantize`."""

    calibration: Any
    tokenizer: Any
    forward: Forward | None
    blocks: str | None
    convolutions: bool


def plan_names(plan: Plan) -> list[str]:
    """Names of the layers that a plan compresses, in its order."""
    return [job.layer.name for job in plan.jobs]


def _check(recipe: Recipe, calibration: Any, convolutions: bool) -> None:
    check_recipe(recipe)
    wide = [choice.kind for choice in recipe.choices if scope_of(choice) == "model"]
    if wide:
        raise RecipeError(
            f"recipe {recipe.name} treats the whole model at once ({' and '.join(wide)}), which featherweight.quantize "
            "does not: save the model and use featherweight.compress, or take a recipe of layers or blocks like gptq"
        )
    wide = [choice.kind for choice in recipe.choices if scope_of(choice) == "block"]
    if wide and convolutions:
        raise RecipeError(
            f"recipe {recipe.name} treats a block at a time ({' and '.join(wide)}), which is not done where "
            "convolutions are layers: take one that treats layers, like gptq, ptqtp or rtn-4"
        )
    if "base" in recipe.needs:
        raise RecipeError(
            f"recipe {recipe.name} compares the model with the one it was fine-tuned from: save both and use "
            "featherweight.compress with base_model="
        )
    if recipe.calibrated and isinstance(calibration, str | Path):
        check_calibration(recipe, calibration, None)


# Codes ---------------------------------------------------------------------------------------------------------------


def _data_free(plan: Plan, found: LinearLayers, seed: int, notify: Observer) -> dict[str, Code]:
    journal, codes = Journal(plan, notify), dict[str, Code]()
    for index, job in enumerate(plan.jobs):
        source = HeldWeight(found.weight(job.layer.name))
        inputs = InputStatistics({}, group_seed(seed, job.layer.input_group))
        options = plan.options.on(solving_device(found.device(job.layer.name)))
        solved = solve_layer(job, source, inputs, options)
        codes[job.layer.name] = solved.code
        journal.finish(index, record_of(job, source, solved, plan.options.threads), resumed=False)
    return codes


def _embedded(plan: Plan, found: LinearLayers, seed: int, notify: Observer) -> tuple[dict[str, Code], Plan]:
    """The embedding's code, from whose values the model computes from now on, and the plan of the others."""
    jobs = tuple(job for job in plan.jobs if job.layer.name == found.embedding)
    if not jobs:
        return {}, plan
    if not jobs[0].treatment.by_itself:
        text = f"{found.embedding} is compressed without data: in memory calibration does not run through it"
        notify({"event": "note", "layer": found.embedding, "text": text})
        jobs = (jobs[0].without_data(),)
    codes = _data_free(replace(plan, jobs=jobs), found, seed, notify)
    weight = found.modules[jobs[0].layer.name].weight
    assert isinstance(weight, Tensor)
    weight.copy_(codes[jobs[0].layer.name].decode())
    return codes, replace(plan, jobs=tuple(job for job in plan.jobs if job.layer.name != found.embedding))


def _calibrated(plan: Plan, found: LinearLayers, feed: Feed, seed: int, notify: Observer) -> dict[str, Code]:
    def told(event: dict[str, Any]) -> None:
        if event["event"] not in QUIET:
            notify(event)

    with _without_cache(found.model):
        batches = _batches(found.model, feed, plan.recipe, notify)
        with _opened(found.model, feed, batches, plan.recipe, told) as calibration:
            plan = _with_blocks(plan, calibration)
            plan = replace(plan, options=plan.options.on(solving_device(calibration.host.device)))
            held = HeldRun()
            work = _InMemoryRun(plan, cast(Any, None), cast(Any, held), calibration, notify, seed)
            work.outside = {
                name: found.weight(name) for name in plan_names(plan) if name not in calibration.host.layers
            }
            work.solve()
    return {job.layer.name: held.code(index) for index, job in enumerate(plan.jobs)}


def _opened(model: nn.Module, feed: Feed, batches: Tensor | list[Any], recipe: Recipe, notify: Observer) -> Calibration:
    settings, needs, blocks = recipe.calibration, calibration_needs(recipe), feed.blocks
    if isinstance(batches, Tensor):
        return Calibration.of_tokens(model, batches, settings, needs, blocks=blocks, notify=notify)
    run = feed.forward or _run
    convolutions = feed.convolutions
    return Calibration.of_module(
        model, run, batches, settings, needs, blocks=blocks, convolutions=convolutions, notify=notify
    )


def _with_blocks(plan: Plan, calibration: Calibration) -> Plan:
    """The plan with each layer in the block that the calibration has it in; the calibration gets to know what the
    family says of the layers, where there is one."""
    host, known = calibration.host, {layer.name: layer for layer in plan.anatomy.layers}
    ours = plan.anatomy.family != "structure" and set(host.layers) <= set(known)
    if ours:
        described = {
            name: replace(layer, block=host.layers[name].block) for name, layer in known.items() if name in host.layers
        }
        host.layers.clear()
        host.layers.update(described)
    jobs = []
    for job in plan.jobs:
        layer = host.layers.get(job.layer.name)
        jobs.append(replace(job, layer=replace(job.layer, block=None) if layer is None else _merged(job.layer, layer)))
    return replace(plan, jobs=tuple(jobs))


def _merged(layer: LinearLayer, seen: LinearLayer) -> LinearLayer:
    """What is known of a layer with the block and the input that calibration has found."""
    return replace(layer, block=seen.block, input_group=seen.input_group)


def _batches(model: Any, feed: Feed, recipe: Recipe, notify: Observer) -> Tensor | list[Any]:
    """Token ids, or batches for `forward`. FeatherError where there is nothing to calibrate with."""
    source = feed.calibration
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.is_floating_point():
            raise CalibrationError(
                f"calibration is a tensor {source.dtype} {list(source.shape)}, expected token ids int64 "
                "[sequences, length], or a list of batches"
            )
        return source.cpu()
    if source is not None and not isinstance(source, str | Path):
        return list(source)
    if feed.tokenizer is None or feed.forward is not None or not hasattr(model, "config"):
        raise CalibrationError(
            f"recipe {recipe.name} runs the network: give calibration= a list of batches or token ids [sequences, "
            "length], or, for a language model, a text with tokenizer="
        )
    from featherweight.model.text.tokenizer import Tokenizer
    from featherweight.model.text.windows import check_vocabulary, context_of, vocabulary_of, windows

    config = model.config.to_dict()
    text = recipe.calibration.text if source is None else str(source)
    ids = windows(Tokenizer.of(feed.tokenizer), text, recipe.calibration, context=context_of(config), notify=notify)
    check_vocabulary(ids, vocabulary_of(config))
    return ids


def _run(module: nn.Module, batch: Any) -> Any:
    """The default `forward`."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Within, a model of transformers keeps no keys and values of earlier tokens."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@dataclass
class HeldRun:
    """Finished layers in memory, where a run of `compress` has a folder (see `RunFolder`)."""

    store: ClassVar[None] = None  # what passes find is kept by the calibration itself
    codes: dict[int, Code] = field(default_factory=dict)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    def keep(self, index: int, code: Code, record: dict[str, Any]) -> None:
        self.codes[index], self.records[index] = code, record

    def record(self, index: int, layer: str) -> dict[str, Any] | None:
        return self.records.get(index)

    def code(self, index: int) -> Code:
        return self.codes[index]

    def keep_changed(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Nothing: they are in the model."""

    def changed(self, block: int) -> None:
        """None: no block was finished by an earlier run."""

    def is_tuned(self, indices: Any) -> bool:
        return False

    def drop_tuned(self) -> None:
        """Nothing: layers are never changed all together here."""

    def training_of(self, step: str, notify: Observer) -> TrainingStore:
        return NO_STORE


@dataclass
class _InMemoryRun(CalibratedRun):
    """A calibrated run over a model in memory.

    outside : weights of layers that no block holds
    """

    outside: dict[str, Tensor] = field(default_factory=dict)

    def _source_of(self, job: Job) -> WeightSource:
        return HeldWeight(self.outside[job.layer.name])


def _mark(model: Any, codes: Mapping[str, Code], recipe: Recipe) -> None:
    """Let a model of transformers know that it is compressed, so that it is saved as such."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    from featherweight.integrations.transformers import mark_compressed

    mark_compressed(
        model, {name: {**code.spec, "shape": list(code.shape)} for name, code in codes.items()}, recipe.dump()
    )
