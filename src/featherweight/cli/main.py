"""The command `feather`. Commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="feather",
    help="Make the weights of language models small, measure what it costs, and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all processors by default.")]
Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A preset (see `feather methods`) or YAML.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a recipe field: grid.planes=3.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="For recipes that run the network: .txt, .jsonl, .parquet, a folder, hf:DATASET, or a statistics file.",
    ),
]
Engine = Annotated[str, typer.Option("--engine", help="auto, native (the decoder for CPUs) or transformers.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
KvCache = Annotated[str, typer.Option("--kv-cache", help="Keys and values: auto, float16 or int8 (native only).")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the K likeliest; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample among this probability.")]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, help="Least share of the likeliest one's probability; else the model's."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", min=1e-6, help="Above 1, tokens that occurred are less likely; else the model's."
    ),
]
SamplingSeed = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .safetensors file or a hub id.")]
DirArgument = Annotated[str, typer.Argument(metavar="DIR", help="A model folder, compressed or not.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from featherweight import __version__

        print(f"featherweight {__version__}")
        raise typer.Exit


@app.command()
def compress(
    model: ModelArgument,
    recipe: Recipe,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")],
    changes: Changes = None,
    calibration: Calibration = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="MODEL", help="What MODEL was fine-tuned from, for recipes that compare."),
    ] = None,
    threads: Threads = None,
    seed: Annotated[int, typer.Option("--seed", help="For recipes with random choices.")] = 0,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Stay below this resident memory: 2GB.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of ours.")] = False,
    json: JsonFile = None,
) -> None:
    """Compress a model. Interrupted, the same command goes on where it stopped."""
    from featherweight.cli.commands import run_compress

    run_compress(model, recipe, out, changes or [], calibration, base_model, threads, seed, max_memory, overwrite, json)


@app.command()
def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Statistics file to make (.safetensors).")],
    calibration: Calibration = None,
    needs: Annotated[
        str, typer.Option("--needs", metavar="NAMES", help="Statistics to gather, with commas between: gram, mean_abs.")
    ] = "gram,mean_abs,held_out_gram",
    changes: Changes = None,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing statistics.")] = False,
    json: JsonFile = None,
) -> None:
    """Gather the statistics of a model's layers once, for `compress --calibration FILE` to use again and again."""
    from featherweight.cli.commands import run_calibrate

    run_calibrate(model, out, calibration, needs.split(","), changes or [], threads, overwrite, json)


@app.command()
def plan(
    model: ModelArgument,
    recipe: Recipe,
    changes: Changes = None,
    threads: Threads = None,
    max_memory: Annotated[str | None, typer.Option("--max-memory", metavar="SIZE", help="As for compress.")] = None,
    json: JsonFile = None,
) -> None:
    """Say what compressing a model would do and need, without doing it."""
    from featherweight.cli.commands import run_plan

    run_plan(model, recipe, changes or [], threads, max_memory, json)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original: adds KL divergence, agreement.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text, also .xz or .gz; a shipped one if none."),
    ] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="own, 2048, 4096, strided or llama.cpp.")] = "own",
    context: Annotated[int | None, typer.Option("--context", min=2, help="Window length in tokens.")] = None,
    dtype: Dtype = "auto",
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Use only the first N tokens.")] = None,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    """Measure perplexity by a named protocol, true size, and the distance from the original."""
    from featherweight.cli.commands import run_eval

    run_eval(model, against, text, protocol, context, dtype, limit, threads, json)


@app.command()
def generate(
    model: DirArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at most.")] = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: SamplingSeed = 0,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    kv_cache: KvCache = "auto",
    threads: Threads = None,
) -> None:
    """Continue a text."""
    from featherweight.cli.talk import run_generate
    from featherweight.cli.talkers import Choices

    choices = Choices(max_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    run_generate(model, prompt, choices, engine, dtype, kv_cache, threads)


@app.command()
def chat(
    model: DirArgument,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens an answer at most.")] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: SamplingSeed = 0,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    kv_cache: KvCache = "auto",
    threads: Threads = None,
) -> None:
    """Talk to a model, with its chat template if it has one. An empty line or Ctrl-D ends."""
    from featherweight.cli.talk import run_chat
    from featherweight.cli.talkers import Choices

    choices = Choices(max_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    run_chat(model, system, choices, engine, dtype, kv_cache, threads)


@app.command()
def inspect(model: DirArgument, json: JsonFile = None) -> None:
    """Show what a folder holds: layers, codes, bits, errors."""
    from featherweight.cli.commands import run_inspect

    run_inspect(model, json)


@app.command()
def verify(model: DirArgument) -> None:
    """Check every tensor of a folder against its hash and its spec. Exit code 1 if anything is wrong."""
    from featherweight.cli.commands import run_verify

    run_verify(model)


@app.command()
def methods(json: JsonFile = None) -> None:
    """List the presets as points in the recipe space."""
    from featherweight.cli.commands import run_methods

    run_methods(json)


@app.command()
def bench(
    model: DirArgument,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option("--generate", min=1, help="Tokens to generate.")] = 64,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens before the generated ones; the prompt if not given.")
    ] = None,
    cache: KvCache = "auto",
    engine: Annotated[str, typer.Option("--engine", help="auto, native or transformers.")] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each, of which the best counts.")] = 3,
    threads: Threads = None,
    json: JsonFile = None,
) -> None:
    """Measure prompt and generation speed, and the share of this machine's memory bandwidth."""
    from featherweight.cli.bench import run_bench

    run_bench(model, threads, prompt, generate, context, cache, engine, repeats, json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for models and report.")] = Path("demo-out"),
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Tokens of the evaluation text to use.")] = 40960,
    threads: Threads = None,
) -> None:
    """Compress the bundled model in every way there is, measure, and write a report."""
    from featherweight.cli.demo import run_demo

    run_demo(out, tokens, threads)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors made on purpose become one sentence and exit code 1."""
    from featherweight.errors import FeatherError

    arguments = _one_set_each(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=arguments, prog_name="feather")
    except SystemExit as stop:
        if stop.code == 130:  # typer turns Ctrl-C into this
            _interrupted(arguments)
        raise
    except FeatherError as error:
        _stop(f"error: {error}", 1)
    except KeyboardInterrupt:
        _interrupted(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        _stop("error: out of memory; set --max-memory or use a machine with more", 1)


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


def _interrupted(arguments: list[str]) -> None:
    resumes = arguments[:1] == ["compress"]
    _stop("interrupted; the same command goes on where it stopped" if resumes else "interrupted", 130)


def _stop(text: str, code: int) -> Any:
    print(text, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
