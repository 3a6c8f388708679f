"""`fit`: the best model in so many bytes."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError, OutputError
from featherweight.events import Observer, silent
from featherweight.interop.exporting import check_place as check_free
from featherweight.methods.recipe import Recipe, recipe_from
from featherweight.model.network.source import open_source
from featherweight.model.text.windows import windows_digest
from featherweight.pages.notebook import progress_here
from featherweight.registry import find
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.storage.run.ownership import first_foreign
from featherweight.storage.run.publishing import occupants
from featherweight.system.files import disk_errors, sha256_of, to_json, write_text
from featherweight.system.locks import FileLock
from featherweight.system.places import cache_folder
from featherweight.system.threads import use_threads
from featherweight.tasks.compress.account import accounted_anatomy
from featherweight.tasks.compress.assemble import read_manifest
from featherweight.tasks.compress.compression import check_place
from featherweight.tasks.compress.data import chosen_text, text_windows
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.result import Evaluation
from featherweight.tasks.fit.choosing import Problem
from featherweight.tasks.fit.ggml import GgmlStudy, make_gguf
from featherweight.tasks.fit.making import Made, make_folder
from featherweight.tasks.fit.result import Fit, FrontPoint, LayerChoice
from featherweight.tasks.fit.settings import FitSettings
from featherweight.tasks.fit.study import Study
from featherweight.tasks.fit.ways import NAME, Chosen, end_ways, recipe_of

POINTS = 16
"""Of the front."""
CPU = torch.device("cpu")
RESULT = "featherweight-fit.json"


def fit(
    model: str | Path,
    out: str | Path,
    budget: int | None = None,
    *,
    settings: FitSettings | None = None,
    calibration: Any = None,
    text: str | Path | None = None,
    work: str | Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Fit:
    """Make the best model of at most `budget` bytes: every choice competes for every layer.

    What each way costs in each layer, and how much of the predictions hangs on each layer, is measured once and kept
    in the cache; then bytes are given out, the choice is tried on the true model and corrected, and the model is made
    by the recipe that says so, as `compress` would. Killed at any moment, the same call goes on.

    Parameters
    ----------
    model : str or Path
        A folder, a file or a hub id.
    out : str or Path
        Folder to make; with `settings.target` the file.
    budget : int
        Most bytes of the weight files of the result, headers and all; None where `settings.pools` say what layers may
        take.
    settings : FitSettings, optional
    calibration : optional
        Text to calibrate with, as for `compress`; default: the shipped text.
    text : str or Path, optional
        Held-out text on which the result is compared with the original; default: the bundled one.
    work : str or Path, optional
        Folder in which what is measured is kept; default: in the cache, by model and text.
    threads : int, optional
        Of native kernels and PyTorch.
    overwrite : bool
        Replace an existing output of featherweight's.
    trust_remote_code : bool
        Run the code that the model's folder brings for its class or tokenizer.
    observer : callable, optional
        Called with every event, as for `compress`.

    Returns
    -------
    Fit

    Raises
    ------
    FeatherError
        The budget cannot be met; the text says what can. Otherwise as `compress`.
    """
    settings, observer = settings or FitSettings(), observer or progress_here("fitting") or silent
    if (budget is None) == (not settings.pools):
        raise FeatherError("a fit needs a budget for the whole model, or pools for its layers, and not both")
    find("sensitivity", settings.sensitivity)  # says now, and not after all the measuring, that there is none
    begun, out = time.monotonic(), Path(out).expanduser()
    with open_source(model, trust_remote_code) as checkpoint, use_threads(threads):
        if not settings.gguf:
            check_place(out, checkpoint, model)
            _check_held(out, checkpoint, overwrite)
        else:
            check_free(out, checkpoint.folder)
        base = _base(checkpoint, settings)
        plan = make_plan(checkpoint, base)
        windows = None if settings.data_free else _windows(checkpoint, base, calibration, out, observer)
        folder = _folder(work, checkpoint, windows, settings)
        with FileLock(folder / "lock", make_folder=True) as lock:
            lock.acquire(wait=True)
            kind = GgmlStudy if settings.gguf else Study
            study = kind(model, checkpoint, plan, settings, windows, calibration, folder, observer)
            problem = study.measured()
            linear = study.check(problem)
            options = {"calibration": None if settings.data_free else calibration, "threads": threads}
            options |= {"trust_remote_code": trust_remote_code, "observer": observer, "seed": settings.seed}
            if isinstance(study, GgmlStudy):
                made = make_gguf(study, problem, budget, out)
            else:
                made = make_folder(study, problem, budget, out, overwrite=overwrite, **options)
        scores = None
        if settings.score:
            scores = evaluate(
                out, model, text, limit=settings.score, threads=threads, trust_remote_code=trust_remote_code
            )
        result = replace(
            _result(study, problem, made, budget, scores), linear_model=linear, seconds=time.monotonic() - begun
        )
    write_text(out.with_name(out.name + ".json") if out.is_file() else out / RESULT, to_json(result.to_json()))
    return result


def _check_held(out: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    """OutputError now, and not after all the measuring, for what `compress` would not replace."""
    with disk_errors(out):
        held = occupants(out)
    foreign = first_foreign(out, held, [path.name for path in checkpoint.other_files()]) if held else None
    if foreign is not None:
        raise OutputError(
            f"--out {out} is not empty and holds {foreign.name}, which featherweight did not write and never replaces; "
            "choose another folder"
        )
    made = (read_manifest(out) or {}).get("recipe", {}).get("name") if held else NAME
    if made != NAME and not overwrite:
        raise OutputError(
            f"--out {out} exists already and is the output of another command; choose another folder or replace it "
            "with --overwrite"
        )


def _base(checkpoint: Checkpoint, settings: FitSettings) -> Recipe:
    """A recipe that treats whatever a fit chooses for: all layers, and the ends where the model has them apart."""
    anatomy, _, _ = accounted_anatomy(checkpoint)
    layers = dict.fromkeys((layer.name for layer in anatomy.layers), settings.choices[0])
    ends, way = {}, end_ways()[-1]
    if settings.target == "vllm":  # reads them plain
        return recipe_from(recipe_of(Chosen(layers, {}), settings.calibration, data=not settings.data_free), NAME)
    if anatomy.embedding is not None and checkpoint.config.get("is_encoder_decoder") is not True:
        ends["embedding"] = way
    if anatomy.head is not None or (anatomy.tied_head is not None and ends):
        ends["head"] = way
    chosen = Chosen(layers, ends)
    return recipe_from(recipe_of(chosen, settings.calibration, data=not settings.data_free), NAME)


def _windows(checkpoint: Checkpoint, base: Recipe, calibration: Any, out: Path, notify: Observer) -> Tensor:
    mixture = chosen_text(calibration, base.calibration)
    mixture.check()
    return text_windows(checkpoint, mixture, base.calibration, out, CPU, notify)


def _folder(work: str | Path | None, checkpoint: Checkpoint, windows: Tensor | None, settings: FitSettings) -> Path:
    """Where what is measured of this model with this text is kept: a folder of its own within `work` or the cache."""
    text = "data-free" if windows is None else windows_digest(windows)
    about = f"{checkpoint.identity()} {sample_digest(checkpoint)} {text} {settings.seed}"
    place = cache_folder() / "fit" if work is None else Path(work).expanduser()
    return place / f"{checkpoint.folder.resolve().name[:40]}-{sha256_of(about)[:16]}"


def _result(study: Study, problem: Problem, made: Made, budget: int | None, scores: Evaluation | None) -> Fit:
    divergence = None if scores is None or scores.divergence is None else scores.divergence.mean
    layers = []
    for layer in study.layers:
        one = problem.measured[layer.name][made.chosen[layer.name]]
        bits, cost = 8 * one.nbytes / layer.parameters, problem.worth[layer.name] * one.error
        layers.append(LayerChoice(layer.name, layer.role, layer.block, one.way.name, one.nbytes, bits, cost))
    refined = made.refined
    return Fit(
        out=made.out,
        bytes=made.nbytes,
        budget=budget,
        parameters=study.plan.parameters,
        layers=tuple(layers),
        front=_front(study, problem, made, scores),
        recipe=made.recipe,
        kl=divergence,
        perplexity=None if scores is None else scores.perplexity,
        perplexity_of_original=None if scores is None else scores.perplexity_against,
        predicted_kl=problem.cost(made.chosen) if refined is not None else None,
        assembled_kl=None if refined is None else refined.divergence,
        unrefined_kl=None if refined is None else refined.before,
        uniform_kl=None if refined is None else refined.uniform,
        notes=tuple(study.notes),
        sensitivity=study.measure.kind,
        tokens_per_second=1 / problem.taken_seconds(made.chosen) if problem.seconds else None,
        compression=made.compression,
        evaluation=scores,
        tensor_types=made.tensor_types,
    )


def _front(study: Study, problem: Problem, made: Made, scores: Evaluation | None) -> tuple[FrontPoint, ...]:
    """Sizes with what is to be expected of them: predictions, times what the measured model has of its own."""
    own = problem.cost(made.chosen)
    kl = own if scores is None or scores.divergence is None else scores.divergence.mean
    scale = kl / own if own > 0 else 1.0
    original = None if scores is None else scores.perplexity_against
    excess = 0.0
    if scores is not None and scores.log_ratio is not None and kl > 0:
        excess = max(0.0, scores.log_ratio) / kl  # log of the perplexities' ratio, a nat of divergence
    points = [
        FrontPoint(made.nbytes, kl, None if scores is None else scores.perplexity, True),
    ]
    for chosen in problem.front(POINTS):
        size, predicted = study.file_bytes(problem, chosen), scale * problem.cost(chosen)
        perplexity = None if original is None else original * math.exp(excess * predicted)
        points.append(FrontPoint(size, predicted, perplexity))
    points.sort(key=lambda point: (point.bytes, -point.kl))
    kept: list[FrontPoint] = []
    for point in points:  # what is made has gained by sweeps and descents on the way: points it beats are none
        while kept and not kept[-1].chosen and kept[-1].kl <= point.kl and point.chosen:
            kept.pop()
        if not kept or point.chosen or point.kl < kept[-1].kl:
            kept.append(point)
    return tuple(kept)
