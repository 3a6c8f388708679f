"""`feather calibrate`: the statistics of a model's layers, gathered once for many runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.cli.console import claim_json, facts, note, out_console, quiet_transformers, steps, write_json
from featherweight.system.units import size_text


@dataclass(frozen=True)
class CalibrateOptions:
    """calibration : text; needs : names of statistics; changes : to the settings, like calibration.length=512"""

    calibration: str | None
    needs: list[str]
    changes: list[str]
    threads: int | None
    device: str
    max_device_memory: str | None
    overwrite: bool
    trust_remote_code: bool


def run_calibrate(model: str, out: Path, options: CalibrateOptions, json: Path | None) -> None:
    import yaml

    from featherweight.errors import RecipeError
    from featherweight.system.threads import use_threads
    from featherweight.tasks.compress.data import check_file
    from featherweight.tasks.compress.gather import gather_statistics

    claim_json(json, ("file", "bytes", "needs"))
    quiet_transformers()
    settings: dict[str, Any] = {}
    for change in options.changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"a change is written FIELD=VALUE, like calibration.length=512, but is {change!r}")
        place, value = settings, yaml.safe_load(value)
        *outer, last = name.removeprefix("calibration.").split(".")
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value
    check_file(options.calibration)
    with use_threads(options.threads), steps("gathering") as notify:
        done = 0

        def watch(event: dict[str, Any]) -> None:
            nonlocal done
            if event["event"] == "note":
                note(event["text"])
            elif event["event"] == "gradients":  # windows run backward, before all blocks
                notify(event["step"], event["of"])
            elif event["event"] == "advanced":
                done += 1
                notify(done, event["of"])

        chosen = [n.strip() for n in options.needs]
        written = gather_statistics(
            model, out, options.calibration, chosen, settings, device=options.device,
            max_device_memory=options.max_device_memory, overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code, notify=watch,
        )  # fmt: skip
    size = written.stat().st_size
    write_json(json, {"file": str(written), "bytes": size, "needs": options.needs})
    out_console().print(facts([("statistics", str(written)), ("size", size_text(size))]))
