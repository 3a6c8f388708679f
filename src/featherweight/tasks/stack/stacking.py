"""`stack`: a model decomposed once, its blocks in one order, in a folder of which every prefix is a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import FeatherError, RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import Recipe, load_recipe
from featherweight.model.network.source import open_source
from featherweight.model.text.windows import windows_digest
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.store import Store
from featherweight.storage.stack.stack import Stack, blocks_in
from featherweight.storage.stack.writing import cut, write_stack
from featherweight.system.files import sha256_of, to_json
from featherweight.system.locks import FileLock
from featherweight.system.places import cache_folder
from featherweight.system.threads import use_threads
from featherweight.system.units import size_text
from featherweight.tasks.compress.compression import check_place, compress, finished_output
from featherweight.tasks.compress.data import chosen_text, stored_in, text_windows
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.stack.orders import ORDERS, Order, by_level, by_saving, shuffled
from featherweight.tasks.stack.trials import Trials

TOKENS = 2048
"""Of text on which orders are measured."""


@dataclass(frozen=True)
class StackSettings:
    """recipe, changes : as for `compress`; blocks, rank : of its grid, None: as the recipe has them
    order : see `featherweight.tasks.stack.orders`
    tokens : of calibration text on which orders that run the model are measured
    seed : of random choices, the random order among them
    """

    recipe: str = "bitstack"
    changes: tuple[str, ...] = ()
    blocks: int | None = 6
    rank: int | None = None
    order: Order = "average"
    tokens: int = TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Stacked:
    """out : the folder; blocks : beyond the first of each layer; layers : that have several
    least, most : bytes of the smallest and of the largest model; bytes : of all weight files of the folder
    """

    out: Path
    order: str
    blocks: int
    layers: int
    least: int
    most: int
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "out": str(self.out)}

    def __str__(self) -> str:
        return f"{self.out}: {self.blocks} blocks, {size_text(self.least)} to {size_text(self.most)}"


def stack(
    model: str | Path,
    out: str | Path,
    *,
    settings: StackSettings | None = None,
    calibration: Any = None,
    threads: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> Stacked:
    """Make a stack of a model: OUT holds all blocks, and `featherweight.load(OUT, size=...)` takes what fits.

    The decomposition and what orders are measured with are kept in the cache, so that a stop loses nothing and another
    order of the same model takes little.

    Raises
    ------
    FeatherError
        The recipe makes no sums of blocks, the model does not fit into memory for the order, or OUT is in use.
    """
    settings, notify, begun = settings or StackSettings(), observer or silent, time.monotonic()
    if settings.order not in ORDERS:
        raise FeatherError(f"--order {settings.order!r} is none: there are {', '.join(ORDERS)}")
    recipe, out = _recipe(settings), Path(out).expanduser().absolute()
    with open_source(model, trust_remote_code) as checkpoint, use_threads(threads):
        check_place(out, checkpoint, model)
        mixture = chosen_text(calibration, recipe.calibration)
        if stored_in(mixture) is not None:
            mixture = chosen_text(None, recipe.calibration)
        windows = text_windows(checkpoint, mixture, recipe.calibration, out, torch.device("cpu"), notify)
        about = [
            checkpoint.identity(),
            sample_digest(checkpoint),
            recipe.dump(),
            windows_digest(windows),
            settings.seed,
        ]
        identity: dict[str, Any] = {
            "stack": sha256_of(to_json(about)),
            "order": settings.order,
            "tokens": settings.tokens,
        }
        beside = tuple(path.name for path in checkpoint.other_files())
        if finished_output(out, identity, overwrite, beside) is not None:
            return _result(out, begun)
        name = f"{checkpoint.folder.resolve().name[:40]}-{identity['stack'][:16]}"
        work = cache_folder() / "stack" / name
        with FileLock(work / "lock", make_folder=True) as lock:
            lock.acquire(wait=True)
            compress(
                model, recipe, work / "decomposed", calibration=calibration, threads=threads, seed=settings.seed,
                trust_remote_code=trust_remote_code, observer=notify,
            )  # fmt: skip
            length = min(windows.shape[1], settings.tokens)
            some = windows[-max(1, settings.tokens // windows.shape[1]) :, :length]
            store = Store(work / f"measured-{settings.tokens}")
            store.folder.mkdir(parents=True, exist_ok=True)
            with Checkpoint.open(work / "decomposed") as made:
                specs = module_specs(made.quantization_config or {})
                blocks = {module: count for module, spec in specs.items() if (count := blocks_in(spec)) > 1}
                if not blocks:
                    raise RecipeError(
                        f"the recipe {recipe.name} makes no layer of a sum of blocks, so there is nothing to stack: "
                        "take bitstack, with two blocks or more"
                    )
                trials = Trials(
                    make_plan(checkpoint, recipe), checkpoint, made, specs, blocks, store, some,
                    CalibrationSettings(sequences=len(some), length=length),
                )  # fmt: skip
                sequence, errors = _ordered(trials, settings, notify)
            entry = {"identity": identity, "order": settings.order, "errors": errors}
            with RunFolder.opened(out, identity, overwrite, beside) as run:
                write_stack(work / "decomposed", run.assembled, sequence, entry)
                run.publish()
    return _result(out, begun)


def cut_stack(folder: str | Path, out: str | Path, size: str | int) -> Stacked:
    """The longest prefix of a stack within `size` bytes as an ordinary folder. Raises like `load` with a size."""
    begun, out = time.monotonic(), Path(out).expanduser().absolute()
    with Stack.open(folder) as opened:
        blocks = opened.prefix(size)
        cut(opened, blocks, out)
        nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        layers, least, most = len(opened.levels(0)), opened.nbytes(0), opened.nbytes(opened.blocks)
        return Stacked(out, opened.order, blocks, layers, least, most, nbytes, time.monotonic() - begun)


def _recipe(settings: StackSettings) -> Recipe:
    changes = [f"grid.{n}={v}" for n, v in (("blocks", settings.blocks), ("rank", settings.rank)) if v is not None]
    return load_recipe(settings.recipe, [*changes, *settings.changes])


def _ordered(trials: Trials, settings: StackSettings, notify: Observer) -> tuple[Sequence[str], dict[str, list[float]]]:
    """The order of the blocks, and the relative errors of layers with one block, two, ..."""
    errors = trials.errors(_telling("measuring blocks", notify))
    shown = {name: [round(other, 6) for _, other in own] for name, own in errors.items()}
    costs = {name: [one for one, _ in own] for name, own in errors.items()}
    if settings.order == "random":
        return shuffled(trials.blocks, settings.seed), shown
    if settings.order == "average":
        return by_level(trials.losses(_telling("sorting blocks", notify))), shown
    if settings.order == "knapsack":
        worths = trials.worths(errors, _telling("measuring what hangs on each layer", notify))
        costs = {name: [worths[name] * cost for cost in own] for name, own in costs.items()}
    return by_saving(costs, trials.nbytes()), shown


def _telling(what: str, notify: Observer) -> Callable[[int, int], None]:
    begun = time.monotonic()

    def told(done: int, total: int) -> None:
        left = (time.monotonic() - begun) / done * (total - done) if done else None
        notify({"event": what, "step": done, "of": total, "seconds_left": left})

    return told


def _result(out: Path, begun: float) -> Stacked:
    with Stack.open(out) as opened:
        nbytes = sum(file.size for file in opened.checkpoint.files)
        return Stacked(
            out, opened.order, opened.blocks, len(opened.levels(0)), opened.nbytes(0), opened.nbytes(opened.blocks),
            nbytes, time.monotonic() - begun,
        )  # fmt: skip
