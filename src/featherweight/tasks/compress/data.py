"""What a calibrated run is given beside the model: windows of text, and the model it was fine-tuned from."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featherweight.errors import CalibrationError, RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.quantize.treatment import scope_of
from featherweight.methods.recipe import Recipe
from featherweight.model.network.source import open_source
from featherweight.model.text.mixture import SELF, STATISTICS_SUFFIX, Mixture
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.system.precision import Chosen, choose_precision
from featherweight.tasks.compress.device_share import NOWHERE, DeviceShare
from featherweight.tasks.compress.refusals import check_base, check_reads_text, check_recipe, check_stored

if TYPE_CHECKING:
    from featherweight.methods.calibrate.settings import CalibrationSettings
    from featherweight.storage.run.folder import RunFolder
    from featherweight.tasks.compress.plan import Plan

CONVERSATIONS_SUFFIX = ".conversations.jsonl"
"""Of the file beside an output in which the model's own conversations are kept."""
QUIET = {"embedded", "gathered", "advanced"}  # what a run of the network tells of every batch


@dataclass(frozen=True)
class CalibrationData:
    """Checked as early as possible: what is missing is said before anything is computed.

    windows : token ids int64 [sequences, length]; None for data-free recipes and stored statistics
    stored : a statistics file instead of text
    device : where the network runs
    share : what it takes there
    """

    recipe: Recipe
    windows: Tensor | None = None
    stored: Path | None = None
    base_model: str | Path | None = None
    device: torch.device = torch.device("cpu")
    share: DeviceShare = NOWHERE

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        checkpoint: Checkpoint,
        calibration: Any,
        base_model: str | Path | None,
        notify: Observer | None = None,
        device: torch.device | None = None,
        *,
        out: Path | None = None,
    ) -> CalibrationData:
        """`out` is what conversations are kept beside. FeatherError where something is missing or too little text."""
        check_calibration(recipe, calibration, base_model)
        if not recipe.calibrated:
            return cls(recipe)
        mixture = chosen_text(calibration, recipe.calibration)
        if (stored := stored_in(mixture)) is not None:
            check_stored(recipe, stored, checkpoint)
            return cls(recipe, None, stored, base_model)
        check_reads_text(recipe, checkpoint)
        device = device or torch.device("cpu")
        windows = text_windows(checkpoint, mixture, recipe.calibration, out, device, notify)
        return cls(recipe, windows, None, base_model, device)

    def check(self, plan: Plan, checkpoint: Checkpoint) -> None:
        """RecipeError where the base model does not fit, before weights are read."""
        if self.base_model is not None:
            with open_source(self.base_model) as base:
                check_base([job.layer for job in plan.jobs], checkpoint, base)

    def identity(self) -> dict[str, Any]:
        """What the result depends on beside model and recipe; nothing for a data-free recipe."""
        if not self.recipe.calibrated:
            return {}
        from featherweight.model.text.windows import windows_digest

        if self.windows is not None:
            found = {"calibration": windows_digest(self.windows)}
        else:
            assert self.stored is not None
            found = {"calibration": _file_digest(self.stored)}
        if self.base_model is not None:
            with open_source(self.base_model) as base:
                found["base_model"] = sample_digest(base)
        return found

    def solve(
        self, plan: Plan, checkpoint: Checkpoint, run: RunFolder, notify: Observer, seed: int
    ) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
        """Every layer's record, how many were found finished, and the entries of config.json that change."""
        from featherweight.methods.calibrate.runner import Calibration
        from featherweight.tasks.compress.calibrated import CalibratedRun
        from featherweight.tasks.compress.stored import run_on_stored

        if self.stored is not None:
            return run_on_stored(plan, checkpoint, run, notify, seed, self.stored)
        assert self.windows is not None
        with ExitStack() as stack:
            base = None if self.base_model is None else stack.enter_context(open_source(self.base_model))
            calibration = stack.enter_context(
                Calibration.open(
                    checkpoint,
                    plan.anatomy,
                    self.windows,
                    self._settings(run, notify),
                    calibration_needs(self.recipe),
                    head=any(job.layer.input_group == "head" and not job.treatment.by_itself for job in plan.jobs),
                    outside=[job.layer.name for job in plan.jobs if job.layer in plan.anatomy.outside],
                    device=self.device,
                    windows_a_pass=self.share.windows_a_pass,
                    notify=lambda event: None if event["event"] in QUIET else notify(event),
                )
            )
            spare = plan.spare_bytes(calibration.spare_bytes)
            calibration.spare_bytes = self.share.spare_bytes(spare)
            work = CalibratedRun(plan, checkpoint, run, calibration, notify, seed, base)
            records = work.solve()
            return records, work.journal.resumed, work.config

    def _settings(self, run: RunFolder, notify: Observer) -> CalibrationSettings:
        """Those of the recipe, with the type that the network runs in: what is done was done in it, if anything is."""
        settings = self.recipe.calibration
        chosen = pass_precision(self.recipe, notify, self.device)
        if settings.dtype == "auto":
            begun = run.remembered("precision", chosen)
            if begun != chosen:
                text = f"this run began with the network in {begun} and goes on in it, not in {chosen}"
                notify({"event": "note", "text": text})
            settings = settings.model_copy(update={"dtype": begun})
        return settings


def pass_precision(recipe: Recipe, notify: Observer | None = None, device: torch.device | str = "cpu") -> Chosen:
    """The type that the network runs in for a recipe. Where blocks or the whole model are trained or compared, `auto`
    is float32: what does so has a `precision` of its own for its passes, and keeps values exact between them."""
    settings = recipe.calibration
    if settings.dtype == "auto" and any(scope_of(choice) != "layer" for choice in recipe.choices):
        return "float32"
    return choose_precision(settings.dtype, notify, device)


def chosen_text(calibration: Any, settings: CalibrationSettings) -> Mixture:
    """What is given, else what the recipe says, else the shipped text."""
    return Mixture.of(settings.text if calibration is None else calibration)


def stored_in(mixture: Mixture) -> Path | None:
    """The file of statistics that takes the place of text."""
    single = mixture.single
    return Path(single).expanduser() if single is not None and single.endswith(STATISTICS_SUFFIX) else None


def text_windows(
    checkpoint: Checkpoint,
    mixture: Mixture,
    settings: CalibrationSettings,
    out: Path | None,
    device: torch.device,
    notify: Observer | None,
) -> Tensor:
    """Windows int64 [sequences, length] of a mixture; conversations of `self` are kept beside `out`, or where the
    settings say, and are written by the model where they are not there yet."""
    from featherweight.model.text.windows import calibration_windows

    talks = None
    if SELF in mixture.used:
        from featherweight.tasks.converse.conversations import Conversations, conversations_for

        file = settings.conversations.file
        if file is None and out is None:
            raise CalibrationError(
                "there is no output to keep conversations beside: set calibration.conversations.file"
            )
        place = Path(file).expanduser() if file else Path(f"{out}{CONVERSATIONS_SUFFIX}")
        count = mixture.counts(settings.sequences)[SELF]
        writing = Conversations(checkpoint, settings.conversations, device, notify or silent)
        talks = conversations_for(writing, place, count, settings.length)
    return calibration_windows(checkpoint, mixture, settings, notify, talks)


def check_calibration(recipe: Recipe, calibration: Any, base_model: str | Path | None) -> None:
    """What can be said without opening anything."""
    if calibration is not None or recipe.calibrated:
        check_file(chosen_text(calibration, recipe.calibration))
    check_recipe(recipe)
    if recipe.allocation.needs and stored_in(chosen_text(calibration, recipe.calibration)) is None:
        by = "errors of outputs" if recipe.allocation.judges == "outputs" else "errors of calibrated codes"
        raise RecipeError(
            f"recipe {recipe.name}: the allocation {recipe.allocation.kind} chooses by {by}, for which it "
            "needs a file of statistics: gather one with `feather calibrate` and give it as the calibration, or set "
            "allocation.errors to weights"
        )
    if "base" in recipe.needs and base_model is None:
        raise RecipeError(
            f"recipe {recipe.name} compares the model with the one it was fine-tuned from: "
            "name that one with base_model= (on the command line --base-model)"
        )


def check_file(calibration: Any) -> None:
    """CalibrationError if calibration text is to come from a file that is not there."""
    Mixture.of(calibration).check()


def calibration_needs(recipe: Recipe) -> set[str]:
    """The statistics that running a recipe gathers, and "targets" where a block's output is compared."""
    needs = set(recipe.needs) - {"base", "update_range"}
    scopes = {getattr(choice, "scope", "layer") for choice in (recipe.rounding, *recipe.corrections)}
    if "block" in scopes:
        needs.add("targets")
    if recipe.calibration.held_out > 0:
        needs.add("held_out_gram")  # keeps windows apart, also for comparisons of outputs
    return needs


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
