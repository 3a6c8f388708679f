"""`feather export` and `feather check`: a model for other programs, and whether they run it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from featherweight.cli.console import WrongUse, claim_json, facts, out_console, say, steps, write_json
from featherweight.errors import FeatherError
from featherweight.interop.exports import Verdict
from featherweight.system.units import count_text, size_text

MEGABYTE = 1_000_000


def run_export(model: str, to: str, out: Path, changes: list[str], threads: int | None, json: Path | None) -> None:
    from featherweight.interop.exporting import export
    from featherweight.system.threads import use_threads

    claim_json(json, ("file", "format", "tensors"))
    settings = _settings(changes)
    with use_threads(threads), steps(f"writing {to}, MB") as notify:
        made = export(
            model, to, out, settings=settings, told=lambda done, total: notify(done // MEGABYTE, total // MEGABYTE)
        )
    rows = _kinds(made.verdicts)
    write_json(
        json,
        {
            "file": str(made.path),
            "format": to,
            "settings": settings,
            "bytes": made.bytes,
            "tensors": [asdict(verdict) for verdict in made.verdicts],
        },
    )
    console = out_console()
    exact = sum(verdict.fate == "exact" for verdict in made.verdicts)
    console.print(
        facts(
            [
                ("output", str(made.path)),
                ("format", to),
                ("size", size_text(made.bytes)),
                ("tensors", f"{len(made.verdicts)}, {exact} of them with the very same values"),
            ]
        )
    )
    console.print(_table(rows))


def _settings(changes: list[str]) -> dict[str, Any]:
    """`type=q8_0 lossless=true` as values."""
    settings: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise WrongUse(f"a setting is written --set KEY=VALUE, like --set type=q8_0, but is {change!r}")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[name] = value
    return settings


def _kinds(verdicts: Iterable[Verdict]) -> dict[tuple[str, str, str], list[Verdict]]:
    """Verdicts by what tensors become, how exactly, and why."""
    kinds: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        kinds.setdefault((verdict.becomes, verdict.fate, verdict.why), []).append(verdict)
    return kinds


def _table(kinds: dict[tuple[str, str, str], list[Verdict]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("type", "tensors", "bits", "values", "largest error", "why"):
        table.add_column(name, justify="right" if name in ("tensors", "bits", "largest error") else "left")
    for (becomes, fate, why), found in kinds.items():
        errors = [verdict.error for verdict in found if verdict.error is not None]
        table.add_row(
            becomes,
            count_text(len(found)),
            f"{found[0].bits:.4g}",
            fate,
            "-" if fate == "exact" or not errors else f"{max(errors):.2g}",
            why,
        )
    return table


def run_check(model: str, target: str, tensor_parallel: int, json: Path | None) -> None:
    from featherweight.interop.engines import Target
    from featherweight.interop.stored import StoredModel
    from featherweight.registry import find

    claim_json(json, ("target", "runs", "reasons"))
    chosen: type[Target] = find("target", target)
    with StoredModel(model) as stored:
        answer = chosen.ask(stored, tensor_parallel)
    write_json(json, {"model": model, "target": target, **asdict(answer)})
    say(f"{chosen.title}: {'runs it' if answer.runs else 'does not run it'}; {answer.how}")
    for reason in answer.reasons:
        say(f"  {reason}")
    if not answer.runs:
        raise FeatherError(f"{chosen.title} does not run {model}")
