"""The command itself, to which the modules that hold commands add them."""

from __future__ import annotations

from typing import Annotated

import typer

from featherweight.cli.help import Group

app = typer.Typer(
    name="feather",
    cls=Group,
    help=(
        "Make the weights of language models small, measure what it costs, and run the result.\n\n"
        "FEATHERWEIGHT_THREADS in the environment sets the number of threads, as --threads does for one command. "
        "Ctrl-C ends every command, with exit code 130."
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from featherweight.version import __version__

        print(f"featherweight {__version__}")
        raise typer.Exit
