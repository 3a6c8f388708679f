"""Statistics of a model gathered once, into a file that any number of compressions can use."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from featherweight.errors import OutputError, RecipeError
from featherweight.events import Observer
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.statistics_file import is_statistics
from featherweight.methods.recipe import explain
from featherweight.model.network.source import open_source
from featherweight.registry import nearest
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.run.ownership import within
from featherweight.system.devices import device_named
from featherweight.system.files import disk_errors
from featherweight.system.units import size_text
from featherweight.tasks.compress.account import accounted_anatomy
from featherweight.tasks.compress.data import chosen_text, text_windows
from featherweight.tasks.compress.device_memory import gathering_share
from featherweight.tasks.compress.device_share import limit_on

PARTS_SUFFIX = ".parts"
PART = re.compile(r"\d+\.safetensors(\.part)?")  # what `save_statistics` leaves where it is stopped


def gather_statistics(
    model: str | Path,
    out: str | Path,
    text: Any = None,
    needs: Collection[str] = ("gram", "mean_abs", "held_out_gram"),
    settings: Mapping[str, Any] | None = None,
    *,
    device: str | torch.device = "cpu",
    max_device_memory: int | str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    notify: Observer | None = None,
) -> Path:
    """Run the original network over calibration text and write the statistics of all its layers to OUT (.safetensors).

    text : see `compress`; conversations of `self` are kept beside OUT
    settings : fields of `CalibrationSettings`
    device, max_device_memory : where the network runs, and what it may take there, see `compress`
    overwrite : replace a file of statistics; no other file is ever replaced
    Raises OutputError if OUT is there already, RecipeError for an unknown statistic or setting.
    """
    from featherweight.methods.calibrate.runner import Calibration
    from featherweight.methods.calibrate.statistics import known_statistics
    from featherweight.methods.calibrate.statistics_file import save_statistics
    from featherweight.model.text.windows import windows_digest

    out = Path(out).expanduser()
    _check_out(out, overwrite)
    if out.suffix != ".safetensors":
        raise OutputError(f"--out {out} must end with .safetensors")
    known = [name for name, one in known_statistics().items() if one.stored and one.gathered and name != "tokens"]
    for name in needs:
        if name not in known:
            raise RecipeError(
                f"there is no statistic {name!r} to gather beforehand{nearest(name, known)}; known: {', '.join(known)}"
            )
    try:
        chosen = CalibrationSettings(**dict(settings or {}))
    except ValidationError as error:
        raise RecipeError(explain(error, CalibrationSettings, "calibration.")) from None
    mixture = chosen_text(text, chosen)
    mixture.check()
    runs_on = device_named(device)
    limit = limit_on(runs_on, device, max_device_memory)
    with open_source(model, trust_remote_code) as checkpoint:
        if within(out, checkpoint.folder) and not Path(model).expanduser().is_file():
            raise OutputError(
                f"--out {out} lies in the folder of the model, where it would count as weights of it; "
                "choose a place outside of it"
            )
        anatomy, notes, _ = accounted_anatomy(checkpoint)
        if notify is not None:
            for note in notes:
                notify({"event": "note", "text": note})
        ids = text_windows(checkpoint, mixture, chosen, out, runs_on, notify)
        size = expected_bytes(anatomy, needs, len(ids) * ids.shape[1], chosen)
        _check_disk(out, size)
        if notify is not None:
            facts = {"blocks": anatomy.blocks, "bytes": size, "windows": len(ids), "length": ids.shape[1]}
            notify({"event": "gathering", "file": str(out), "layers": len(anatomy.layers), **facts})
        share = gathering_share(anatomy, checkpoint, chosen, needs, runs_on, limit)
        share.check()
        with Calibration.open(
            checkpoint, anatomy, ids, chosen, needs, head=True, device=runs_on, windows_a_pass=share.windows_a_pass,
            notify=notify,
        ) as calibration:  # fmt: skip
            calibration.spare_bytes = share.spare_bytes(calibration.spare_bytes)
            save_statistics(calibration, out, checkpoint, needs, windows_digest(ids))
    return out


def expected_bytes(anatomy: Anatomy, needs: Collection[str], tokens: int, settings: CalibrationSettings) -> int:
    """Bytes of the tensors of a file of statistics: those of every input once; of every layer where tokens are weighed
    layer by layer. With experts that no token reaches, or an output layer that the network lacks, it is less.

    tokens : that calibration reads, held-out ones among them
    """
    from featherweight.methods.calibrate.statistics import known_statistics
    from featherweight.methods.calibrate.statistics.inputs import SAMPLE

    known = known_statistics()
    layers = list(anatomy.layers)
    last = anatomy.head if anatomy.head is not None else anatomy.embedding if anatomy.tied_head else None
    layers += [last] if last is not None else []
    widths: dict[str, int] = {}
    for layer in layers:
        widths[layer.name if settings.guidance else layer.input_group] = layer.shape[1]
    total = 0
    for width in widths.values():
        sizes = {"in": width, "tokens": min(tokens, SAMPLE)}
        for name in {*needs, "tokens"}:
            width_of = 8 if name == "tokens" else 4  # a count in int64; all others are float32
            total += width_of * math.prod(sizes.get(axis, 1) for axis in known[name].axes)
        if settings.guidance and "held_out_gram" in needs:
            total += 4 * width * width
        if settings.guidance > 1 and "gram" in needs:
            total += 4 * settings.guidance * width * width
    return total


def _check_disk(out: Path, nbytes: int) -> None:
    """OutputError where the disk has no room for the statistics, block by block and then in one file."""
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    with disk_errors(out):
        free = shutil.disk_usage(place).free
    if free < 2 * nbytes:
        raise OutputError(
            f"the disk of {place} has {size_text(free)} free, the statistics need {size_text(2 * nbytes)} while "
            f"they are written, half of it in the end: free some space, choose another --out, or gather fewer --needs"
        )


def _check_out(out: Path, overwrite: bool) -> None:
    """OutputError for a file that may not be replaced, or a folder in the place of the one for the work."""
    parts = out.with_name(out.name + PARTS_SUFFIX)
    foreign = None
    if os.path.lexists(parts):
        foreign = (
            parts if not parts.is_dir() else next((p for p in parts.iterdir() if not PART.fullmatch(p.name)), None)
        )
    if foreign is not None:
        raise OutputError(
            f"{parts} is where unfinished statistics are kept, but {foreign.name} is there, which featherweight did "
            "not write; move it away or choose another --out"
        )
    if not os.path.lexists(out):
        return
    if not is_statistics(out):
        raise OutputError(
            f"--out {out} exists and is no file of statistics, so it is not replaced; choose another file"
        )
    if not overwrite:
        raise OutputError(f"--out {out} exists already; choose another file or replace it with --overwrite")
