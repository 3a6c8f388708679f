"""More commands of `feather`: those that choose among methods, and those about other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.app import app
from featherweight.cli.help import Command
from featherweight.cli.options import (
    Calibration,
    Changes,
    Device,
    JsonFile,
    ModelArgument,
    Quiet,
    Sensitivity,
    TensorParallel,
    Threads,
    TokensPerSecond,
    TrainChanges,
    TrainRecipe,
    Trust,
    train_dtype,
)

FitTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="NAME",
        help="llama.cpp: ggml's own types compete, and OUT is a plain GGUF of them. vllm: what its kernels read. "
        "featherweight: everything, as without it.",
    ),
]
Choices = Annotated[
    str | None,
    typer.Option(
        "--choices",
        metavar="NAMES",
        help="What competes, with commas between: 1 plane, 2 planes, 3 planes, 3 bits, 4 bits, 5 bits, 6 bits, "
        "8 bits, and presets of single layers. Else all of the former.",
    ),
]


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
    choices: Choices = None,
    calibration: Calibration = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="Held-out text for the comparison; else the bundled one."),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Without text: rounding to nearest, layers count by their weights.")
    ] = False,
    target: FitTarget = None,
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


@app.command(cls=Command)
def heal(
    small: Annotated[str, typer.Argument(metavar="SMALL", help="The compressed folder; it is not changed.")],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The original that it was made from.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="What the whole command may take; 15 unless steps are given.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Of the training, in place of minutes.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE", help="What it learns from, as --calibration of compress; some megabytes."
        ),
    ] = None,
    level: Annotated[
        str,
        typer.Option("--level", help="model: digits, scales, norms at once; blocks: a few blocks at a time; scales."),
    ] = "model",
    window: Annotated[int, typer.Option("--window", min=1, help="With --level blocks: how many go together.")] = 1,
    loss: Annotated[
        str, typer.Option("--loss", help="kl: the predictions; states: the last hidden states; mixed.")
    ] = "kl",
    training: Annotated[
        str, typer.Option("--training", help="latents: digits nearest to latent values; cat-q: for one trit-plane.")
    ] = "latents",
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of Adam, relative to each scale; 0.005, cat-q 0.0015.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows of text a step.")] = 2,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option("--windows", min=4, help="Most windows of text that are read.")] = 4096,
    score_text: Annotated[
        str | None, typer.Option("--score-text", metavar="FILE", help="Held-out text for the scores; else the bundled.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Tokens of it before and after; 0: none.")] = 16384,
    threads: Threads = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the text.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of ours.")] = False,
    trust_remote_code: Trust = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with the curve.")
    ] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model against its original, in the same bytes. Digits, scales and norms move.

    Held-out windows choose the step that is kept, so the result is never worse on them. Interrupted, the same command
    goes on where it stopped.
    """
    from featherweight.cli.heal import run_heal

    settings = {
        "minutes": minutes, "steps": steps, "level": level, "window": window, "loss": loss, "batch": batch,
        "training": training, "learning_rate": learning_rate, "length": length, "windows": windows, "score": limit,
        "seed": seed,
    }  # fmt: skip
    options = {
        "text": text, "score_text": score_text, "threads": threads, "device": device, "overwrite": overwrite,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    run_heal(small, against, out, settings, options, (html, json))


@app.command(cls=Command)
def stack(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME|FILE", help="A preset or file that makes sums of blocks.")
    ] = "bitstack",
    changes: Changes = None,
    blocks: Annotated[int, typer.Option("--blocks", min=2, max=64, help="Of each layer, about a bit a weight.")] = 6,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Of a block's magnitudes; else the recipe's.")
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            "--order",
            metavar="NAME",
            help="average: by perplexity, level by level; knapsack: error saved a byte times what hangs on the layer; "
            "local: error saved a byte, without running the model; random.",
        ),
    ] = "average",
    calibration: Calibration = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Of text to measure an order on.")] = 2048,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", help="MODEL is a stack: OUT is what of it fits into so many bytes."),
    ] = None,
    threads: Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of ours.")] = False,
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Decompose a model once into blocks, sorted by their worth, of which any number is a model.

    `eval`, `generate` and `chat` take a stack with --size and use as many blocks as fit; `stack DIR --size 50MB --out
    OTHER` cuts such a part out as an ordinary folder. Interrupted, the same command goes on where it stopped.
    """
    from featherweight.cli.stack import StackOptions, run_cut, run_stack

    if size is not None:
        run_cut(model, out, size, json)
        return
    options = StackOptions(recipe, changes or [], blocks, rank, order, tokens, seed)
    given = {"calibration": calibration, "threads": threads, "overwrite": overwrite}
    run_stack(model, out, options, {**given, "trust_remote_code": trust_remote_code}, json)


@app.command(cls=Command)
def train(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    recipe: TrainRecipe,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to go on from; or --config, to begin anew.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="PATH", help="A config.json of any architecture, or its folder: from scratch."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="A folder with one; else the model's own.")
    ] = None,
    changes: TrainChanges = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="To train on: .txt, .jsonl, .parquet, a folder, hf:DATASET, or a mixture by weight (ONE=0.9,TWO=0.1). "
            "Else the shipped one.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out", metavar="TEXT", help="To evaluate on; else the last windows of the text, kept apart."
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the optimiser.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows that are run at a time.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches whose gradients make a step.")] = 1,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a window.")] = 256,
    eval_every: Annotated[int, typer.Option("--eval-every", min=1, help="Steps between evaluations.")] = 100,
    log_every: Annotated[int, typer.Option("--log-every", min=1, help="Steps between lines of the log.")] = 10,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between savings; else a minute or more.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of first weights, windows and their order.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of activations: auto, float32 or bfloat16; weights are trained in float32.")
    ] = "auto",
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of ours.")] = False,
    trust_remote_code: Trust = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with curves.")] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Train a model whose layers have few bits, from scratch or on from a checkpoint.

    Layers are trained with the values that are stored, so that the folder runs at once and loses nothing more. Killed
    at any moment, the same command goes on where it stopped, to the same bits. Recipes of trainings are bitnet-b158,
    trilm, tequila, sherry-train, hgf, ofq-weights, tbt-weights and full.
    """
    from featherweight.cli.train import TrainOptions, run_train

    options = TrainOptions(
        out, recipe, model, config, tokenizer, text, held_out, changes or [], device, threads, overwrite,
        trust_remote_code,
    )  # fmt: skip
    settings = {
        "steps": steps, "batch": batch, "accumulate": accumulate, "length": length, "eval_every": eval_every,
        "log_every": log_every, "save_every": save_every, "seed": seed, "dtype": train_dtype(dtype),
    }  # fmt: skip
    run_train(options, settings, html, json)


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
