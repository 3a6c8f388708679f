"""One's own runs as variants of a report: what their folders say, what was measured of them, and what is not known."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, EvaluationError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.size import measure_size
from featherweight.storage.run.record import read_record
from featherweight.tasks.analyse.levels import pictures_of
from featherweight.tasks.compress.assemble import read_manifest
from featherweight.tasks.report.variants import Variant

PROTOCOL = ("protocol", "context", "stride", "text_sha256", "text_tokens", "tokenizer_sha256", "bos")
"""Perplexities that agree in these can be compared."""


def read_runs(folders: Sequence[str | Path], original: str | Path | None = None) -> list[Variant]:
    """Folders that `compress` wrote, as variants in the order given; before them the original, if a measurement knows
    its perplexity.

    Of the measurements that were recorded, those by the protocol that most of the runs have are taken, the latest of
    each; a run that was measured otherwise is not compared, and says so.

    original : the model that they were made from, for the pictures of weights
    Raises CheckpointError for what is no folder of ours, EvaluationError where one is named twice.
    """
    if not folders:
        raise EvaluationError("a report needs the folder of at least one run")
    places = [_place(folder) for folder in folders]
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        raise EvaluationError(f"{twice[0]} is named twice: name each folder once")
    names = names_of(places)
    records = [read_record(place) for place in places]
    chosen = _most_common(records)
    if original is not None:
        with Checkpoint.open(original):
            pass
    runs = [
        _variant((name, str(given)), place, record, chosen, original)
        for name, given, place, record in zip(names, folders, places, records, strict=True)
    ]
    return [*original_of(runs), *runs]


def names_of(places: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as tell it from the others."""
    depth = 1
    while depth < max((len(place.parts) for place in places), default=1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            break
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _place(folder: str | Path) -> Path:
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise CheckpointError(f"there is no folder {folder}: a report is about folders that `feather compress` wrote")
    if read_manifest(place) is None:
        raise CheckpointError(
            f"{folder} has no featherweight.json, so it is not what `feather compress` wrote: a report is about such "
            "folders"
        )
    return place.resolve()


def _settings(measured: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(measured.get(name)) for name in PROTOCOL)


def _most_common(records: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """The protocol that most runs were measured by; of several the one used last."""
    counted: Counter[tuple[str, ...]] = Counter()
    latest: dict[tuple[str, ...], str] = {}
    for record in records:
        counted.update({_settings(found) for found in record["evaluations"]})
        for found in record["evaluations"]:
            latest[_settings(found)] = max(latest.get(_settings(found), ""), str(found.get("date")))
    return max(counted, key=lambda settings: (counted[settings], latest[settings]), default=None)


def _variant(
    called: tuple[str, str],
    place: Path,
    record: dict[str, Any],
    chosen: tuple[str, ...] | None,
    original: str | Path | None,
) -> Variant:
    """called : its name on the page, and the folder as it was given"""
    name, given = called
    manifest = read_manifest(place) or {}
    made, evaluations, speeds = record["compression"], record["evaluations"], record["speeds"]
    fitting = [found for found in evaluations if _settings(found) == chosen]
    fitting.sort(key=lambda found: (found.get("kl") is not None, str(found.get("date"))))
    evaluation = dict(fitting[-1]) if fitting else {}
    tasks = _tasks_of(evaluations)
    shown = shlex.quote(given)
    missing = []
    if not made:
        missing.append(
            "Time, peak memory, machine and date of the compression are not recorded: an older featherweight made the "
            "folder, or its featherweight-run.json was removed."
        )
    if evaluations and not fitting:
        missing.append("It was measured by another protocol than the others, so its figures are not compared here.")
    elif not evaluations:
        missing.append(f"Its quality was not measured: `feather eval {shown} --against ORIGINAL` records it.")
    elif evaluation.get("kl") is None:
        missing.append(
            f"It was not compared with its original: `feather eval {shown} --against ORIGINAL` adds KL and agreement."
        )
    if not speeds:
        missing.append(f"Its speed was not measured: `feather bench {shown}` records it.")
    if not evaluation:  # sizes are known all the same
        size = measure_size(place)
        evaluation = {"bytes": size.bytes, "bits_per_weight": {"linear": size.linear_bits, "model": size.model_bits}}
    evaluation |= {"tasks": tasks} if tasks else {}
    recipe = manifest.get("recipe")
    return Variant(
        name,
        evaluation,
        {key: value for key, value in manifest.items() if key in ("layers", "bits_per_weight")},
        record={"recipe": recipe.get("name") if isinstance(recipe, dict) else None, **made},
        speed=speeds[-1] if speeds else {},
        recipe=recipe if isinstance(recipe, dict) else {},
        histograms=pictures_of(place, original, ("q_proj", "down_proj")),
        family=name,
        missing=missing,
    )


def _tasks_of(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all measurements, the latest of each task; those beside the original's answers before others."""
    found: dict[str, dict[str, Any]] = {}
    for measured in sorted(evaluations, key=lambda one: (one.get("against") is not None, str(one.get("date")))):
        tasks = measured.get("tasks")
        for task in tasks if isinstance(tasks, list) else ():
            if isinstance(task, dict) and isinstance(task.get("scores"), dict):
                found[str(task.get("setting"))] = task
    return list(found.values())


def _tasks_against(runs: Sequence[Variant]) -> list[dict[str, Any]]:
    """The original's own results, as far as those of others beside them say what they are."""
    found: dict[str, dict[str, Any]] = {}
    for task in (task for run in runs for task in run.tasks):
        scores = {}
        for scorer, score in task["scores"].items():
            if isinstance(score, dict) and score.get("accuracy_against") is not None:
                names = ("accuracy", "interval_low", "interval_high")
                scores[scorer] = {name: score.get(f"{name}_against") for name in names}
        if scores:
            found.setdefault(str(task.get("setting")), {**task, "scores": scores})
    return list(found.values())


def original_of(runs: Sequence[Variant]) -> list[Variant]:
    """The model they come from, as far as a measurement against it says something of it."""
    for run in runs:
        known = run.evaluation
        if known.get("perplexity_against") is not None:
            facts = {"perplexity": known["perplexity_against"], "tokens": known.get("tokens")}
            facts["perplexity_standard_error"] = known.get("perplexity_against_standard_error")
            facts["bytes"] = known.get("bytes_against")
            facts["tasks"] = _tasks_against(runs)
            return [Variant("original", facts, original=True, family="original")]
    return []
