"""`compress`: the whole line, one layer at a time, without ever building the model."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featherweight import __version__
from featherweight.checkpoint.checkpoint import Checkpoint
from featherweight.checkpoint.weights import LayerWeight, sample_digest, scan_tensor
from featherweight.checkpoint.writer import disk_errors, to_json, write_text
from featherweight.codes import Code
from featherweight.compress.assemble import jobs_to_write, lay_out, read_manifest, write_rest, write_shards
from featherweight.compress.events import Events, Observer
from featherweight.compress.plan import SHARD_BYTES, Job, Plan, describe_code, make_plan, parse_size
from featherweight.compress.run import RunFolder, occupants
from featherweight.errors import CheckpointError, FeatherError, OutputError, RecipeError
from featherweight.kernels.errors import squared_errors
from featherweight.kernels.library import thread_count
from featherweight.memory import peak_memory_bytes, reset_peak_memory
from featherweight.quantize.base import HeldWeight, SolveOptions, WeightSource
from featherweight.quantize.recipe import Recipe, load_recipe

ERROR_ROWS = 40  # whole bytes of every packing
ERROR_WINDOW = 4 << 20  # bytes


@dataclass(frozen=True)
class Compression:
    """The result of `compress`.

    layers : per layer name, code, spec, bits_per_weight, relative_error (Frobenius, of what is stored), nbytes
    resumed : layers found finished by an earlier run of the same command
    """

    out: Path
    seconds: float
    peak_memory_bytes: int
    weights: int
    bits_per_weight: float
    bits_per_weight_linear: float
    bits_per_weight_model: float
    bytes: int
    layers: list[dict[str, Any]] = field(repr=False)
    tensors: dict[str, Any]
    recipe: dict[str, Any] = field(repr=False)
    resumed: int = 0
    already_complete: bool = False

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"out": str(self.out)}


def compress(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    calibration: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    observer: Observer | None = None,
) -> Compression:
    """Compress a checkpoint.

    Parameters
    ----------
    model : folder of safetensors files, a single such file, or a hub id
    recipe : preset name, YAML file or Recipe
    out : folder to make; while the work lasts OUT.feather-run stands beside it, and OUT.log.jsonl records events
    changes : like "grid.planes=3", applied to the recipe
    calibration : text for recipes that declare statistics; data-free recipes do not read it
    threads : of native kernels; results do not depend on it
    seed : for recipes with random choices; part of the run's identity
    max_memory : bytes or "2GB"; a limit on resident memory that is planned for, with an error if it cannot be met
    overwrite : replace an existing output or another unfinished run
    observer : called with every event that goes to the log

    Called again after an interruption, it goes on; called again when complete, it returns at once.
    Raises the errors of `featherweight.errors`.
    """
    begun = time.monotonic()
    reset_peak_memory()
    out = _absolute(out)
    chosen = load_recipe(recipe, tuple(changes))
    if chosen.needs:
        raise RecipeError(
            f"recipe {chosen.name} needs statistics ({', '.join(chosen.needs)}) that nothing here gathers"
        )
    if chosen.transforms:
        kinds = ", ".join(transform.kind for transform in chosen.transforms)
        raise RecipeError(f"recipe {chosen.name} asks for transforms ({kinds}), which the data-free run does not apply")
    if calibration is not None and not Path(calibration).is_file():
        raise FeatherError(f"there is no calibration file {calibration}")
    if shard_bytes < 1:
        raise FeatherError(f"shard_bytes must be positive, not {shard_bytes}")
    limit = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    with Checkpoint.open(model) as checkpoint, _threads(threads):
        _check_out(out, checkpoint)
        identity = {
            "source": checkpoint.identity(),
            "weights": sample_digest(checkpoint),
            "recipe": chosen.dump(),
            "seed": seed,
            "shard_bytes": shard_bytes,
            "featherweight": __version__,
        }
        done = _finished(out, identity, overwrite)
        if done is not None:
            RunFolder(out).remove_leftover(identity)
            return _result(out, done, begun, resumed=len(done["layers"]), already_complete=True)
        plan = make_plan(checkpoint, chosen, threads, limit)
        with RunFolder.opened(out, identity, overwrite) as run:
            done = _finished(out, identity, overwrite)  # once more: another process may have been at work until now
            if done is not None:
                return _result(out, done, begun, resumed=len(done["layers"]), already_complete=True)
            with Events(out, observer) as events:
                events({"event": "plan", **plan.summary(), "out": str(out), "threads": thread_count(threads)})
                resumed = _make(plan, checkpoint, run, events, identity, shard_bytes)
                manifest = read_manifest(out)
                assert manifest is not None
                result = _result(out, manifest, begun, resumed)
                short = {k: v for k, v in result.to_json().items() if k not in ("layers", "recipe")}
                events({"event": "done", **short})
    return result


def _make(
    plan: Plan, checkpoint: Checkpoint, run: RunFolder, events: Events, identity: dict[str, Any], shard_bytes: int
) -> int:
    """All the work there is left to do; returns how many layers were found finished."""
    resumed = len(plan.jobs)
    if not run.publishing:
        assembly = run.read_assembly()
        if assembly is None:
            _check_disk(plan, run, shard_bytes)
            for name in plan.copied:
                scan_tensor(checkpoint, name)
            records, resumed = _solve_all(plan, checkpoint, run, events)
            assembly = lay_out(plan, checkpoint, records, shard_bytes)
            write_text(run.assembly, to_json(assembly))
        else:
            for index in jobs_to_write(run, assembly):
                if run.record(index, plan.jobs[index].layer.name) is None:
                    _solve(plan, plan.jobs[index], checkpoint, run, index)
                    resumed -= 1
        write_shards(
            run, assembly, checkpoint, lambda f, i, n: events({"event": "shard", "file": f, "number": i, "of": n})
        )
        write_rest(run, assembly, checkpoint, plan, identity)
    run.publish()
    return resumed


def _solve_all(plan: Plan, checkpoint: Checkpoint, run: RunFolder, events: Events) -> tuple[list[dict[str, Any]], int]:
    """Every layer's record, from its artifact or from work."""
    records: list[dict[str, Any]] = []
    resumed = worked = 0
    started = time.monotonic()
    for index, job in enumerate(plan.jobs):
        record = run.record(index, job.layer.name)
        known = record is not None
        if record is None:
            record = _solve(plan, job, checkpoint, run, index)
            worked += job.layer.parameters
        else:
            resumed += 1
        records.append(record)
        seconds = time.monotonic() - started
        left = sum(j.layer.parameters for j in plan.jobs[index + 1 :])
        events(
            {
                "event": "layer",
                "number": index + 1,
                "of": len(plan.jobs),
                "resumed": known,
                "weights": job.layer.parameters,
                "weights_per_second": worked / seconds if worked else None,
                "seconds_left": left * seconds / worked if worked else None,
                "peak_memory_bytes": peak_memory_bytes(),
                **{k: v for k, v in record.items() if k != "spec"},
            }
        )
    return records, resumed


def _solve(plan: Plan, job: Job, checkpoint: Checkpoint, run: RunFolder, index: int) -> dict[str, Any]:
    source = LayerWeight(checkpoint, job.layer)
    source.scan(plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
    try:
        code = plan.recipe.rounding.quantize_source(source, job.grid, {}, plan.options)
        for correction in plan.recipe.corrections:
            code = correction.correct(source.rows(0, source.shape[0]).float(), code, {})
    except (RecipeError, ValueError) as error:
        raise RecipeError(f"layer {job.layer.name} cannot be compressed: {error}") from error
    missed = relative_error(source, code, plan.options.threads)
    if not math.isfinite(missed):
        raise RecipeError(
            f"the code of layer {job.layer.name} is not finite: its weights reach {source.largest:.3g}, which is more "
            "than the recipe can store; set the grid's scale_dtype to auto or float32, or skip the layer"
        )
    record = {
        "name": job.layer.name,
        "role": job.layer.role,
        "block": job.layer.block,
        "code": describe_code(code.spec),
        "spec": code.spec,
        "bits_per_weight": code.bits_per_weight,
        "nbytes": code.nbytes,
        "relative_error": missed,
    }
    run.keep(index, code, record)
    return record


def relative_error(source: WeightSource, code: Code, threads: int | None = None) -> float:
    """||W - decode(code)|| / ||W|| (Frobenius); 0 for a zero matrix.

    Sums of rows in float64 and an exact sum of these, so that it depends on neither windows nor threads.
    """
    rows = source.shape[0]
    step = SolveOptions(window_bytes=ERROR_WINDOW).window_rows(source.shape, 4, ERROR_ROWS)
    missed: list[float] = []
    total: list[float] = []
    for first in range(0, rows, step):
        last = min(rows, first + step)
        far, all_of_it = squared_errors(source.rows(first, last), code.decode_rows(first, last), threads)
        missed += far.tolist()
        total += all_of_it.tolist()
        source.release(first, last)
    source.release(0, rows)  # the system maps some pages around each fault, also behind the window
    norm = math.fsum(total)
    return math.sqrt(math.fsum(missed) / norm) if norm else 0.0


def _result(
    out: Path, manifest: dict[str, Any], begun: float, resumed: int, already_complete: bool = False
) -> Compression:
    return Compression(
        out=out,
        seconds=time.monotonic() - begun,
        peak_memory_bytes=peak_memory_bytes(),
        resumed=resumed,
        already_complete=already_complete,
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


def _check_out(out: Path, checkpoint: Checkpoint) -> None:
    with disk_errors(out):
        source, target, here = checkpoint.folder.resolve(), out.resolve(), Path.cwd().resolve()
        is_file = out.exists() and not out.is_dir()
    if target == source or target in source.parents:
        raise OutputError(f"--out {out} holds the model that is read; choose another folder")
    if target == here or target in here.parents:
        raise OutputError(f"--out {out} is the current folder or holds it; choose a folder of its own")
    if is_file:
        raise OutputError(f"--out {out} is a file; choose a folder")


def _finished(out: Path, identity: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The manifest if OUT is the finished output of this very command; OutputError if it is something else."""
    with disk_errors(out):
        if not occupants(out):
            return None
    manifest, run = read_manifest(out), RunFolder(out)
    if run.publishing and run.identity() == identity:
        return None
    same = manifest is not None and manifest["identity"] == identity
    if overwrite:
        return manifest if same and run.published(identity) else None
    if not same:
        what = "not empty" if manifest is None else "the output of another command"
    elif _readable(out):
        return manifest
    else:
        what = "the output of this command, but damaged"
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
    need = plan.output_bytes + shard
    with disk_errors(run.path):
        have = shutil.disk_usage(run.path).free + sum(p.stat().st_size for p in run.artifacts.iterdir())
    if have < need:
        raise OutputError(
            f"the disk of {run.path.parent} has {have / 1e6:,.1f} MB free, this run needs {need / 1e6:,.1f} MB: "
            "free some space or choose another --out"
        )


class _threads:
    """Set torch's threads for a while."""

    def __init__(self, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise FeatherError(f"--threads must be at least 1, not {threads}")
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(thread_count(self.threads))

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def estimate_seconds(plan: Plan, sample: tuple[int, int] = (320, 4096)) -> float:
    """Seconds of computing for a plan, disk not counted: each distinct grid is timed on a Gaussian sample."""
    rates: dict[str, float] = {}
    seconds = 0.0
    for job in plan.jobs:
        key = json.dumps(job.grid.settings(), sort_keys=True)
        if key not in rates:
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(sample, generator=generator).mul_(0.02).bfloat16()
            plan.recipe.rounding.quantize_source(HeldWeight(weight[:20]), job.grid, {}, plan.options)  # warm up
            begun = time.perf_counter()
            code = plan.recipe.rounding.quantize_source(HeldWeight(weight), job.grid, {}, plan.options)
            relative_error(HeldWeight(weight), code, plan.options.threads)
            rates[key] = (time.perf_counter() - begun) / weight.numel()
        seconds += rates[key] * job.layer.parameters
    return seconds
