"""The command `feather`. Commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.app import app
from featherweight.cli.entry import run, run_process
from featherweight.cli.help import Command
from featherweight.cli.options import (
    Answering,
    Calibration,
    Changes,
    Device,
    DeviceMemory,
    Dtype,
    Engine,
    Items,
    JsonFile,
    KvCache,
    ModelArgument,
    OptionalRecipe,
    Quiet,
    Recipe,
    RunDevice,
    StackSize,
    Tasks,
    Threads,
    Trust,
    preset_names,
    task_names,
)
from featherweight.cli.sampling import MinP, RepetitionPenalty, SamplingSeed, Temperature, TopK, TopP


@app.command(cls=Command)
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
    device: Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="For recipes with random choices.")] = 0,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Stay below this resident memory: 2GB.")
    ] = None,
    max_device_memory: DeviceMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of ours.")] = False,
    trust_remote_code: Trust = False,
    workers: Annotated[
        int,
        typer.Option("--workers", metavar="N", min=1, help="Processes that share the layers; recipes without data."),
    ] = 1,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compress a model. Interrupted, the same command goes on where it stopped."""
    from featherweight.cli.commands import CompressOptions, run_compress

    options = CompressOptions(
        changes or [], calibration, base_model, threads, device, seed, max_memory, max_device_memory, overwrite,
        trust_remote_code, workers,
    )  # fmt: skip
    run_compress(model, recipe, out, options, json)


@app.command(cls=Command)
def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Statistics file to make (.safetensors).")],
    calibration: Calibration = None,
    needs: Annotated[
        str, typer.Option("--needs", metavar="NAMES", help="Statistics to gather, with commas between: gram, mean_abs.")
    ] = "gram,mean_abs,held_out_gram",
    changes: Changes = None,
    threads: Threads = None,
    device: Device = "cpu",
    max_device_memory: DeviceMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing statistics.")] = False,
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Gather the statistics of a model's layers once, for `compress --calibration FILE` to use again and again."""
    from featherweight.cli.calibrate import CalibrateOptions, run_calibrate

    options = CalibrateOptions(
        calibration, needs.split(","), changes or [], threads, device, max_device_memory, overwrite, trust_remote_code
    )
    run_calibrate(model, out, options, json)


@app.command(cls=Command)
def converse(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Conversations to make or write on (.jsonl).")],
    count: Annotated[int, typer.Option("--count", min=1, help="Conversations in the end.")] = 64,
    turns: Annotated[int, typer.Option("--turns", min=1, max=16, help="Questions of each, with their answers.")] = 2,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens an answer at most.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of prompts and the sampling.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Have a model write conversations through its chat template, to calibrate with or for `eval --conversations`.

    Prompts come with the package. Interrupted, the same command goes on where it stopped. `compress --calibration self`
    makes such a file by itself.
    """
    from featherweight.cli.converse import ConverseOptions, run_converse

    settings = {"turns": turns, "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = ConverseOptions(count, {**settings, "seed": seed}, threads, device, trust_remote_code)
    run_converse(model, out, options, json)


@app.command(cls=Command)
def plan(
    model: ModelArgument,
    recipe: OptionalRecipe = None,
    changes: Changes = None,
    threads: Threads = None,
    max_memory: Annotated[str | None, typer.Option("--max-memory", metavar="SIZE", help="As for compress.")] = None,
    device: Device = "cpu",
    max_device_memory: DeviceMemory = None,
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Say what compressing a model would do and need. Without a recipe, a dozen presets stand side by side."""
    from featherweight.cli.choose import run_choice
    from featherweight.cli.commands import PlanOptions, run_plan

    options = PlanOptions(changes or [], threads, max_memory, device, max_device_memory, trust_remote_code)
    if recipe is None:
        run_choice(model, options, json)
    else:
        run_plan(model, recipe, options, json)


@app.command(cls=Command)
def recommend(
    model: ModelArgument,
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="SIZE", help="Memory in which the result has to run: 8GB.")
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="SIZE", help="Most bytes of the file: 2GB.")] = None,
    quality: Annotated[
        str | None,
        typer.Option("--quality", metavar="PERCENT", help="Most perplexity that it may cost, in percent: 5."),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Only presets without text, which take minutes at most.")
    ] = False,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", metavar="SIZE", help="Memory to compress in; else what is free here."),
    ] = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Choose a preset by memory, size or quality. The command that makes it is printed.

    Among the presets that have all that is asked for it is the one that costs least quality; with --quality alone the
    smallest. Qualities are those that were measured on one small pretrained model: other models differ.
    """
    from featherweight.cli.choose import RecommendOptions, run_recommend

    options = RecommendOptions(ram, size, quality, max_memory, data_free, threads, trust_remote_code)
    run_recommend(model, options, json)


@app.command("eval", cls=Command)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="A folder, a .safetensors file or a hub id; several go side by side."),
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original: adds KL divergence, agreement.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="A UTF-8 file, also .xz or .gz; wikitext-2; or hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]; a shipped one if "
            "none.",
        ),
    ] = None,
    conversations: Annotated[
        Path | None,
        typer.Option(
            "--conversations",
            metavar="FILE",
            help="JSON lines (see `converse`): adds KL and agreement at the chat template's control tokens; needs "
            "--against.",
        ),
    ] = None,
    tasks: Tasks = None,
    items: Items = None,
    engine: Answering = "transformers",
    protocol: Annotated[str, typer.Option("--protocol", help="own, 2048, 4096, strided or llama.cpp.")] = "own",
    context: Annotated[int | None, typer.Option("--context", min=2, help="Window length in tokens.")] = None,
    dtype: Dtype = "auto",
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Use only the first N tokens.")] = None,
    size: StackSize = None,
    threads: Threads = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with the plot and the table.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep the result in folders of `compress`, for `report`.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity by a named protocol, true size, and the distance from the original.

    Several models are measured one after the other and shown in one table; their original is run once.
    """
    from featherweight.cli.evaluate import EvalOptions, Outputs, run_eval
    from featherweight.cli.stack import sized

    options = EvalOptions(
        against, text, conversations, task_names(tasks), items, engine, protocol, context, dtype, limit, threads,
        device, trust_remote_code,
    )  # fmt: skip
    run_eval([sized(model, size) for model in models], options, Outputs(json, html, record))


@app.command(cls=Command)
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue; - reads standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Text to continue, UTF-8, in a file.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at most.")] = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: SamplingSeed = 0,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    kv_cache: KvCache = "auto",
    size: StackSize = None,
    threads: Threads = None,
    device: RunDevice = None,
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Continue a text."""
    from featherweight.cli.backends import BackendSettings, GenerationSettings
    from featherweight.cli.generate import prompt_text, run_generate
    from featherweight.cli.stack import sized

    text = prompt_text(prompt, prompt_file)
    chosen = BackendSettings(sized(model, size), engine, dtype, kv_cache, threads, trust_remote_code, device)
    settings = GenerationSettings(max_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    run_generate(chosen, text, settings, json)


@app.command(cls=Command)
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens an answer at most.")] = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: SamplingSeed = 0,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    kv_cache: KvCache = "auto",
    size: StackSize = None,
    threads: Threads = None,
    device: RunDevice = None,
    trust_remote_code: Trust = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not remember what is said for the arrow keys of later chats.")
    ] = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Talk to a model. Its chat template is used if it has one.

    /help lists what can be typed. Ctrl-D or /exit ends; Ctrl-C ends an answer, or else the chat. A pasted text is one
    turn, whatever lines it has; so are lines that end in a backslash together with the next, also from a pipe. Where
    the context is full, the oldest turns are forgotten, which is said.
    """
    from featherweight.cli.backends import BackendSettings, GenerationSettings
    from featherweight.cli.generate import run_chat
    from featherweight.cli.stack import sized

    chosen = BackendSettings(sized(model, size), engine, dtype, kv_cache, threads, trust_remote_code, device)
    settings = GenerationSettings(max_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty)
    run_chat(chosen, system, settings, json, keep=not no_history)


@app.command(cls=Command)
def inspect(model: ModelArgument, json: JsonFile = None, quiet: Quiet = False) -> None:
    """Show what a folder holds: layers, codes, bits, errors."""
    from featherweight.cli.commands import run_inspect

    run_inspect(model, json)


@app.command(cls=Command)
def verify(model: ModelArgument, json: JsonFile = None, quiet: Quiet = False) -> None:
    """Check every tensor of a folder against its hash and its spec. Exit code 1 if anything is wrong."""
    from featherweight.cli.commands import run_verify

    run_verify(model, json)


@app.command(cls=Command)
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A preset, to tell all about.", autocompletion=preset_names)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All presets on all axes of the recipe space.")] = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """List the presets, or tell all about one."""
    from featherweight.cli.methods import run_methods

    run_methods(name, full, json)


@app.command(cls=Command)
def bench(
    model: ModelArgument,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option("--generate", min=1, help="Tokens to generate.")] = 64,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens before the generated ones; the prompt if not given.")
    ] = None,
    cache: KvCache = "auto",
    engine: Annotated[str, typer.Option("--engine", help="auto, native or transformers.")] = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each, of which the best counts.")] = 3,
    threads: Threads = None,
    device: RunDevice = None,
    trust_remote_code: Trust = False,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure prompt and generation speed, and the share of this machine's memory bandwidth."""
    from featherweight.cli.bench import BenchOptions, run_bench

    options = BenchOptions(prompt, generate, context, cache, engine, repeats, threads, trust_remote_code, device)
    run_bench(model, options, json)


@app.command(cls=Command)
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that `compress` made, side by side in this order.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to make (.html).")] = Path("report.html"),
    original: Annotated[
        str | None,
        typer.Option("--original", metavar="MODEL", help="What they were made from: adds its weights to the pictures."),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page; else the model's name.")] = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Write a page about your own runs: what they took, how good and how fast they are, which layer got what.

    It shows what `compress`, `eval` and `bench` recorded in the folders, and says what was not measured. One file that
    opens offline, also on a phone.
    """
    from featherweight.cli.report import run_report

    run_report(folders, out, original, title, json)


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for models and report.")] = Path("demo-out"),
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Tokens of the evaluation text to use.")] = 20480,
    threads: Threads = None,
    json: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compress the bundled model in every way there is, measure, and write a report."""
    from featherweight.cli.demo import run_demo

    run_demo(out, tokens, threads, json)


from featherweight.cli import more  # noqa: E402, F401  # adds its commands, which come after those above


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors made on purpose become one sentence and exit code 1."""
    if arguments is None:
        run_process(app, sys.argv[1:])
    else:
        run(app, arguments)


if __name__ == "__main__":
    main()
