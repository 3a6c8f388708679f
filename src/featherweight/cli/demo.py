"""`feather demo`: the bundled model is compressed with and without data, is measured, writes; a report is made."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from featherweight.cli.console import claim_json, error_console, out_console, quiet_transformers, steps, write_json
from featherweight.cli.fit import show
from featherweight.cli.progress import Watcher
from featherweight.errors import OutputError
from featherweight.system.places import ASSETS
from featherweight.system.units import size_text


def tuning(rate: float) -> str:
    """Scale tuning with few steps, as a change of a recipe."""
    return f"[{{kind: scale-tuning, steps: 40, batch_size: 1, learning_rate: {rate}, precision: auto, checks: 2}}]"


RECIPES = ("rtn-4", "gptq", "rtn-3", "gptq-3", "ptqtp-3", "ptqtp", "trit-2", "ptqtp-1", "trit-1")
TEXT = ("calibration.sequences=32", "calibration.length=512")
# an eighth to a quarter of the presets' text and a third of their tuning, so that the demo takes minutes
SHORTENED: dict[str, tuple[str, ...]] = {
    "gptq": TEXT,
    "gptq-3": TEXT,
    "trit-2": (*TEXT, f"corrections={tuning(5e-3)}"),
    "trit-1": (*TEXT, f"corrections={tuning(1e-2)}"),
}
FIT_BYTES = 3_000_000
"""Of the model that the demo fits: between what trit-1 and trit-2 make."""
FIT: dict[str, Any] = {"windows": 16}
"""How it is fitted: with a quarter of the text."""
HEALED = "ptqtp-1"
HEAL: dict[str, Any] = {"steps": 24, "windows": 128, "held_out": 4, "score": 0}
"""Less than a minute of training against the original, on the shipped text: enough for what was rounded without data.
Of a model that was tuned already it takes more steps, and more text."""
PROMPT = "It was a dark and stormy night, and"
SAMPLE_TOKENS = 60
RESULTS = "demo.json"
PICTURED = ("q_proj", "down_proj")  # layers of the middle block whose weights the report shows


def reference_model() -> Path:
    """Folder of the model that comes with the package."""
    return ASSETS / "reference"


def run_demo(out: Path, tokens: int, threads: int | None, json_file: Path | None = None) -> None:
    from featherweight.methods.recipe import load_recipe
    from featherweight.storage.run.record import read_record
    from featherweight.tasks.analyse.levels import pictures_of
    from featherweight.tasks.compress.compression import compress
    from featherweight.tasks.evaluate.evaluation import evaluate, evaluate_each
    from featherweight.tasks.report.fit_page import write_fit_page
    from featherweight.tasks.report.page import write_report
    from featherweight.tasks.report.variants import Variant

    claim_json(json_file, ("original",))
    quiet_transformers()
    original, say = reference_model(), error_console()
    _claim(out)
    variants = []
    say.print(
        f"the bundled model, {tokens} tokens of its evaluation text, {len(RECIPES)} recipes, a fit and a healing; "
        f"output in {out}"
    )
    with steps("original") as notify:
        measured = evaluate(original, limit=tokens, progress=notify, threads=threads)
    variants.append(Variant("original", measured.to_json(), sample=_sample(original), original=True, family="original"))
    name = f"{HEALED}, healed"
    folders = {recipe: out / recipe for recipe in RECIPES}
    done: dict[str, Any] = {}
    for recipe, folder in folders.items():
        changes = SHORTENED.get(recipe, ())
        with Watcher(say) as watcher:
            done[recipe] = compress(
                original, recipe, folder, changes=changes, threads=threads, overwrite=True, observer=watcher
            )
    found = _fit(original, out / "fit", tokens, threads)
    folders[name] = out / f"{HEALED}-healed"
    done[name] = _heal(original, folders[name], threads)
    with steps("measuring") as notify:  # all at once: the original runs over each window once
        each = evaluate_each([*folders.values()], original, limit=tokens, progress=notify, threads=threads)
        evaluations = dict(zip(folders, each, strict=True))
    for recipe in RECIPES:
        folder, changes = folders[recipe], SHORTENED.get(recipe, ())
        variants.append(
            Variant(
                recipe,
                evaluations[recipe].to_json(),
                done[recipe].to_json(),
                record=read_record(folder)["compression"],
                family=_family(recipe),
                sample=_sample(folder),
                recipe=load_recipe(recipe, changes).dump(),
                histograms=pictures_of(folder, original, PICTURED),
                command=_command(original, recipe, changes, folder),
            )
        )
    variants.append(
        Variant(
            f"fit, {size_text(FIT_BYTES)}",
            found.evaluation.to_json(),
            {**found.compression.to_json(), "seconds": found.seconds},
            record=read_record(found.out)["compression"],
            family="fit",
            sample=_sample(found.out),
            histograms=pictures_of(found.out, original, PICTURED),
            command=f"feather fit {os.path.relpath(original)} --size {FIT_BYTES} --out {found.out}",
        )
    )
    variants.append(_healed(original, name, folders[name], done[name], evaluations[name]))
    results = {v.name: {"evaluation": v.evaluation, "compression": v.compression} for v in variants}
    write_json(out / RESULTS, results)
    write_json(json_file, results)
    report = write_report(
        out / "report.html", variants, model="The bundled reference model", prompt=PROMPT, commands=["feather demo"]
    )
    _show(variants, report)
    out_console().print()
    show(found)
    page = write_fit_page(out / "fit.html", found.to_json(), "The bundled reference model")
    out_console().print(f"\nwhat other sizes would give: {page}", soft_wrap=True)


def _fit(original: Path, out: Path, tokens: int, threads: int | None) -> Any:
    """The best model of so many bytes, with little text; what is measured stays beside it."""
    from featherweight.tasks.fit.fitting import fit
    from featherweight.tasks.fit.settings import FitSettings

    settings = FitSettings(score=tokens, **FIT)
    with Watcher(error_console()) as watcher:
        return fit(
            original, out, FIT_BYTES, settings=settings, work=out.with_name("fit-measured"), threads=threads,
            overwrite=True, observer=watcher,
        )  # fmt: skip


def _healed(original: Path, name: str, folder: Path, done: Any, measured: Any) -> Any:
    """What the report shows of the healed model."""
    from featherweight.storage.run.record import read_record
    from featherweight.tasks.analyse.levels import pictures_of
    from featherweight.tasks.report.variants import Variant

    small = folder.with_name(HEALED)
    return Variant(
        name,
        measured.to_json(),
        {**done.to_json(), "seconds": done.seconds},
        record=read_record(folder)["compression"],
        family=_family(HEALED),
        sample=_sample(folder),
        histograms=pictures_of(folder, original, PICTURED),
        command=f"feather heal {small} --against {os.path.relpath(original)} --steps {HEAL['steps']} --out {folder}",
    )


def _heal(original: Path, folder: Path, threads: int | None) -> Any:
    """A compressed model that lies beside `folder`, trained for a minute against the original."""
    from featherweight.tasks.heal.healing import heal
    from featherweight.tasks.heal.settings import HealSettings

    small = folder.with_name(HEALED)
    with Watcher(error_console()) as watcher:
        return heal(
            small, original, folder, settings=HealSettings(**HEAL), threads=threads, overwrite=True, observer=watcher
        )


def _command(original: Path, recipe: str, changes: tuple[str, ...], folder: Path) -> str:
    """The command line that makes a variant again."""
    settings = "".join(f" --set {shlex.quote(change)}" for change in changes)
    return f"feather compress {os.path.relpath(original)} --recipe {recipe}{settings} --out {folder}"


def _claim(out: Path) -> None:
    """Make the demo's folder; one that holds something else is left alone. What lies beside our files stays."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; choose a folder")
    if out.exists() and any(out.iterdir()) and not _is_results(out / RESULTS):
        raise OutputError(f"--out {out} exists and is not the output of a demo; choose another folder")
    write_json(out / RESULTS, {})


def _is_results(path: Path) -> bool:
    """Whether a file holds what a demo measured, or was about to."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    runs = found.values() if isinstance(found, dict) else (None,)
    return all(isinstance(run, dict) and run.keys() == {"evaluation", "compression"} for run in runs)


def _family(recipe: str) -> str:
    """What shares a colour in the report."""
    families = {"rtn": "RTN", "gptq": "GPTQ", "trit": "trit-2, trit-1"}
    return families.get(recipe.partition("-")[0], "PTQTP")


def _sample(folder: Path) -> str:
    """What a model writes after the prompt, greedily."""
    import torch

    from featherweight.integrations.load import load

    model, tokenizer = load(folder, dtype="float32", cache=True)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            repetition_penalty=1.3,
            pad_token_id=tokenizer.eos_token_id,
        )
    return PROMPT + str(tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def _show(variants: list[Any], report: Path) -> None:
    table = Table(box=None, pad_edge=False)
    names = (
        "variant",
        "bits linear",
        "bits model",
        "on disk",
        "perplexity",
        "excess",
        "KL",
        "top-1",
        "error",
        "seconds",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "variant" else "right")
    base = variants[0].perplexity
    for variant in variants:
        measured, made = variant.evaluation, variant.compression
        bits = measured["bits_per_weight"]
        layers = [layer for layer in made.get("layers", ()) if layer["block"] is not None]  # the linear ones
        table.add_row(
            variant.name,
            f"{bits['linear']:.3f}",
            f"{bits['model']:.3f}",
            size_text(measured["bytes"]),
            f"{variant.perplexity:.3f}",
            f"{100 * (variant.perplexity / base - 1):+.2f} %",
            "-" if measured["kl"] is None else f"{measured['kl']:.4f}",
            "-" if measured["top1_agreement"] is None else f"{100 * measured['top1_agreement']:.1f} %",
            f"{sum(x['relative_error'] for x in layers) / len(layers):.4f}" if layers else "-",
            f"{made['seconds']:.1f}" if made else "-",
        )
    console = out_console()
    console.print(table)
    console.print(f"protocol: {variants[0].evaluation['description']}", soft_wrap=True)
    for variant in variants:
        console.print(f"\n{variant.name}: {variant.sample}", soft_wrap=True)
    console.print(f"\nreport: {report}", soft_wrap=True)
