"""The page that `--help` shows: options in groups, and examples that can be typed as they stand."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "Choose": ("recommend", "plan", "methods"),
    "Compress": ("compress", "fit", "stack", "calibrate", "converse", "import"),
    "Train": ("train", "heal"),
    "Measure": ("eval", "bench", "report", "inspect", "verify"),
    "Use": ("chat", "generate", "demo"),
    "Take elsewhere": ("export", "check"),
}
"""Which commands stand together; a test sees that none is left out."""

GROUPS = {
    "Other tools": ("--to", "--target", "--tensor-parallel"),
    "Model and recipe": ("--recipe", "--set", "--calibration", "--base-model", "--needs", "--seed"),
    "What is measured": (
        "--against",
        "--original",
        "--text",
        "--conversations",
        "--tasks",
        "--items",
        "--protocol",
        "--context",
        "--limit",
        "--windows",
        "--tokens",
        "--repeats",
    ),
    "Goal": (
        "--ram",
        "--size",
        "--bits",
        "--budget",
        "--quality",
        "--data-free",
        "--choices",
        "--alike",
        "--rounds",
        "--sensitivity",
        "--tokens-per-second",
        "--blocks",
        "--rank",
        "--order",
    ),
    "Training": (
        *("--config", "--tokenizer", "--held-out", "--minutes", "--steps", "--level", "--window", "--loss"),
        *("--learning-rate", "--batch", "--accumulate", "--length", "--eval-every", "--log-every", "--save-every"),
        *("--score-text", "--training"),
    ),
    "Text": ("--prompt", "--prompt-file", "--system", "--max-tokens", "--no-history", "--generate"),
    "Sampling": ("--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty"),
    "Conversations": ("--count", "--turns"),
    "Machine": (
        *("--threads", "--workers", "--device", "--max-memory", "--max-device-memory", "--engine", "--dtype"),
        "--kv-cache",
    ),
    "Output": ("--out", "--overwrite", "--json", "--html", "--title", "--record", "--quiet"),
}
"""Which options stand together on every page; those of no group come last."""
OTHERS = "Others"
SAMPLERS = ("generate", "chat", "converse")
"""Commands whose --seed is that of the sampling."""

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "feather": (
        ("feather recommend MODEL --ram 8GB", "what fits, and the command that makes it"),
        ("feather compress MODEL --recipe trit-2 --out small", "make it; the same command goes on after a stop"),
        ("feather eval small --against MODEL", "what it costs"),
        ("feather chat small", "try it"),
    ),
    "compress": (
        ("feather compress MODEL --recipe rtn-4 --out small", "seconds, without data"),
        ("feather compress MODEL --recipe trit-2 --out small --calibration texts.jsonl", "with text of your own"),
        ("feather compress MODEL --recipe gptq --set grid.bits=3 embedding=6bit --out small", "a recipe, changed"),
    ),
    "fit": (
        ("feather fit MODEL --size 60MB --out small", "the best file of at most this size"),
        ("feather fit MODEL --bits 3 --out small --html front.html", "with a page about what other sizes would give"),
    ),
    "heal": (
        ("feather heal small --against MODEL --out healed", "a quarter of an hour, on the shipped text"),
        ("feather heal small --against MODEL --out healed --minutes 120 --text mine.txt", "longer, on your own"),
        ("feather heal small --against MODEL --out healed --level blocks", "where the model does not fit at once"),
    ),
    "stack": (
        ("feather stack MODEL --out stack", "once"),
        ("feather chat stack --size 60MB", "as much of it as fits"),
        ("feather stack stack --size 60MB --out small", "the same as a folder of its own"),
    ),
    "train": (
        ("feather train MODEL --recipe tequila --out trained --text texts.jsonl", "on from a model"),
        ("feather train --config MODEL --recipe trilm --out trained --steps 2000", "from scratch"),
        ("feather train --config MODEL --recipe full --out control", "the same without rounding"),
    ),
    "calibrate": (
        ("feather calibrate MODEL --out stats.safetensors", "once"),
        ("feather compress MODEL --recipe gptq --calibration stats.safetensors --out small", "as often as you like"),
    ),
    "converse": (("feather converse MODEL --out talks.jsonl --count 64", "conversations that the model writes"),),
    "plan": (
        ("feather plan MODEL", "a dozen presets side by side"),
        ("feather plan MODEL --recipe trit-2", "one of them in full"),
    ),
    "recommend": (
        ("feather recommend MODEL --ram 8GB", "the best that runs in so much memory"),
        ("feather recommend MODEL --size 2GB", "the best file of at most this size"),
        ("feather recommend MODEL --quality 5", "the smallest that costs at most 5 % of perplexity"),
    ),
    "eval": (
        ("feather eval small --against MODEL", "perplexity, divergence from the original, size"),
        ("feather eval small --against MODEL --text mine.txt --limit 4096", "on a part of your own text"),
        ("feather eval small --against MODEL --tasks novels-choice,novels-cloze", "right answers, and which were lost"),
        ("feather eval one two --against MODEL --html both.html", "two results beside each other"),
    ),
    "report": (
        ("feather report small", "what a folder records, as report.html"),
        ("feather report one two --original MODEL --out both.html", "two of them, with the original's weights"),
    ),
    "generate": (
        ('feather generate small --prompt "Once upon a time"', "continue a text"),
        ("feather generate small --prompt-file story.txt --max-tokens 500", "from a file"),
        ("echo Hello | feather generate small --prompt -", "from a pipe"),
    ),
    "chat": (
        ("feather chat small", "/help there lists what can be typed"),
        ('feather chat small --system "Answer in one sentence."', "with instructions"),
    ),
    "import": (("feather import model.gguf --out model", "another tool's file as a folder"),),
    "inspect": (("feather inspect small", "layers, codes, bits, errors"),),
    "verify": (("feather verify small", "every byte against its hash"),),
    "methods": (
        ("feather methods", "all presets, a line each"),
        ("feather methods gptq", "one of them in full"),
    ),
    "bench": (
        ("feather bench small", "tokens/s"),
        ("feather bench small --prompt 128 --generate 256 --threads 4", "of another length, on four threads"),
    ),
    "export": (
        ("feather export small --to gguf --out small.gguf", "one file for llama.cpp, codes as they are"),
        ("feather export MODEL --to gguf --out q4.gguf --set type=q4_k_m", "by llama.cpp's own encoder"),
        ("feather export small --to gguf --out exact.gguf --set lossless=true", "the same values, at any size"),
    ),
    "check": (("feather check small --target llama.cpp", "whether it runs there, and what is lost"),),
    "demo": (("feather demo --out demo-out", "some minutes; then open demo-out/report.html"),),
}


class Command(TyperCommand):
    """A command whose page has its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_groups(self, ctx, formatter)
        _write_examples(str(self.name), formatter)


class Group(TyperGroup):
    """The page of `feather` itself: commands first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        _write_groups(self, ctx, formatter)
        _write_examples("feather", formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Commands by what they are for, each with the first sentence of its help."""
        for title, names in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, _first_sentence(self.commands[name].help or "")) for name in names])


def _first_sentence(text: str) -> str:
    return text.split("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".") + "."


def _write_groups(command: Any, ctx: Any, formatter: Any) -> None:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.get_params(ctx) if one.param_type_name == "option"]
    if arguments:
        with formatter.section("Arguments"):
            formatter.write_dl([(one.metavar or one.name, one.help or "") for one in arguments])
    for title in (*GROUPS, OTHERS):
        records = [one.get_help_record(ctx) for one in options if group_of(str(command.name), one.opts[0]) == title]
        if records := [record for record in records if record is not None]:
            with formatter.section(title):
                formatter.write_dl([(_plain_kind(names), text) for names, text in records])


def _plain_kind(names: str) -> str:
    """`--top-k N` for `--top-k <int range>`, or what other releases of typer write."""
    number = re.sub(r" (<(int|float)( range)?>|(INTEGER|FLOAT)( RANGE)?)$", " N", names)
    return number.replace(" <str>", " NAME")


def group_of(command: str, option: str) -> str:
    """The title under which an option stands on a command's page."""
    if option == "--seed" and command in SAMPLERS:
        return "Sampling"
    if option == "--text" and command == "train":
        return "Training"
    return next((title for title, names in GROUPS.items() if option in names), OTHERS)


def _write_examples(name: str, formatter: Any) -> None:
    if not EXAMPLES.get(name):
        return
    with formatter.section("Examples"):
        for line, what in EXAMPLES[name]:
            if len(line) + len(what) + 4 + formatter.current_indent <= formatter.width:
                formatter.write(f"{'':{formatter.current_indent}}{line}  # {what}\n")
            else:
                formatter.write(f"{'':{formatter.current_indent}}# {what}\n{'':{formatter.current_indent}}{line}\n")
