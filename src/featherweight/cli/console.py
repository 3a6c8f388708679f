"""Where commands write: results to standard output, progress and notes to standard error, JSON to a file or a pipe.

`--quiet` silences progress and notes; `--json -` gives standard output to the JSON alone. NO_COLOR and TERM=dumb are
respected by rich, which draws everything here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import FeatherError
from featherweight.events import watch_steps

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STANDARD_OUTPUT = Path("-")
"""What `--json` is given for it."""
WIDE = 160
"""Columns of tables that go to a file or a pipe."""


class WrongUse(FeatherError):
    """Options that lack each other or do not go together; the exit code is that of every wrong use, 2."""


@dataclass
class Manner:
    """How the command that is running speaks."""

    quiet: bool = False
    json_alone: bool = False


manner = Manner()


def begin() -> None:
    """A command begins: nobody has asked for anything yet."""
    manner.quiet = manner.json_alone = False
    watch_steps(steps)


def be_quiet(value: bool) -> bool:
    """What `--quiet` does as soon as it is read; the hub's library looks for its wish in the environment."""
    if value:
        manner.quiet = True
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return value


def note(text: str) -> None:
    """Something that a person should know although the work goes on."""
    if not manner.quiet:
        print(f"note: {text}", file=sys.stderr, flush=True)


def out_console() -> Console:
    """Results go to standard output, at a width that does not cut tables when it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, quiet=manner.json_alone)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = WIDE
    return console


def say(text: str = "") -> None:
    """A line of the result, as it is."""
    put(f"{text}\n")


def put(text: str) -> None:
    """A piece of the result, seen at once."""
    if not manner.json_alone:
        print(text, end="", flush=True)


def tell(text: str) -> None:
    """A line beside the result, for people: how fast it was, what was cut."""
    if not manner.quiet:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def passing() -> Iterator[Callable[[str], None]]:
    """A line on the terminal that is written over, and gone at the end; nothing where there is no terminal."""
    shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not manner.quiet
    try:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True) if shown else None
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def error_console() -> Console:
    """Progress goes to standard error, so that standard output can be piped."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=manner.quiet)


def claim_json(path: Path | None, marks: Collection[str]) -> None:
    """OutputError before the work if the result cannot go to `path`: only a result of the same command is replaced.

    marks : keys that results of this command have
    """
    if path == STANDARD_OUTPUT:
        manner.json_alone = True
        return
    if path is None or not os.path.lexists(path):
        return
    from featherweight.errors import OutputError
    from featherweight.system.files import disk_errors

    if not path.is_file():
        raise OutputError(f"--json {path} exists and is no file; name a file of its own")
    try:
        with disk_errors(path):
            found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (ValueError, RecursionError):
        found = None
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, dict) or (found and not found.keys() >= set(marks)):
        raise OutputError(
            f"--json {path} exists and is no earlier result of this command, so it is not replaced; name another file"
        )


def write_json(path: Path | None, value: Any) -> None:
    """Write a result if asked for; folders are made as needed, the file appears complete. See `claim_json`."""
    if path is None:
        return
    from featherweight.system.files import disk_errors, to_json, write_text

    if path == STANDARD_OUTPUT:
        shown = to_json(value)
        wide = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        print(shown if wide else json.dumps(value, indent=2), end="" if wide else "\n", flush=True)
        return
    with disk_errors(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_text(path.absolute(), to_json(value))


def quiet_transformers() -> None:
    """Keep the library's own bars and advice out of our output; its errors become ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def facts(rows: list[tuple[str, str]]) -> Table:
    """A two-column table of facts. What is too long for a line goes on in the next: no path is cut."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


@contextmanager
def steps(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of something that reports (done, total): a bar on a terminal, a line for each tenth elsewhere."""
    console = error_console()
    if not console.is_terminal or console.is_dumb_terminal or console.quiet:
        spoken, before = -1, 0

        def notify(done: int, total: int) -> None:
            nonlocal spoken, before
            spoken, before = -1 if done < before else spoken, done  # a second part begins anew
            tenth = 10 * done // max(1, total)
            if tenth > spoken and not console.quiet:
                spoken = tenth
                print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

        yield notify
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
