"""What the commands do: call the library, show the result as tables, write JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from featherweight.cli.console import (
    claim_json,
    error_console,
    facts,
    note,
    out_console,
    say,
    steps,
    write_json,
)
from featherweight.cli.progress import Watcher
from featherweight.system.units import count_text, parse_size, size_text, time_text


@dataclass(frozen=True)
class CompressOptions:
    """Keywords of `featherweight.compress`."""

    changes: list[str]
    calibration: str | None
    base_model: str | None
    threads: int | None
    device: str
    seed: int
    max_memory: str | None
    max_device_memory: str | None
    overwrite: bool
    trust_remote_code: bool
    workers: int


def run_compress(model: str, recipe: str, out: Path, options: CompressOptions, json: Path | None) -> None:
    from featherweight.tasks.compress.compression import compress
    from featherweight.tasks.compress.fates import counts_text

    claim_json(json, ("out", "layers", "recipe"))
    with Watcher(error_console()) as watcher:
        result = compress(model, recipe, out, **vars(options), observer=watcher)
    write_json(json, result.to_json())
    worst = max(result.layers, key=lambda record: record["relative_error"])
    console = out_console()
    if result.already_complete:
        console.print(f"{result.out} is complete already; nothing to do")
    console.print(
        facts(
            [
                ("output", str(result.out)),
                ("recipe", result.recipe["name"]),
                ("bits per weight, compressed layers", f"{result.bits_per_weight:.3f}"),
                ("bits per weight, all linear layers", f"{result.bits_per_weight_linear:.3f}"),
                *_outside_bits(result.bits_per_weight_outside),
                ("bits per weight, whole model", f"{result.bits_per_weight_model:.3f}"),
                ("size", size_text(result.bytes)),
                ("source tensors", f"{result.tensors['source']}: {counts_text(result.fates)}"),
                ("largest relative error", f"{worst['relative_error']:.4f} ({worst['name']})"),
                *result.loss_before,
                ("layers found finished", f"{result.resumed} of {len(result.layers)}"),
                ("time", time_text(result.seconds)),
                ("peak memory", size_text(result.peak_memory_bytes)),
            ]
        )
    )


@dataclass(frozen=True)
class PlanOptions:
    """Those of `CompressOptions` that change a plan."""

    changes: list[str]
    threads: int | None
    max_memory: str | None
    device: str
    max_device_memory: str | None
    trust_remote_code: bool


def run_plan(model: str, recipe: str, options: PlanOptions, json: Path | None) -> None:
    from featherweight.methods.recipe import load_recipe
    from featherweight.model.network.source import open_source
    from featherweight.system.devices import device_named
    from featherweight.tasks.compress.allocate import Measuring, allocated, can_measure
    from featherweight.tasks.compress.device_memory import placed
    from featherweight.tasks.compress.device_share import limit_on
    from featherweight.tasks.compress.estimate import estimate_seconds
    from featherweight.tasks.compress.fates import counts_text
    from featherweight.tasks.compress.plan import make_plan

    claim_json(json, ("recipe", "roles", "seconds"))
    chosen = load_recipe(recipe, options.changes)
    runs_on = device_named(options.device)
    device_limit = limit_on(runs_on, options.device, options.max_device_memory)
    with open_source(model, options.trust_remote_code) as checkpoint:
        limit = parse_size(options.max_memory, "--max-memory") if options.max_memory else None
        made = make_plan(checkpoint, chosen, options.threads, limit)
        if made.candidates and can_measure(made, Measuring()):
            with steps("measuring layers") as notify:
                made = allocated(
                    made, checkpoint, Measuring(), lambda e: notify(e["step"], e["of"]) if "step" in e else None
                )
        _, share = placed(made, checkpoint, runs_on, device_limit)
    share.check()
    for text in made.notes:
        note(text)
    summary = {**made.summary(), **share.facts(), "device": str(runs_on), "seconds": estimate_seconds(made)}
    write_json(json, summary)
    console = out_console()
    console.print(
        facts(
            [
                ("recipe", summary["recipe"]),
                ("family", f"{summary['family']}, {summary['blocks']} blocks"),
                ("parameters", f"{summary['parameters']:,}"),
                ("source tensors", counts_text(summary["tensors"])),
                ("weights compressed", f"{summary['weights']:,} in {summary['layers']} layers"),
                (
                    "bits per weight",
                    f"{summary['bits_per_weight']:.3f} ({summary['bits_per_weight_model']:.3f} whole model)",
                ),
                *_outside_bits(summary["bits_per_weight_outside"]),
                ("size", _planned_size(summary)),
                ("disk while working", size_text(summary["disk_bytes"])),
                ("memory", _memory_text(summary["memory_bytes"], made.recipe.calibrated and not limit)),
                *_device_memory(share),
                ("time", f"about {time_text(summary['seconds'])} ({_time_note(made)})"),
                ("needs", ", ".join(summary["needs"]) or "no data"),
            ]
        )
    )
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "code", "count", "weights", "bits", "size"):
        table.add_column(name, justify="left" if name in ("layer", "code") else "right")
    for row in summary["roles"]:
        table.add_row(
            row["role"],
            row["code"],
            str(row["layers"]),
            count_text(row["weights"]),
            f"{row['bits_per_weight']:.3f}",
            size_text(row["bytes"]),
        )
    console.print(table)


def _planned_size(summary: dict[str, Any]) -> str:
    """Bytes before and after, and what is known of the latter."""
    known = {"at most": "at most ", "planned": "", "planned after measuring": ""}[summary["bytes_are"]]
    end = {"at most": " (decided when layers are measured)", "planned": "", "planned after measuring": " (measured)"}
    become = f"{known}{size_text(summary['output_bytes'])}{end[summary['bytes_are']]}"
    return f"{size_text(summary['source_bytes'])} become {become}"


def _memory_text(need: int, fills: bool) -> str:
    """fills : a part of what is free is taken besides"""
    from featherweight.system.memory import available_bytes

    free = available_bytes()
    more = ", of which up to a quarter is used to save time" if fills else ""
    return f"about {size_text(need)}" + (f" ({size_text(free)} free{more})" if free else "")


def _device_memory(share: Any) -> list[tuple[str, str]]:
    """The row about the device, where the network runs or layers are solved on one."""
    if not share.phases:
        return []
    given = "" if share.limit is None else f" ({size_text(share.limit)} {'given' if share.said else 'free'})"
    split = "" if share.windows is None else f", with {share.windows} window{'s' * (share.windows != 1)} at once"
    return [(f"memory of {share.device}", f"about {size_text(share.nbytes)}{split}{given}")]


def _time_note(plan: Any) -> str:
    """What the estimate of time leaves out."""
    from featherweight.tasks.compress.estimate import left_out

    learned = left_out(plan)
    more = f", nor {', '.join(learned)}" if learned else ""
    return f"measured on samples; disk not included{more}"


def run_inspect(model: str, json: Path | None) -> None:
    from featherweight.tasks.analyse.inspect import inspect_folder
    from featherweight.tasks.compress.earlier import earlier_text

    claim_json(json, ("architecture", "layers"))
    report = inspect_folder(model)
    write_json(json, report)
    console = out_console()
    rows = [
        ("architecture", f"{report['architecture']} ({report['family']}, {report['blocks']} blocks)"),
        ("parameters", f"{report['parameters']:,}"),
        ("size", f"{size_text(report['bytes'])}, {report['tensors']} tensors in {report['files']} file(s)"),
        ("bits per weight", ", ".join(f"{v:.3f} {k}" for k, v in report["bits_per_weight"].items() if v is not None)),
        ("tied", ", ".join(f"{head} to {table}" for head, table in report["tied"]) or "nothing"),
    ]
    if report["recipe"] and report["recipe"]["name"] == "imported":
        rows.insert(1, ("imported from", str(report["recipe"].get("notes"))))
    elif report["recipe"]:
        rows.insert(1, ("recipe", f"{report['recipe']['name']}, format version {report['format_version']}"))
    if earlier_text(report):
        rows.append(("the source", f"{earlier_text(report)}; errors are against it as it decodes"))
    console.print(facts(rows))
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "shape", "code", "bits", "error"):
        table.add_column(name, justify="right" if name in ("bits", "error") else "left")
    for layer in report["layers"]:
        error = layer["relative_error"]
        table.add_row(
            layer["name"],
            "x".join(str(n) for n in layer["shape"]),
            layer["code"],
            f"{layer['bits_per_weight']:.3f}",
            "-" if error is None else f"{error:.4f}",
        )
    console.print(table)


def run_verify(model: str, json: Path | None) -> None:
    from featherweight.errors import CheckpointError
    from featherweight.tasks.analyse.verify import verify

    claim_json(json, ("whole", "hashed"))
    with steps("verifying") as notify:
        result = verify(model, notify)
    write_json(json, {"model": model, "whole": result.whole, **vars(result)})
    for problem in result.problems:
        print(problem, file=sys.stderr)
    if result.newer == len(result.problems) > 0:
        raise CheckpointError(
            f"{model} was made by a newer featherweight, or with a package that is not installed: all "
            f"{result.hashed} hashes match, but it cannot be read here; update featherweight, or install that package"
        )
    if not result.whole:
        raise CheckpointError(f"{model} is damaged: {len(result.problems)} problem(s); fetch or make it again")
    for text in result.notes:
        note(text)
    unhashed = result.tensors - result.hashed
    more = f"; {unhashed} tensors carry no hash, only their headers were checked" if unhashed else ""
    say(
        f"{model} is whole: {result.hashed} of {result.tensors} tensors match their hashes, "
        f"{result.modules} compressed layers match their specs{more}"
    )


def _outside_bits(bits: float | None) -> list[tuple[str, str]]:
    """The row about embedding and output layer, where they are compressed."""
    return [] if bits is None else [("bits per weight, embedding and output layer", f"{bits:.3f}")]
