"""`feather eval`: one model, or several side by side, measured and compared with their original."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from featherweight.cli.console import claim_json, facts, out_console, quiet_transformers, steps, write_json
from featherweight.system.units import size_text


@dataclass(frozen=True)
class EvalOptions:
    """Arguments of `featherweight.evaluate`."""

    against: str | None
    text: str | None
    conversations: Path | None
    tasks: list[str] | None
    items: int | None
    engine: str
    protocol: str
    context: int | None
    dtype: str
    limit: int | None
    threads: int | None
    device: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Outputs:
    """json : a file for the result; html : a page; record : keep the result in folders of ours, for `feather report`"""

    json: Path | None
    html: Path | None
    record: bool


def run_eval(models: Sequence[str], options: EvalOptions, outputs: Outputs) -> None:
    from featherweight.errors import EvaluationError
    from featherweight.system.threads import thread_count
    from featherweight.tasks.evaluate.evaluation import evaluate_each

    twice = next((model for i, model in enumerate(models) if model in models[:i]), None)
    if twice is not None:
        raise EvaluationError(f"{twice} is named twice: name each model once")
    claim_json(outputs.json, ("perplexity", "protocol"))
    if outputs.html is not None:
        from featherweight.tasks.report.written import claim_page

        claim_page(outputs.html)
    quiet_transformers()
    results, reports = [], []
    with steps("evaluating") as notify:
        chosen = replace(options, threads=thread_count(options.threads))
        for model, result in zip(models, evaluate_each(models, **vars(chosen), progress=notify), strict=True):
            results.append(result)
            reports.append({"model": model, **result.to_json()})
            if outputs.record:
                _record(model, reports[-1])
    write_json(outputs.json, reports[0] if len(reports) == 1 else reports)
    if outputs.html is not None:
        _write_page(outputs.html, reports)
    console = out_console()
    if len(results) == 1:
        console.print(facts(_rows(results[0], reports[0])))
    else:
        console.print(_table(models, results, reports))
        if results[0].answers:
            console.print()
            console.print(_task_table(models, results))
    for description in dict.fromkeys(result.description for result in results):
        console.print(f"protocol: {description}", soft_wrap=True)
    if outputs.html is not None:
        console.print(f"page: {outputs.html}", soft_wrap=True)


def _record(model: str, report: dict[str, Any]) -> None:
    """Keep a result in the folder, without what says something of this machine's folders; a note where that fails."""
    from featherweight.errors import OutputError
    from featherweight.storage.run.record import add_measurement
    from featherweight.system.machine import machine_facts, now_text

    kept = {name: value for name, value in report.items() if name not in ("model", "window_losses", "size")}
    kept["tasks"] = [_without_items(task) for task in report["tasks"]]
    if kept["against"] is not None:
        kept["against"] = Path(kept["against"]).name
    kept |= {"date": now_text(), "machine": machine_facts()}
    try:
        add_measurement(model, "evaluations", kept)
    except OutputError as error:
        print(f"note: the result is not recorded: {error}", file=sys.stderr, flush=True)


def _without_items(task: dict[str, Any]) -> dict[str, Any]:
    """A task's result as it is recorded: what became of each item is for the JSON file alone."""
    scores = {name: {k: v for k, v in score.items() if k != "right"} for name, score in task["scores"].items()}
    return {**task, "scores": scores}


def _write_page(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    from featherweight.tasks.report.page import write_report
    from featherweight.tasks.report.runs import names_of, original_of
    from featherweight.tasks.report.variants import Variant

    names = names_of([Path(report["model"]) for report in reports])
    variants = [Variant(name, report, family=name) for name, report in zip(names, reports, strict=True)]
    against = next((str(report["against"]) for report in reports if report["against"]), None)
    title = "Compressed models" if against is None else Path(against).name
    write_report(path, [*original_of(variants), *variants], model=title)


def _rows(result: Any, report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [*result.rows(), *_control_rows(report["control_tokens"])]
    bits = {name: value for name, value in report["bits_per_weight"].items() if value is not None}
    if bits:
        rows.append(("bits per weight", ", ".join(f"{value:.3f} {name}" for name, value in bits.items())))
    if report["bytes"] is not None:
        rows.append(("size", size_text(report["bytes"])))
    return [*rows, ("time", f"{result.seconds:.1f} s"), ("peak memory", size_text(result.peak_memory_bytes))]


def _table(models: Sequence[str], results: Sequence[Any], reports: Sequence[dict[str, Any]]) -> Table:
    """The original in the first row, if there is one; then a row for each model."""
    from featherweight.tasks.evaluate.result import with_error

    table = Table(box=None, pad_edge=False)
    compared = results[0].perplexity_against is not None
    names = ["model", "bits linear", "bits model", "size", "perplexity"]
    for name in [*names, *(["excess", "KL", "top-1"] if compared else [])]:
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    if compared:
        first = results[0]
        size = "-" if first.size_against is None else size_text(first.size_against.bytes)
        known = with_error(first.perplexity_against, first.perplexity_against_standard_error, 3)
        table.add_row(f"{first.against} (original)", "-", "-", size, known)
    for model, result, report in zip(models, results, reports, strict=True):
        bits = [report["bits_per_weight"][name] for name in ("linear", "model")]
        cells = [model, *("-" if value is None else f"{value:.3f}" for value in bits)]
        cells.append("-" if report["bytes"] is None else size_text(report["bytes"]))
        cells.append(with_error(result.perplexity, result.perplexity_standard_error, 3))
        if result.divergence is not None:
            cells.append(result.excess_text())
            cells.append(with_error(result.divergence.mean, result.divergence.standard_error, 4))
            cells.append(f"{100 * result.divergence.top1_agreement:.1f} %")
        table.add_row(*cells)
    return table


def _task_table(models: Sequence[str], results: Sequence[Any]) -> Table:
    """The original's accuracy in each task, by its first scorer, and under it every model's, with what changed."""
    from featherweight.tasks.evaluate.questions.asking import p_text, share_text

    table = Table(box=None, pad_edge=False)
    compared = results[0].against is not None
    for name in ["task", "model", "accuracy (95 %)", *(["lost", "won", "McNemar p", "kappa"] if compared else [])]:
        left = name in ("task", "model")
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "model")
    for place, task in enumerate(results[0].answers):
        for number, score in enumerate(task.scores):
            name = f"{task.name}, {score.name}"
            if score.against is not None:
                known = share_text(score.against.accuracy, score.against.interval)
                table.add_row(name, f"{results[0].against} (original)", known)
            for model, result in zip(models, results, strict=True):
                own = result.answers[place].scores[number]
                cells = [name, model, share_text(own.accuracy, own.interval)]
                if own.against is not None:
                    cells += [str(own.against.lost), str(own.against.won)]
                    cells.append("-" if own.against.p is None else p_text(own.against.p))
                    cells.append("-" if own.against.kappa is None else f"{own.against.kappa:.3f}")
                table.add_row(*cells)
    return table


def _control_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What was measured at the control tokens of the chat template."""
    if found is None:
        return []

    def number(value: float, error: float | None, digits: int = 5, times: int = 1) -> str:
        return f"{times * value:.{digits}f}" + ("" if error is None else f" ± {times * error:.{digits}f}")

    kl = number(found["kl"], found["kl_standard_error"])
    rest = number(found["kl_elsewhere"], found["kl_elsewhere_standard_error"])
    agreement = number(found["top1_agreement"], found["top1_agreement_standard_error"], 2, 100)
    rows = [
        (
            "control tokens",
            f"{found['positions']} in {found['conversations']} conversations: {', '.join(found['tokens'])}",
        ),
        ("KL divergence at control tokens", f"{kl} nats a token (elsewhere {rest})"),
        ("top-1 agreement there", f"{agreement} % (elsewhere {100 * found['top1_agreement_elsewhere']:.2f} %)"),
    ]
    if found["probability"] is not None:
        given = number(found["probability"], found["probability_standard_error"], 4)
        rows.append(
            (
                "probability of those the original expects",
                f"{given} (the original's {found['probability_against']:.4f}, {found['predicted']} positions)",
            )
        )
    return rows
