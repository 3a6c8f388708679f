"""Statistics of a model gathered once, into a file that any number of compressions can use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from featherweight.calibrate.settings import CalibrationSettings
from featherweight.checkpoint.checkpoint import Checkpoint
from featherweight.compress.account import accounted_anatomy
from featherweight.compress.data import Tell, text_windows
from featherweight.errors import OutputError, RecipeError
from featherweight.quantize.recipe import explain


def gather_statistics(
    model: str | Path,
    out: str | Path,
    source: str | Path | None = None,
    needs: Collection[str] = ("gram", "mean_abs", "held_out_gram"),
    settings: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    tell: Tell | None = None,
) -> Path:
    """Run the original network over calibration text and write the statistics of all its layers to OUT (.safetensors).

    settings : fields of `CalibrationSettings`
    Raises OutputError if OUT is there already, RecipeError for an unknown statistic or setting.
    """
    from featherweight.calibrate.runner import Calibration
    from featherweight.calibrate.statistics import NAMES, save_statistics
    from featherweight.calibrate.text import windows_digest

    out = Path(out).expanduser()
    if out.exists() and not overwrite:
        raise OutputError(f"--out {out} exists already; choose another file or replace it with --overwrite")
    if out.suffix != ".safetensors":
        raise OutputError(f"--out {out} must end with .safetensors")
    known = [name for name in NAMES if name not in ("tokens", "cross")]  # a single stream has no cross moment
    for name in needs:
        if name not in known:
            raise RecipeError(f"there is no statistic {name!r} to gather beforehand; known: {', '.join(known)}")
    try:
        chosen = CalibrationSettings(**dict(settings or {}))
    except ValidationError as error:
        raise RecipeError(explain(error, CalibrationSettings, "calibration.")) from None
    with Checkpoint.open(model) as checkpoint:
        checkpoint.trust_remote_code = trust_remote_code
        anatomy, notes, _ = accounted_anatomy(checkpoint)
        if tell is not None:
            for note in notes:
                tell({"event": "note", "text": note})
        ids = text_windows(checkpoint, source, chosen, tell)
        with Calibration.open(checkpoint, anatomy, ids, chosen, needs, head=True, tell=tell) as calibration:
            save_statistics(calibration, out, checkpoint, needs, windows_digest(ids))
    return out
