"""From the arguments of a process to a command, and from whatever ends it to an exit code and one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from featherweight.cli import console

INTERRUPTED = 130
PIPE_CLOSED = 141
"""What a shell says of a program that wrote into a pipe nobody reads: 128 and the number of SIGPIPE."""
RESUMES = ("compress", "converse")
"""Commands that go on where they stopped."""


def run_process(app: typer.Typer, arguments: list[str]) -> None:
    """`run` where the process is ours: it ends at once after Ctrl-C, without taking its modules apart first."""
    from featherweight.cli.interrupts import Interrupts

    with Interrupts(_last_words(arguments)):
        try:
            run(app, arguments)
        except SystemExit as stop:
            if stop.code == INTERRUPTED:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(INTERRUPTED)
            raise


def run(app: typer.Typer, arguments: list[str]) -> None:
    """Run a command. It ends in SystemExit.

    Code 0, 1 after an error that is one sentence, 2 after a wrong use, 130 after Ctrl-C, 141 where nobody reads on.
    """
    from featherweight.errors import FeatherError

    arguments = _help_first(_one_set_each(arguments))
    console.begin()
    _make_streams_safe()
    code: Any = None
    try:
        if (page := _help_page(app, arguments)) is not None:
            print(page)
        else:
            with _warnings_as_notes():
                code = app(args=arguments, prog_name="feather", standalone_mode=False)
        sys.stdout.flush()
    except FeatherError as error:
        _stop(f"error: {error}", 2 if isinstance(error, console.WrongUse) else 1)
    except KeyboardInterrupt:
        _stop(_last_words(arguments), INTERRUPTED)
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        _nobody_reads()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer has seen it before
            _nobody_reads()
        raise
    except MemoryError:
        _stop("error: out of memory; set --max-memory or use a machine with more", 1)
    except Exception as error:
        _known_kinds(error, app, arguments)
        raise
    else:
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            _stop(_last_words(arguments), INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _known_kinds(error: Exception, app: typer.Typer, arguments: list[str]) -> None:
    """Wrong uses, and what a device says, by their names: their modules are not imported for this."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        from featherweight.cli.usage import usage_sentence

        text, code = usage_sentence(error, app, arguments)
        _stop(text, code)
    if type(error).__name__ == "Abort":  # the input ended where something was asked
        _stop("error: the input ended too early", 1)
    if isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError":  # torch's own
        remedy = "free some of it, set --max-device-memory, lower calibration.length, or take --device cpu"
        _stop(f"error: the device is out of memory; {remedy}", 1)


def _one_set_each(arguments: list[str]) -> list[str]:
    """`--set a=1 b=2` is `--set a=1 --set b=2`."""
    spread: list[str] = []
    within = False
    for argument in arguments:
        if within and re.match(r"[a-z_]+(\.\w+)*=", argument) and spread[-1] != "--set":
            spread.append("--set")
        elif not (spread and spread[-1] == "--set"):
            within = argument == "--set"
        spread.append(argument)
    return spread


def _help_first(arguments: list[str]) -> list[str]:
    """`feather help compress` is `feather compress --help`."""
    return [*arguments[1:2], "--help"] if arguments[:1] == ["help"] and len(arguments) <= 2 else arguments


def _help_page(app: typer.Typer, arguments: list[str]) -> str | None:
    """What `feather --help` and `feather COMMAND --help` print; None where the arguments are others.

    The parser gives the same, but imports pydantic for it, which takes longer than all the rest.
    """
    if not 1 <= len(arguments) <= 2 or arguments[-1] not in ("-h", "--help"):
        return None
    from typer.main import get_command

    root: Any = get_command(app)
    context = root.context_class(root, info_name="feather", **root.context_settings)
    if len(arguments) == 1:
        return str(context.get_help())
    command = root.commands.get(arguments[0])
    if command is None:
        return None
    inner = command.context_class(command, info_name=arguments[0], parent=context, **command.context_settings)
    return str(inner.get_help())


def _make_streams_safe() -> None:
    """What a terminal without UTF-8 cannot show becomes a question mark; a closed stream becomes an empty one."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Our own warnings become notes, each said once."""
    from featherweight.errors import FeatherWarning

    show = warnings.showwarning
    said: set[str] = set()

    def shown(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if not issubclass(category, FeatherWarning):
            show(message, category, *rest, **named)
        elif str(message) not in said:
            said.add(str(message))
            console.note(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = shown
        warnings.simplefilter("always", FeatherWarning)
        yield


def _last_words(arguments: list[str]) -> str:
    resumes = arguments[:1] and arguments[0] in RESUMES
    return "interrupted; the same command goes on where it stopped" if resumes else "interrupted"


def _nobody_reads() -> Any:
    """The pipe is closed: nothing more is written, not even at the end of the process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(PIPE_CLOSED)


def _stop(text: str, code: int) -> Any:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)
