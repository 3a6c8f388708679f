"""More commands of `feather`: those that choose among methods, and those about other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.app import app
from featherweight.cli.help import Command
from featherweight.cli.options import (
    Calibration,
    JsonFile,
    ModelArgument,
    Quiet,
    Sensitivity,
    TensorParallel,
    Threads,
    TokensPerSecond,
    Trust,
)


@app.command(cls=Command)
def fit(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    size: Annotated[str | None, typer.Option("--size", metavar="SIZE", help="Most bytes of the file: 2GB.")] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="The same as bits a parameter, all that is stored counted: 2.8.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="SIZE", help="Memory in which the result has to run: 8GB.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="With --ram: tokens of keys and values.")] = 4096,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="POOLS",
            help="Bytes of codes by layers' names, each pool kept: 'experts=12GB,rest=6GB'.",
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices",
            metavar="NAMES",
            help="What competes, with commas between: 1 plane, 2 planes, 3 planes, 3 bits, 4 bits, 5 bits, 6 bits, "
            "8 bits, and presets of single layers. Else all of the former.",
        ),
    ] = None,
    calibration: Calibration = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Held-out text for the comparison; else the bundled one."),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Without text: rounding to nearest, layers count by their weights.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="llama.cpp: ggml's own types compete, and OUT is a plain GGUF of them. vllm: what its kernels read. "
            "featherweight: everything, as without it.",
        ),
    ] = None,
    sensitivity: Sensitivity = "kl",
    tensor_parallel: TensorParallel = 1,
    tokens_per_second: TokensPerSecond = None,
    alike: Annotated[
        bool,
        typer.Option("--alike", help="Queries, keys and values go one way, as do gate and up: what programs fuse."),
    ] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="In which the true model corrects the choice; 0: none.")
    ] = 2,
    windows: Annotated[int, typer.Option("--windows", min=2, help="Of 1024 tokens to calibrate with.")] = 64,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Tokens to compare the result on; 0: none.")] = 16384,
    threads: Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="For choices with random numbers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of ours.")] = False,
    trust_remote_code: Trust = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with the front.")
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Make the best model of at most so many bytes. Every choice competes for every layer.

    What each choice costs in each layer is measured once and kept in the cache, so that another size of the same model
    takes much less. Interrupted, the same command goes on where it stopped.
    """
    from featherweight.cli.fit import FitOptions, Goal, run_fit

    names = [name.strip() for name in choices.split(",")] if choices is not None else []
    options = FitOptions(
        names, calibration, text, data_free, alike, rounds, windows, limit, threads, seed, overwrite, trust_remote_code,
        target, sensitivity, tensor_parallel, tokens_per_second,
    )  # fmt: skip
    run_fit(model, out, Goal(size, bits, ram, context, budget), options, html, json)


@app.command("import", cls=Command)
def import_(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to make; nothing may be there.")],
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Make a folder of what another tool has written, values unchanged. Other commands take such a MODEL as it is."""
    from featherweight.cli.imports import run_import

    run_import(model, out, json)


@app.command(cls=Command)
def check(
    model: ModelArgument,
    target: Annotated[str, typer.Option("--target", metavar="NAME", help="The program that is to run it: llama.cpp.")],
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="N", min=1, help="Processes that share each matrix.")
    ] = 1,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Say whether a program runs a model and what would be lost, before any work. Exit code 1 if it does not."""
    from featherweight.cli.export import run_check

    run_check(model, target, tensor_parallel, json)


@app.command(cls=Command)
def export(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The other tool's format: gguf.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File or folder to make; nothing may be there.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the format: type=q8_0.")
    ] = None,
    threads: Threads = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Write a model in another tool's format. What each tensor becomes, exactly or with which error, is shown.

    Codes that the format has a place for are taken over without being rounded again; what cannot be written is said
    before anything is. A wrong --to or --set lists what there is.
    """
    from featherweight.cli.export import run_export

    run_export(model, to, out, changes or [], threads, json)
