"""`feather fit`: the goal as bytes, progress, and the result as a short table."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from featherweight.cli.console import WrongUse, claim_json, error_console, facts, out_console, write_json
from featherweight.cli.progress import Watcher
from featherweight.system.units import parse_size, size_text, time_text

TARGETS: tuple[Literal["llama.cpp", "vllm", "featherweight"], ...] = ("llama.cpp", "vllm", "featherweight")
SHOWN = 7
"""Points of the front in the terminal, the made one in their middle."""


@dataclass(frozen=True)
class Goal:
    """What was asked for; exactly one of size, bits, ram and budget."""

    size: str | None
    bits: float | None
    ram: str | None
    context: int
    budget: str | None

    def check(self) -> None:
        asked = [name for name in ("size", "bits", "ram", "budget") if getattr(self, name) is not None]
        if len(asked) != 1:
            said = "none of them is there" if not asked else f"there are --{' and --'.join(asked)}"
            raise WrongUse(f"a fit needs one of --size 2GB, --bits 2.8, --ram 8GB and --budget POOLS, and {said}")
        if self.bits is not None and not 0 < self.bits < 64:
            raise WrongUse(f"--bits {self.bits:g} is not between 0 and 64")

    def nbytes(self, model: str, trust_remote_code: bool) -> int | None:
        """Bytes of the weight files; None where pools say what layers may take."""
        from featherweight.storage.checkpoint.checkpoint import Checkpoint
        from featherweight.tasks.compress.presets import run_memory

        if self.budget is not None:
            return None
        if self.size is not None:
            return parse_size(self.size, "--size")
        with Checkpoint.open(model) as checkpoint:
            checkpoint.trust_remote_code = trust_remote_code
            if self.bits is not None:
                return int(self.bits * checkpoint.parameters / 8)
            assert self.ram is not None
            ram, beside = parse_size(self.ram, "--ram"), run_memory(checkpoint.config, 0, self.context)
        if ram <= beside:
            raise WrongUse(
                f"--ram {self.ram} is less than what a process takes beside the weights, with keys and values of "
                f"{self.context} tokens: {size_text(beside)}"
            )
        return ram - beside


@dataclass(frozen=True)
class FitOptions:
    """Keywords of `featherweight.fit` and its settings."""

    choices: list[str]
    calibration: str | None
    text: str | None
    data_free: bool
    alike: bool
    rounds: int
    windows: int
    limit: int
    threads: int | None
    seed: int
    overwrite: bool
    trust_remote_code: bool
    target: str | None
    sensitivity: str = "kl"
    tensor_parallel: int = 1
    tokens_per_second: float | None = None

    def check(self) -> None:
        if self.target not in (None, *TARGETS):
            said = ", ".join(TARGETS)
            raise WrongUse(f"--target {self.target} is no program that a fit makes files for: there are {said}")
        if self.tokens_per_second is not None and not 0 < self.tokens_per_second < float("inf"):
            raise WrongUse(f"--tokens-per-second {self.tokens_per_second:g} is no rate: give a number above 0")
        if self.target == "llama.cpp" and self.tokens_per_second is not None:
            raise WrongUse("--tokens-per-second is by this program's kernels, and --target llama.cpp has its own")


def run_fit(model: str, out: Path, goal: Goal, options: FitOptions, html: Path | None, json: Path | None) -> None:
    from featherweight.tasks.fit.choosing import pools_of
    from featherweight.tasks.fit.fitting import fit
    from featherweight.tasks.fit.settings import FitSettings

    claim_json(json, ("bytes", "budget", "front"))
    goal.check()
    options.check()
    target = next((name for name in TARGETS if name == options.target), None)
    settings = FitSettings(
        target=target,
        sensitivity=options.sensitivity,
        tensor_parallel=options.tensor_parallel,
        tokens_per_second=options.tokens_per_second,
        ways=tuple(options.choices),
        data_free=options.data_free,
        alike=options.alike,
        pools=() if goal.budget is None else pools_of(goal.budget),
        refine=options.rounds,
        windows=options.windows,
        score=options.limit,
        seed=options.seed,
    )
    with contextlib.ExitStack() as stack:
        watcher = stack.enter_context(Watcher(error_console()))
        result = fit(
            model, out, goal.nbytes(model, options.trust_remote_code), settings=settings,
            calibration=options.calibration, text=options.text, threads=options.threads, overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code, observer=watcher,
        )  # fmt: skip
    report = result.to_json()
    write_json(json, report)
    if html is not None:
        from featherweight.tasks.report.fit_page import write_fit_page

        write_fit_page(html, report, Path(model).name)
    show(result)


def show(result: Any) -> None:
    """The result, which layers went which way, and the front around it."""
    console = out_console()
    counts = ", ".join(f"{count} x {name}" for name, count in sorted(result.choices.items()))
    rows = [("output", str(result.out)), ("size", _size(result)), ("layers", counts)]
    if result.kl is not None:
        rows.append(("KL to the original", f"{result.kl:.4f} nats a token"))
    if result.perplexity is not None and result.perplexity_of_original is not None:
        rows.append(("perplexity", f"{result.perplexity:.3f} (original {result.perplexity_of_original:.3f})"))
    if result.linear_model is not None:
        found = result.linear_model
        rows.append(("sums of layers", f"R² {found.r2:.3f}, {100 * found.relative_error:.0f} % off (median)"))
    if result.tokens_per_second is not None:
        rows.append(("products alone", f"{result.tokens_per_second:.1f} tokens/s by measured rates"))
    rows.append(("time", time_text(result.seconds)))
    console.print(facts(rows))
    table = Table(box=None, pad_edge=False)
    for name in ("size", "KL", "perplexity", ""):
        table.add_column(name, justify="left" if not name else "right")
    for point in _around(result.front):
        perplexity = "-" if point.perplexity is None else f"{point.perplexity:.3f}"
        made = "made, measured" if point.chosen and result.kl is not None else "made" if point.chosen else ""
        table.add_row(size_text(point.bytes), f"{point.kl:.4f}", perplexity, made)
    console.print(table)


def _size(result: Any) -> str:
    of = "" if result.budget is None else f" of {size_text(result.budget)}"
    return f"{size_text(result.bytes)}{of}, {result.bits:.2f} bits a parameter"


def _around(front: Any) -> list[Any]:
    """The points of the front about the made one."""
    made = next((place for place, point in enumerate(front) if point.chosen), 0)
    first = max(0, min(made - SHOWN // 2, len(front) - SHOWN))
    return list(front[first : first + SHOWN])
