"""From a choice to the model on disk, made again with less where it came out larger than foreseen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherError
from featherweight.system.units import size_text
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.result import Compression
from featherweight.tasks.fit.choosing import Problem
from featherweight.tasks.fit.refining import Refined
from featherweight.tasks.fit.study import Study
from featherweight.tasks.fit.ways import recipe_of

ATTEMPTS = 4


@dataclass(frozen=True)
class Made:
    """out : the folder or file; chosen : the place of each layer's way; recipe : what made it; nbytes : of its weight
    files; tensor_types : options of llama.cpp's quantiser that make the same choice"""

    out: Path
    chosen: dict[str, int]
    refined: Refined | None
    recipe: dict[str, Any]
    nbytes: int
    compression: Compression | None = None
    tensor_types: tuple[str, ...] = ()


def make_folder(
    study: Study, problem: Problem, budget: int | None, out: Path, *, overwrite: bool, **options: Any
) -> Made:
    """The model as `compress` makes it. FeatherError where it is larger than the budget whatever is tried."""
    less = nbytes = 0
    settings = study.settings
    for attempt in range(ATTEMPTS):
        chosen, refined = study.choose(problem, budget, less)
        recipe = recipe_of(
            study.ways_of(problem, chosen), settings.calibration, data=not settings.data_free,
            corrections=settings.corrections,
        )  # fmt: skip
        done = compress(study.model, recipe, out, overwrite=overwrite or attempt > 0, **options)
        nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        if budget is None or nbytes <= budget:
            return Made(done.out, chosen, refined, recipe, nbytes, done)
        less += nbytes - budget
    raise too_large(out, nbytes)


def too_large(out: Path, nbytes: int) -> FeatherError:
    """What to say after the last attempt."""
    return FeatherError(
        f"{out} takes {size_text(nbytes)}, more than the budget, also after {ATTEMPTS} attempts: allow more"
    )
