"""`feather bench`: how fast a model is, and how near to the limit of this machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featherweight.cli.console import claim_json, facts, out_console, quiet_transformers, write_json
from featherweight.system.units import size_text, time_text


@dataclass(frozen=True)
class BenchOptions:
    """Arguments of `featherweight.tasks.evaluate.speed.measure_speed`."""

    prompt_tokens: int
    new_tokens: int
    context_tokens: int | None
    cache: str
    engine: str
    repeats: int
    threads: int | None
    trust_remote_code: bool
    device: str | None


def run_bench(model: str, options: BenchOptions, json: Path | None) -> None:
    import torch

    from featherweight.native import library
    from featherweight.system.threads import thread_count
    from featherweight.tasks.evaluate.speed import measure_speed

    claim_json(json, ("engine", "bandwidth_gb_s"))
    quiet_transformers()
    chosen = replace(options, threads=thread_count(options.threads))
    torch.set_num_threads(thread_count(options.threads))
    report = measure_speed(model, **vars(chosen))
    report["without_native_library"] = library.why_not() if library.get() is None else None
    write_json(json, report)
    _record(model, report)
    out_console().print(facts(_rows(report)))


def _record(model: str, report: dict[str, Any]) -> None:
    """Keep a result in a folder of ours, for `feather report`; a note where that fails."""
    from featherweight.errors import OutputError
    from featherweight.storage.run.record import add_measurement
    from featherweight.system.machine import machine_facts, now_text

    try:
        add_measurement(
            model, "speeds", {**report, "date": now_text(), "machine": machine_facts(str(report["device"]))}
        )
    except OutputError as error:
        print(f"note: the result is not recorded: {error}", file=sys.stderr, flush=True)


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    bandwidth, read = report["bandwidth_gb_s"], report["bytes_per_token"]
    place = "this machine" if report["device"] == "cpu" else report["device"]
    rows = [
        ("engine", f"{report['engine']}, {report['threads']} threads, {report['device']}"),
        ("prompt", f"{report['prefill_tokens_per_second']:.1f} tokens/s ({report['prompt_tokens']} tokens)"),
        (
            "generation",
            f"{report['decode_tokens_per_second']:.1f} tokens/s "
            f"({report['new_tokens']} tokens after {report['context_tokens']})",
        ),
        ("bytes read for a token", size_text(read)),
        (f"read bandwidth of {place}", f"{bandwidth:.1f} GB/s, at most {1e9 * bandwidth / read:.1f} tokens/s"),
        ("share of it", f"{100 * report['bandwidth_share']:.1f} %"),
    ]
    if report["without_native_library"] is not None and report["device"] == "cpu":
        times = 1 / report["bandwidth_share"]
        rows += [
            ("native library", f"not in use: {report['without_native_library']}"),
            (
                "which costs",
                f"a token takes {times:.3g} times as long as reading it does; with the library near 1",
            ),
        ]
    if report["outside_kernels_share"] is not None:
        rows.append(("time outside kernels", f"{100 * report['outside_kernels_share']:.1f} %"))
    rows += [
        ("start-up", time_text(report["load_seconds"])),
        ("peak memory", size_text(report["peak_memory_bytes"])),
    ]
    if report["peak_device_memory_bytes"] is not None:
        rows.append((f"peak memory of {report['device']}", size_text(report["peak_device_memory_bytes"])))
    return rows
