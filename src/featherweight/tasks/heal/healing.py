"""`heal`: a compressed model is trained against its original, in the same bytes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CalibrationError, FeatherWarning
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.model.network.source import open_source
from featherweight.model.text.mixture import Mixture
from featherweight.model.text.windows import windows_digest
from featherweight.pages.notebook import progress_here
from featherweight.storage.checkpoint.anatomy import Anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import LayerWeight, sample_digest
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.log import Events
from featherweight.storage.run.record import read_record
from featherweight.system.devices import device_named
from featherweight.system.machine import machine_facts, now_text
from featherweight.system.memory import peak_memory_bytes, reset_peak_memory, resident_bytes
from featherweight.system.precision import choose_precision
from featherweight.system.threads import use_threads
from featherweight.tasks.compress.account import accounted_anatomy
from featherweight.tasks.compress.assemble import read_manifest
from featherweight.tasks.compress.compression import check_place, finished_output
from featherweight.tasks.compress.data import chosen_text, text_windows
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.result import Evaluation
from featherweight.tasks.heal.memory import check_room, planned
from featherweight.tasks.heal.result import Healing, Score
from featherweight.tasks.heal.settings import HealSettings
from featherweight.tasks.heal.student import Student
from featherweight.tasks.heal.training import Healer
from featherweight.tasks.heal.writing import write_healed, write_record
from featherweight.version import __version__

QUIET = {"embedded", "gathered", "advanced"}
"""What a walk over the network tells of every batch."""


def heal(
    small: str | Path,
    against: str | Path,
    out: str | Path,
    *,
    settings: HealSettings | None = None,
    text: Any = None,
    score_text: str | Path | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Healing:
    """Train a compressed model against the one it was made from; the result has the same codes and takes as many bytes.

    Digits, scales and norms move, by gradients straight through the rounding; what is minimised is how far the model's
    predictions are from the original's (or a few blocks' outputs, see `HealSettings`). Windows of text that nothing is
    fitted to choose the step that is kept, and the given model is among the choices. Killed at any moment, the same
    call goes on: trainings leave their state about once a minute.

    Parameters
    ----------
    small : str or Path
        A folder that `compress` made; it is not changed.
    against : str or Path
        The original: a folder, a file or a hub id.
    out : str or Path
        Folder to make.
    settings : HealSettings, optional
        Default: 15 minutes for the whole model.
    text : optional
        What is read, as for `compress`; default: the shipped text. A training of more than a minute wants a file of
        some megabytes of the kind that the model is for.
    score_text : str or Path, optional
        Held-out text on which the model is measured before and after; default: the bundled one.
    threads : int, optional
        Of native kernels and PyTorch.
    device : str or torch.device
        Where the networks run and values are trained: "cpu", "cuda", "cuda:1", "mps", or "auto", an accelerator where
        there is one. Streams and codes stay in main memory; batches that do not fit there are halved. Another device
        changes the order of floating-point sums, as another processor does.
    overwrite : bool
        Replace an existing output of featherweight's.
    trust_remote_code : bool
        Run the code that the models' folders bring.
    observer : callable, optional
        Called with every event.

    Returns
    -------
    Healing

    Raises
    ------
    CheckpointError
        `small` is not compressed, or was not made from `against`.
    CalibrationError
        There is too little text.
    OutputError
        OUT exists already, or cannot be written.
    FeatherError
        Any setting is wrong, there is no such device, or memory does not suffice.
    """
    begun = time.monotonic()
    reset_peak_memory()
    resident = resident_bytes()
    settings, observer = settings or HealSettings(minutes=15), observer or progress_here("healing") or silent
    settings.check()
    runs_on = device_named(device)
    out = Path(out).expanduser().absolute()
    mixture = chosen_text(text, CalibrationSettings())
    mixture.check()
    with (
        open_source(against, trust_remote_code) as original,
        open_source(small, trust_remote_code) as compressed,
        use_threads(threads) as count,
    ):
        check_place(out, compressed, small)
        check_place(out, original, against)
        anatomy, _, _ = accounted_anatomy(original)
        student = Student.of(compressed, small, original, anatomy).checked(settings.training)
        windows = _windows(original, mixture, settings, out, runs_on, observer)
        run_settings = _calibration(settings, len(windows))
        identity = _identity(student, original, settings, windows)
        beside = tuple(path.name for path in compressed.other_files())
        need = planned(anatomy, original, settings, len(windows), runs_on)
        scoring = {"threads": threads, "trust_remote_code": trust_remote_code, "device": runs_on}
        done = finished_output(out, identity, overwrite, beside) is not None
        if not done:
            check_room(need, settings, runs_on)
        scored = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FeatherWarning)  # that it is of little use is why it is healed
            before = _measured(small, against, settings, score_text, scoring)
        scored = time.monotonic() - scored
        reset_peak_memory()
        if not done:
            opened = RunFolder.opened(out, identity, overwrite, beside, device=str(runs_on))
            with opened as run, Events(out, observer) as events:
                work = _Work(original, anatomy, student, settings, windows, run_settings, run, events, begun, scored)
                work.make(identity, {"threads": count, "resident_at_start_bytes": resident})
        peak = peak_memory_bytes()
        after = _measured(out, against, settings, score_text, scoring)
    manifest = read_manifest(out)
    assert manifest is not None
    facts = manifest["healed"][-1]
    return Healing(
        out=out,
        bytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        level=settings.level,
        steps=facts["steps"],
        tokens=facts["tokens"],
        loss_before=tuple(facts["loss_before"]),
        loss_after=tuple(facts["loss_after"]),
        moved=facts["moved"],
        kept=facts["kept"],
        curve=tuple(read_record(out)["compression"].get("curve", ())),
        seconds=time.monotonic() - begun,
        peak_memory_bytes=peak,
        planned_memory_bytes=need.main + resident,
        before=_score(before),
        after=_score(after),
        original_perplexity=None if after is None else after.perplexity_against,
    )


def _identity(student: Student, original: Checkpoint, settings: HealSettings, windows: Tensor) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "recipe": dict(student.small.recipe),
        "healed": settings.identity(),
        "source": student.small.coded.identity(),
        "codes": sample_digest(student.small.coded),
        "against": sample_digest(original),
        "calibration": windows_digest(windows),
        "featherweight": __version__,
    }


def _measured(
    model: str | Path,
    against: str | Path,
    settings: HealSettings,
    text: str | Path | None,
    options: Mapping[str, Any],
) -> Evaluation | None:
    return evaluate(model, against, text, limit=settings.score, **options) if settings.score else None


def _windows(
    original: Checkpoint, mixture: Mixture, settings: HealSettings, out: Path, device: torch.device, notify: Observer
) -> Tensor:
    """Token ids int64 [windows, length]: as many as the text has, at most so many as are wanted."""
    wanted = CalibrationSettings(sequences=settings.windows, length=settings.length, seed=settings.seed)
    return text_windows(original, mixture, wanted, out, device, notify)


def _calibration(settings: HealSettings, windows: int) -> CalibrationSettings:
    held_out = min(settings.held_out, max(1, windows // 8))
    if windows < 2:
        raise CalibrationError("there is too little text to heal with: give a longer one with --text")
    return CalibrationSettings(
        sequences=settings.windows,
        length=settings.length,
        seed=settings.seed,
        held_out=held_out / windows,
        dtype="float32",
        batch_tokens=settings.batch * settings.length,
    )


@dataclass(frozen=True)
class _Work:
    """A healing from its windows to the folder in its place."""

    original: Checkpoint
    anatomy: Anatomy
    student: Student
    settings: HealSettings
    windows: Tensor
    calibration: CalibrationSettings
    run: RunFolder
    notify: Observer
    begun: float
    reserved: float

    def make(self, identity: dict[str, Any], told: dict[str, Any]) -> None:
        first = self.run.remembered("first_begun", now_text())
        blocks = self.settings.level == "blocks"
        needs = ("held_out_gram", "targets") if blocks else ("held_out_gram",)
        if (moved := self.run.moved_note) is not None:
            self.notify({"event": "note", "text": moved})
        precision = choose_precision("auto", self.notify, self.run.device)
        left = None if self.settings.minutes is None else self._time_left()
        healer = Healer(self.student, self.settings, self.run, self.notify, precision, left)
        outside = [layer.name for layer in self.anatomy.outside]
        opened = Calibration.open(
            self.original, self.anatomy, self.windows, self.calibration, needs,
            outside=outside, device=self.run.device, notify=self._told,
        )  # fmt: skip
        with opened as calibration:
            made = healer.blocks(calibration) if blocks else healer.whole(calibration)
        layers = {layer.name: layer for layer in self.anatomy.layers}
        weights = {name: LayerWeight(self.original, layers[name]) for name in made[0]}
        facts = {
            "level": self.settings.level,
            "steps": sum(healer.steps),
            "tokens": sum(healer.steps) * self.settings.batch * self.windows.shape[1],
            "loss_before": healer.before,
            "loss_after": healer.after,
            "moved": self.student.moved(made[0]),
            "kept": any(after < before for before, after in zip(healer.before, healer.after, strict=True)),
        }
        write_healed(self.run, self.student.small.coded, made, weights, identity, facts)
        recipe = f"{self.student.small.recipe.get('name', 'unknown')}, healed"
        took: dict[str, Any] = {"recipe": recipe, "first_begun": first, "curve": healer.curve}
        took |= {"finished": now_text(), "seconds": round(time.monotonic() - self.begun, 3), **told}
        took |= {
            "device": self.run.device,
            "peak_memory_bytes": peak_memory_bytes(),
            "machine": machine_facts(self.run.device),
            "featherweight": __version__,
        }
        write_record(self.run.assembled, took)
        self.run.publish()

    def _told(self, event: dict[str, Any]) -> None:
        if event["event"] not in QUIET:
            self.notify(event)

    def _time_left(self) -> Callable[[], float]:
        """Seconds that training may take, asked at any time: what is left of the minutes."""
        assert self.settings.minutes is not None
        end = self.begun + 60 * self.settings.minutes - self.reserved
        return lambda: end - time.monotonic()


def _score(found: Evaluation | None) -> Score | None:
    if found is None:
        return None
    divergence = found.divergence
    return Score(
        None if divergence is None else divergence.mean,
        found.perplexity,
        None if divergence is None else divergence.top1_agreement,
    )
