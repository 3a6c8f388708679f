"""`compress`: the whole line, one layer at a time, without ever building the model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import CheckpointError, FeatherError, OutputError
from featherweight.events import Observer
from featherweight.methods.recipe import Recipe, load_recipe
from featherweight.model.network.source import open_source
from featherweight.pages.notebook import progress_here
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight, sample_digest, scan_tensor
from featherweight.storage.run.executor import Executor, Local, Shared
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.log import Events
from featherweight.storage.run.ownership import first_foreign, within
from featherweight.storage.run.publishing import occupants
from featherweight.system.devices import device_named
from featherweight.system.files import disk_errors, to_json, write_text
from featherweight.system.memory import peak_memory_bytes, reset_peak_memory, resident_bytes
from featherweight.system.threads import thread_reason, use_threads
from featherweight.system.units import parse_size, size_text
from featherweight.tasks.compress.allocate import Measuring, decided
from featherweight.tasks.compress.assemble import jobs_to_write, lay_out, read_manifest, write_rest, write_shards
from featherweight.tasks.compress.data import CalibrationData, check_calibration
from featherweight.tasks.compress.data_free import solve_all, solve_alone
from featherweight.tasks.compress.device_memory import placed
from featherweight.tasks.compress.device_share import limit_on
from featherweight.tasks.compress.earlier import decoded_texts
from featherweight.tasks.compress.fates import counts_in
from featherweight.tasks.compress.forecast import Forecast
from featherweight.tasks.compress.identity import same_identity
from featherweight.tasks.compress.loadable import loading_note
from featherweight.tasks.compress.plan import SHARD_BYTES, Plan, check_memory, make_plan
from featherweight.tasks.compress.record import Beginning, record_of
from featherweight.tasks.compress.result import Compression
from featherweight.tasks.compress.workers import Order, Workers, check_workers, share_of
from featherweight.version import __version__


def compress(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    calibration: str | Path | Sequence[Mapping[str, float]] | None = None,
    base_model: str | Path | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    max_memory: int | str | None = None,
    max_device_memory: int | str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
    workers: int = 1,
    observer: Observer | None = None,
) -> Compression:
    """Compress a checkpoint by a recipe, and write the result as a folder that `featherweight.load` reads.

    Called again after an interruption, it goes on; called again when complete, it returns at once. While it works
    OUT.feather-run stands beside the output, and OUT.log.jsonl records events.

    Parameters
    ----------
    model : str or Path
        A folder of safetensors files, one such file, or a hub id.
    recipe : str, Path, mapping or Recipe
        The name of a preset, a YAML file, what such a file holds, or a Recipe.
    out : str or Path
        Folder to make.
    changes : sequence of str
        Like "grid.planes=3", applied to the recipe.
    calibration : str, Path or list of mappings, optional
        Text (.txt, .jsonl, .parquet, a folder of text files, hf:DATASET, shipped, or self: conversations that the model
        writes, kept in OUT.conversations.jsonl), a mixture of such by shares of windows ("self=0.1,corpus.txt=0.9" or
        [{"self": 0.1}, {"corpus.txt": 0.9}]), or a file of statistics, for recipes that run the network. Default: the
        recipe's `calibration.text`, else the shipped text. Data-free recipes do not read it.
    base_model : str or Path, optional
        The model that this one was fine-tuned from, for recipes that compare the two.
    threads : int, optional
        Of native kernels and PyTorch. Default: as `featherweight.system.threads` decides.
    device : str or torch.device
        Where recipes that run the network run it, gather their statistics and train: "cpu", "cuda", "cuda:1", ...;
        "auto" is an accelerator where there is one. Layers whose grid and rounding are portable are solved there, too,
        but not on "mps", which has no float64. Another device changes the order of floating-point sums, as another
        number of threads does, and so may change last bits; a run that was interrupted may go on with another one.
    seed : int
        For recipes with random choices; part of the run's identity.
    max_memory : int or str, optional
        Bytes or "2GB": a limit on resident memory that is planned for, with an error if it cannot be met. Without it,
        recipes that run the network are refused where the memory that is free now is too little.
    max_device_memory : int or str, optional
        The same for the memory of `device`: so many windows of text go together as fit. Default: what is free there,
        if the device can tell.
    overwrite : bool
        Replace an existing output of featherweight's, or another unfinished run. What else stands in OUT is never
        replaced.
    shard_bytes : int
        Most bytes of one file of the output.
    trust_remote_code : bool
        Run the code that the model's folder brings for its class or tokenizer.
    workers : int
        Processes that share the layers of a recipe without data, this one among them. `threads` and `max_memory` are
        those of all together, and results do not depend on it.
    observer : callable, optional
        Called with every event that goes to the log, a mapping that can be written as JSON. Default: in a notebook,
        a bar with the time left.

    Returns
    -------
    Compression
        Where the result is, what it took (seconds, bytes of peak memory), its bits a weight, and a record of every
        layer.

    Raises
    ------
    CheckpointError
        The model is missing, damaged, or of a kind that is not understood.
    RecipeError
        The recipe is wrong, its choices do not go together, or cannot treat this model.
    CalibrationError
        The network cannot be run on the text.
    NonFiniteError
        A weight is NaN or infinite.
    OutputError
        OUT exists already, or cannot be written.
    FeatherError
        Any other setting is wrong, or the memory does not suffice; it is the base of all of these.
    """
    begun, resident = time.monotonic(), _begin_measuring()
    observer = observer or progress_here("compressing")
    out = _absolute(out)
    chosen = load_recipe(recipe, changes)
    check_calibration(chosen, calibration, base_model)
    runs_on = device_named(device)
    device_limit = limit_on(runs_on, device, max_device_memory)
    check_workers(chosen, workers, runs_on)
    if shard_bytes < 1:
        raise FeatherError(f"shard_bytes must be positive, not {shard_bytes}")
    limit = parse_size(max_memory, "--max-memory") if isinstance(max_memory, str) else max_memory
    limit = None if limit is None else limit // workers
    threads = share_of(threads, workers)
    with open_source(model, trust_remote_code) as checkpoint, use_threads(threads) as count:
        check_place(out, checkpoint, model, base_model)
        beside = tuple(path.name for path in checkpoint.other_files())
        data = CalibrationData.of(chosen, checkpoint, calibration, base_model, observer, runs_on, out=out)
        identity = {
            "source": checkpoint.identity(),
            "weights": sample_digest(checkpoint),
            "recipe": chosen.dump(),
            "seed": seed,
            "shard_bytes": shard_bytes,
            "featherweight": __version__,
            **data.identity(),
        }
        done = finished_output(out, identity, overwrite, beside)
        if done is not None:
            RunFolder(out, same=same_identity).remove_leftover(identity)
            return _result(out, done, checkpoint, begun, already_complete=True)
        plan = make_plan(checkpoint, chosen, threads, limit)
        plan, share = placed(plan, checkpoint, runs_on, device_limit, data)
        data = replace(data, share=share)
        data.check(plan, checkpoint)
        with RunFolder.opened(out, identity, overwrite, beside, same_identity, str(runs_on)) as run:
            # once more: another process may have been at work until now
            done = finished_output(out, identity, overwrite, beside)
            if done is not None:
                return _result(out, done, checkpoint, begun, already_complete=True)
            if not run.publishing and run.read_assembly() is None:
                share.check()
                if limit is None:
                    check_memory(plan)
            with Events(out, observer) as events:
                told = {"out": str(out), "threads": count, "threads_from": thread_reason(threads)}
                told |= {"device": str(runs_on), "solved_on": plan.options.device, **share.facts()}
                _say_what_is_odd(plan, checkpoint, run, events)
                plan = decided(plan, checkpoint, run, Measuring(seed, data.stored, windows=data.windows), events)
                events({"event": "plan", **plan.summary(), **told})
                place = str(model) if Path(model).is_file() else str(checkpoint.folder)
                order = Order(place, chosen.dump(), seed, threads, limit, trust_remote_code, str(out), identity)
                executor = _executor(workers, order, run, events)
                beginning = Beginning.of((begun, resident), _name_of(model), told, run)
                work = _Work(plan, checkpoint, run, Forecast(plan, events), identity, data, beginning)
                resumed = work.make(executor)
                manifest = read_manifest(out)
                assert manifest is not None
                result = _result(out, manifest, checkpoint, begun, resumed)
                events({"event": "done", **result.in_short()})
    return result


def _begin_measuring() -> int:
    """Peak memory counts from now; returns what is resident already."""
    reset_peak_memory()
    return resident_bytes()


def _executor(workers: int, order: Order, run: RunFolder, events: Events) -> Executor:
    """This process, or this one and others with the same order."""
    return Local() if workers == 1 else Shared(run.claims, lambda: Workers(run, order, workers - 1, events))


def _say_what_is_odd(plan: Plan, checkpoint: Checkpoint, run: RunFolder, events: Events) -> None:
    for note in (run.moved_note, *plan.notes):
        if note is not None:
            events({"event": "note", "text": note})
    if not plan.recipe.calibrated and (loading := loading_note(checkpoint)) is not None:
        events({"event": "note", "text": loading})


@dataclass(frozen=True)
class _Work:
    """What is left to do of a compression, from the plan to the folder in its place."""

    plan: Plan
    checkpoint: Checkpoint
    run: RunFolder
    events: Observer
    identity: dict[str, Any]
    data: CalibrationData
    beginning: Beginning

    def make(self, executor: Executor) -> int:
        """Do it; returns how many layers were found finished."""
        plan, checkpoint, run = self.plan, self.checkpoint, self.run
        resumed = len(plan.jobs)
        if not run.publishing:
            assembly = run.read_assembly()
            if assembly is None:
                assembly, resumed = self._solve(executor)
            else:
                resumed -= self._solve_lost(assembly)

            def told(file: str, number: int, of: int) -> None:
                self.events({"event": "shard", "file": file, "number": number, "of": of})

            write_shards(run, assembly, checkpoint, plan, told)
            write_rest(run, assembly, checkpoint, plan, self.identity, record_of(plan, self.beginning, resumed))
        run.publish()
        return resumed

    def _solve(self, executor: Executor) -> tuple[dict[str, Any], int]:
        """Which tensors go to which shard, once all layers are solved; and how many were found finished."""
        plan, checkpoint, run = self.plan, self.checkpoint, self.run
        seed, shard_bytes = self.identity["seed"], self.identity["shard_bytes"]
        _check_disk(plan, run, shard_bytes)
        for name in plan.copied:
            scan_tensor(checkpoint, name)
        config: dict[str, Any] = {}
        if plan.recipe.calibrated:
            _scan_layers(plan, checkpoint)
            records, resumed, config = self.data.solve(plan, checkpoint, run, self.events, seed)
        else:
            records, resumed = solve_all(plan, checkpoint, run, self.events, seed, executor)
        changed, verdicts = run.changed_tensors(), run.all_verdicts()
        for text in decoded_texts((name for name in plan.copied if name in changed), checkpoint):
            self.events({"event": "note", "text": text})
        assembly = lay_out(
            plan, checkpoint, records, shard_bytes, run.store, changed=changed, config=config, whole_model=verdicts
        )
        write_text(run.assembly, to_json(assembly))
        return assembly, resumed

    def _solve_lost(self, assembly: dict[str, Any]) -> int:
        """Layers that are still to be written, but whose files are gone, are solved again; returns how many."""
        plan, checkpoint, run, seed = self.plan, self.checkpoint, self.run, self.identity["seed"]
        lost = [i for i in jobs_to_write(run, assembly) if run.record(i, plan.jobs[i].layer.name) is None]
        if lost and plan.recipe.calibrated:
            self.data.solve(plan, checkpoint, run, self.events, seed)
        for index in lost if not plan.recipe.calibrated else ():
            solve_alone(plan, checkpoint, run, index, seed)
        return len(lost)


def _scan_layers(plan: Plan, checkpoint: Checkpoint) -> None:
    """NonFiniteError now for a weight that would be met only after hours of running the network."""
    for job in plan.jobs:
        source = LayerWeight(checkpoint, job.layer)
        source.scan(plan.options.window_rows(source.shape, source.dtype.itemsize, 1))


def _result(
    out: Path,
    manifest: dict[str, Any],
    checkpoint: Checkpoint,
    begun: float,
    resumed: int | None = None,
    already_complete: bool = False,
) -> Compression:
    """resumed : all layers if None"""
    return Compression(
        out=out,
        seconds=time.monotonic() - begun,
        peak_memory_bytes=peak_memory_bytes(),
        resumed=len(manifest["layers"]) if resumed is None else resumed,
        already_complete=already_complete,
        fates=counts_in(manifest["tensors"], checkpoint.has),
        bits_per_weight_outside=manifest.get("bits_per_weight_outside"),
        source=manifest.get("source"),
        **{
            name: manifest[name]
            for name in (
                "weights",
                "bits_per_weight",
                "bits_per_weight_linear",
                "bits_per_weight_model",
                "bytes",
                "layers",
                "tensors",
                "recipe",
            )
        },
    )


def _absolute(out: str | Path) -> Path:
    """The folder itself where OUT is a link, so that the work is done on its disk and the link stays."""
    try:
        path = Path(out).expanduser().absolute()
        resolved = path.resolve()
        return resolved if path.is_symlink() else path
    except (OSError, RuntimeError, ValueError) as error:  # unknown ~user, a loop of links, a NUL byte
        raise OutputError(f"--out {out} is not a usable path: {error}") from None


def check_place(out: Path, checkpoint: Checkpoint, model: str | Path, base_model: str | Path | None = None) -> None:
    """OutputError where an output would stand in the way of what is read, or of the user."""
    run = RunFolder(out).path
    with disk_errors(out):
        target, here = out.resolve(), Path.cwd().resolve()
        is_file = out.exists() and not out.is_dir()
    for what, folder in (("the model that is read", checkpoint.folder), ("the base model", _folder_of(base_model))):
        if folder is not None and (within(folder, out) or within(folder, run)):
            raise OutputError(f"--out {out} holds {what}; choose another folder")
    if within(out, checkpoint.folder) and not Path(model).expanduser().is_file():
        raise OutputError(f"--out {out} lies in the folder of the model that is read; choose a folder outside of it")
    if target == here or target in here.parents:
        raise OutputError(f"--out {out} is the current folder or holds it; choose a folder of its own")
    if is_file:
        raise OutputError(f"--out {out} is a file; choose a folder")


def _name_of(model: str | Path) -> str:
    """A model's name for the record: a hub id as it is, the last part of a path, which says nothing of this machine."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _folder_of(model: str | Path | None) -> Path | None:
    """The folder of a model that is given as one, or as a file in one."""
    if model is None or not (path := Path(model).expanduser()).exists():
        return None
    return path if path.is_dir() else path.parent


def finished_output(
    out: Path, identity: dict[str, Any], overwrite: bool, beside: Collection[str]
) -> dict[str, Any] | None:
    """The manifest if OUT is the finished output of this very command; OutputError if it is something else, or, where
    it is to be replaced, if not all of it is ours."""
    with disk_errors(out):
        held = occupants(out)
    if not held:
        return None
    manifest, run = read_manifest(out), RunFolder(out, same=same_identity)
    if run.publishing and same_identity(run.identity(), identity):
        return None
    same = manifest is not None and same_identity(manifest["identity"], identity)
    if same and (run.published(identity) if overwrite else _readable(out)):
        return manifest
    foreign = first_foreign(out, held, beside, ours=run.publishing)
    if foreign is not None:
        raise OutputError(
            f"--out {out} is not empty and holds {foreign.name}, which featherweight did not write and never replaces; "
            "choose another folder"
        )
    if overwrite:
        return None
    what = "the output of this command, but damaged" if same else "the output of another command"
    raise OutputError(f"--out {out} exists already and is {what}; choose another folder or replace it with --overwrite")


def _readable(out: Path) -> bool:
    """Whether all shards are there and as long as their headers say."""
    try:
        Checkpoint.open(out).close()
    except CheckpointError:
        return False
    return True


def _check_disk(plan: Plan, run: RunFolder, shard_bytes: int) -> None:
    # A shard of a single entry may be larger than shard_bytes.
    shard = min(plan.code_bytes, max(shard_bytes, max(job.nbytes for job in plan.jobs)))
    need = plan.output_bytes + shard + plan.aside_bytes
    with disk_errors(run.path):
        have = shutil.disk_usage(run.path).free + run.store.nbytes
    if have < need:
        raise OutputError(
            f"the disk of {run.path.parent} has {size_text(have)} free, this run needs {size_text(need)}: "
            "free some space or choose another --out"
        )
