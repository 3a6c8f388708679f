"""`run`: train a low-bit model from scratch or from a checkpoint, and write it as a folder of codes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.errors import FeatherError, OutputError
from featherweight.events import Observer, silent
from featherweight.methods.train.flips import Flips
from featherweight.methods.train.prepare import (
    check_exportable,
    check_finite,
    low_bit_layers,
    make_optimiser,
    penalty,
    prepare,
    set_clock,
    set_rates,
)
from featherweight.methods.train.recipe import TrainRecipe, train_recipe
from featherweight.model.text.windows import windows_digest
from featherweight.pages.notebook import progress_here
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.log import Events
from featherweight.system.devices import device_named
from featherweight.system.files import disk_errors, to_json, write_text
from featherweight.system.precision import Chosen, autocast, choose_precision
from featherweight.system.threads import use_threads
from featherweight.tasks.compress.compression import finished_output
from featherweight.tasks.train.export import write_folder
from featherweight.tasks.train.opening import Opened, open_network
from featherweight.tasks.train.processes import Processes
from featherweight.tasks.train.result import Training
from featherweight.tasks.train.settings import TrainSettings
from featherweight.tasks.train.state import StateKeeper
from featherweight.tasks.train.text import TrainText, read_text
from featherweight.version import __version__

SPREAD = 1_000_000_007
RESULT = "featherweight-train.json"
"""What was measured on the way, beside the weights."""


def run(
    out: str | Path,
    recipe: str | Path | Mapping[str, Any] | TrainRecipe,
    model: str | Path | None = None,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text: Any = None,
    held_out: str | Path | None = None,
    changes: Sequence[str] = (),
    settings: TrainSettings | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Training:
    """Train a causal language model with low-bit layers, and write it as a folder.

    Killed at any moment, the same call goes on to the same bits on the same machine; complete, it returns at once.
    While it works OUT.feather-run stands beside the output, and OUT.log.jsonl records events.

    Parameters
    ----------
    out : str or Path
        Folder to make.
    recipe : str, Path, mapping or TrainRecipe
        A preset of trainings, a YAML file, or what one holds.
    model : str or Path, optional
        A checkpoint to go on from; or `config`.
    config : str or Path, optional
        A config.json of any architecture of transformers, or its folder: weights begin at random, by the seed.
    tokenizer : str or Path, optional
        A folder with a tokenizer. Default: that of the model, or beside the configuration.
    text : str, Path or list of mappings, optional
        As calibration text: a file, a folder, hf:DATASET, a mixture by weight. Default: the shipped text.
    held_out : str or Path, optional
        Text to evaluate on. Default: the last windows of the text, which are not trained on then.
    changes : sequence of str
        Like "schedule.learning_rate=0.001", applied to the recipe.
    settings : TrainSettings, optional
    device : str or torch.device
        Where the model is: "cpu", "cuda", ..., "auto".
    threads : int, optional
        Of PyTorch.
    overwrite : bool
        Replace an existing output of featherweight's, or another unfinished training.
    trust_remote_code : bool
        Run the code that the model's folder brings for its class or tokenizer.
    observer : callable, optional
        Called with every event that goes to the log.

    Raises
    ------
    FeatherError
        A setting is wrong, the text is too short, or the loss is not finite (the text names step and layer; the last
        good state is kept). RecipeError, CheckpointError and OutputError are among its kinds.
    """
    begun, settings = time.monotonic(), settings or TrainSettings()
    chosen, place = train_recipe(recipe, changes), Path(out).expanduser().absolute()
    check_exportable(chosen)
    processes, runs_on = Processes.here(), device_named(device)
    processes.share(settings.accumulate)
    observer = (observer or progress_here("training") or silent) if processes.writes else silent
    with use_threads(threads):
        opened = open_network(model, config, tokenizer, settings.seed, trust_remote_code)
        windows = read_text(opened.tokenizer, text, held_out, settings, opened.model.config.to_dict())
        precision = choose_precision(settings.dtype, observer, runs_on)
        identity = _identity(opened, chosen, settings, windows, precision)
        done = _finished(place, identity, overwrite)
        if done is not None:
            return done
        prepare(opened.model, chosen)
        opened.model.to(runs_on)
        opened.model.config.use_cache = False
        work = _Work(opened, chosen, settings, windows, precision, runs_on, processes, begun)
        if not processes.writes:
            work.follow(place)
        else:
            with (
                RunFolder.opened(place, identity, overwrite, device=str(runs_on)) as folder,
                Events(place, observer) as told,
            ):
                work.make(folder, told, identity)
        processes.wait()
        result = _finished(place, identity, False)
    assert result is not None
    resumed = {"seconds": time.monotonic() - begun, "resumed": work.resumed}
    return Training(**{**result.__dict__, **resumed})


def _identity(
    opened: Opened, recipe: TrainRecipe, settings: TrainSettings, text: TrainText, precision: Chosen
) -> dict[str, Any]:
    found = {
        "task": "train",
        "begins": opened.identity,
        "recipe": recipe.dump(),
        "settings": settings.identity(),
        "text": windows_digest(text.trained),
        "held_out": windows_digest(text.held_out),
        "dtype": precision,
        "featherweight": __version__,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _finished(out: Path, identity: dict[str, Any], overwrite: bool) -> Training | None:
    """The result if OUT is that of this very training; OutputError if it is something else that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file; choose a folder")
    if finished_output(out, identity, overwrite, ()) is None or not (out / RESULT).is_file():
        return None
    return Training(**{**json.loads((out / RESULT).read_text("utf-8")), "out": out})


@dataclass
class _Work:
    """A training from its first step, or the one where it stopped, to the folder."""

    opened: Opened
    recipe: TrainRecipe
    settings: TrainSettings
    text: TrainText
    precision: Chosen
    device: torch.device
    processes: Processes
    begun: float
    resumed: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def make(self, folder: RunFolder, events: Observer, identity: dict[str, Any]) -> None:
        """Train, write and publish."""
        if folder.publishing:
            folder.publish()
            return
        optimiser = make_optimiser(self.opened.model, self.recipe)
        keeper = StateKeeper(folder, self.opened.model, optimiser, self.settings.save_every)
        self.resumed, facts = keeper.load()
        self.history = list(facts.get("history", []))
        if self.resumed:
            events({"event": "note", "text": f"the training goes on behind step {self.resumed}, where it was saved"})
        self._say(events)
        self.train(optimiser, keeper, events)
        self.write(folder, identity, events)
        folder.publish()

    def follow(self, place: Path) -> None:
        """The same steps in a process that writes nothing."""
        optimiser = make_optimiser(self.opened.model, self.recipe)
        self.processes.wait()
        keeper = StateKeeper(RunFolder(place), self.opened.model, optimiser, None)
        self.resumed, _ = keeper.load()
        self.train(optimiser, None, silent)

    def _say(self, events: Observer) -> None:
        self.processes.wait()  # the others read the state now
        layers = low_bit_layers(self.opened.model)
        tokens = self.settings.windows_a_step * self.text.trained.shape[1] * self.settings.steps
        parts = (self.recipe.forward, self.recipe.backward, self.recipe.side, self.recipe.activation)
        events(
            {
                "event": "training",
                "recipe": self.recipe.name,
                "choices": " x ".join(part.kind for part in parts),
                "layers": len(layers),
                "weights": sum(layer.weight.numel() for layer in layers.values()),
                "parameters": sum(p.numel() for p in self.opened.model.parameters()),
                "steps": self.settings.steps,
                "tokens": tokens,
                "windows": len(self.text.trained),
                "held_out_windows": len(self.text.held_out),
                "device": str(self.device),
                "dtype": self.precision,
                "processes": self.processes.count,
            }
        )

    def train(self, optimiser: torch.optim.Optimizer, keeper: StateKeeper | None, events: Observer) -> None:
        """All steps that are left; the state is saved at the end."""
        model, settings, steps = self.opened.model, self.settings, self.settings.steps
        told, done = time.monotonic(), self.resumed
        for step in range(self.resumed, steps):
            rate = set_rates(optimiser, self.recipe, step, steps)
            set_clock(model, step, steps)
            logs = keeper is not None and ((step + 1) % settings.log_every == 0 or step + 1 == steps)
            flips = Flips(model) if logs and low_bit_layers(model) else None
            loss = self._gradients(step, optimiser)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.recipe.clip or float("inf")))
            if not norm < float("inf") or loss != loss:
                self._stop(step, loss, keeper)
            optimiser.step()
            if logs:
                now = time.monotonic()
                each = (now - told) / (step + 1 - done)
                told, done = now, step + 1
                tokens = settings.windows_a_step * self.text.trained.shape[1]
                line = {"step": step + 1, "loss": loss, "learning_rate": rate, "norm": norm}
                line |= {"tokens_per_second": tokens / each if each else 0.0}
                if flips is not None:
                    counted = flips.counted()
                    line |= {"flipped": counted.flipped_share, "dead": counted.dead_share}
                self.history.append(line)
                events({"event": "train", **line, "of": steps, "seconds_left": each * (steps - step - 1)})
            if keeper is not None and ((step + 1) % settings.eval_every == 0 or step + 1 == steps):
                set_clock(model, step + 1, steps)
                line = {"step": step + 1, "held_out": self.evaluate()}
                self.history.append(line)
                events({"event": "evaluation", **line})
            if keeper is not None and step + 1 < steps and keeper.due(step + 1):
                self._save(step + 1, keeper)
        set_clock(model, steps, steps)
        if keeper is not None and self.resumed < steps:
            self._save(steps, keeper)

    def _save(self, step: int, keeper: StateKeeper) -> None:
        keeper.save(step, {"history": self.history})

    def _stop(self, step: int, loss: float, keeper: StateKeeper | None) -> None:
        """FeatherError; the state before this step is saved first."""
        if keeper is not None and step > self.resumed:
            self._save(step, keeper)
        check_finite(self.opened.model, loss, step)
        raise FeatherError(f"the gradient of step {step} is too large for its type: lower schedule.learning_rate")

    def _gradients(self, step: int, optimiser: torch.optim.Optimizer) -> float:
        """Set those of a step; returns its loss."""
        model, settings = self.opened.model, self.settings
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for number in self.processes.share(settings.accumulate):
            torch.manual_seed(settings.seed * SPREAD + step * settings.accumulate + number)  # for dropout
            first = step * settings.windows_a_step + number * settings.batch
            ids = self.text.batch(settings.seed, first, settings.batch).to(self.device)
            loss = self.loss(ids) / settings.accumulate
            total += float(loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
        extra = penalty(model) if self.processes.writes else None
        if extra is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        return self.processes.add_up(model, total)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, nats, over windows [batch, length]."""
        with autocast(self.precision, self.device):
            logits = self.opened.model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the held-out windows."""
        self.opened.model.eval()
        held, size = self.text.held_out, self.settings.batch
        parts = (held[first : first + size] for first in range(0, len(held), size))
        sums = [float(self.loss(part.to(self.device))) * len(part) for part in parts]
        self.opened.model.train()
        return sum(sums) / len(held)

    def write(self, folder: RunFolder, identity: dict[str, Any], events: Observer) -> None:
        """The folder, in the place where it is assembled."""
        with disk_errors(folder.assembled):
            for path in folder.assembled.iterdir():
                path.unlink()
        self.opened.model.config.use_cache = True
        losses = [line["loss"] for line in self.history if "loss" in line]
        seconds = time.monotonic() - self.begun
        facts = {"seconds": round(seconds, 3), "device": str(self.device), "resumed": self.resumed}
        written = write_folder(
            self.opened.model.eval(), folder.assembled, self.recipe, self.opened.folder, identity, facts
        )
        found = Training(
            out=folder.out,
            recipe=self.recipe.name,
            steps=self.settings.steps,
            tokens=self.settings.steps * self.settings.windows_a_step * self.text.trained.shape[1],
            seconds=seconds,
            resumed=self.resumed,
            loss=losses[-1],
            held_out=[line["held_out"] for line in self.history if "held_out" in line][-1],
            bits_per_weight=written.bits_per_weight,
            bytes=written.bytes,
            history=self.history,
        )
        write_text(folder.assembled / RESULT, to_json(found.to_json()))
        events({"event": "done", **{k: v for k, v in found.to_json().items() if k != "history"}})
