"""Wrong uses of the command as one sentence: what, where, and the nearest right thing.

The parser (click, by way of typer) raises errors for them; which of its modules they are from depends on typer's
version, so they are told by their attributes.
"""

from __future__ import annotations

import re
from typing import Any

import typer
import typer.main

from featherweight.registry import nearest

GUESSES = {
    "--output": "--out",
    "-o": "--out",
    "--outdir": "--out",
    "--output-dir": "--out",
    "--method": "--recipe",
    "--preset": "--recipe",
    "--config": "--recipe",
    "-r": "--recipe",
    "--dataset": "--calibration",
    "--data": "--calibration",
    "--force": "--overwrite",
    "-f": "--overwrite",
    "--n-predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "-n": "--max-tokens",
    "-p": "--prompt",
    "-t": "--threads",
    "--temp": "--temperature",
    "--ctx": "--context",
    "--verbose": "--quiet",
    "-v": "--version",
    "--bits": "--set",
    "--original": "--against",
    "--reference": "--against",
    "--memory": "--max-memory",
    "--ram": "--max-memory",
    "--gpu": "--device",
    "--cuda": "--device",
    "--format": "--to",
    "--outtype": "--set",
    "--engine": "--target",
    "--tp": "--tensor-parallel",
}
"""What other tools call it -> what it is called here, where the command has that option."""
HINTS = {
    "--bits": "how many bits is a field of the recipe: --set grid.bits=3",
    "--verbose": "everything is said unless --quiet is given",
    "--gpu": "a GPU is chosen by --device cuda",
    "--cuda": "a GPU is chosen by --device cuda",
    "--outtype": "the type of matrices is a setting of the format: --set type=q8_0",
}
"""Of those, what needs more words than a name."""
VERBS = {
    "quantize": "compress",
    "quantise": "compress",
    "convert": "export",
    "save-as": "export",
    "evaluate": "eval",
    "perplexity": "eval",
    "measure": "eval",
    "run": "chat",
    "list": "methods",
    "recipes": "methods",
    "presets": "methods",
    "info": "inspect",
    "show": "inspect",
    "benchmark": "bench",
    "choose": "recommend",
    "suggest": "recommend",
    "complete": "generate",
    "version": "--version",
}
"""What people call a command -> the command."""


KINDS = {"int": "a whole number", "integer": "a whole number", "float": "a number", "number": "a number"}
"""What the parser, or pydantic, calls a kind of value -> what people do."""


def usage_sentence(error: Any, app: typer.Typer, arguments: list[str]) -> tuple[str, int]:
    """What to print for a parser's error, and the exit code. Without a command, or arguments, that is the help."""
    context = getattr(error, "ctx", None) or _context_of(app, arguments)
    path = context.command_path
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        return error.format_message(), error.exit_code
    makers = {"NoSuchOption": _no_such_option, "MissingParameter": _missing, "BadParameter": _bad_value}
    if kind in makers:
        text = makers[kind](error, context, path)
    elif found := re.search(r"No such command '(.*?)'", error.format_message()):
        text = _no_such_command(found[1], context)
    elif found := re.search(r"extra argument(?:s|\(s\))? \((.*)\)", error.format_message()):
        text = f"{path} does not know what {found[1]!r} is for: {_stray(arguments)}{_see(path)}"
    elif found := re.search(r"'(-[\w-]+)' requires an argument", error.format_message()):
        text = f"{path}: {found[1]} lacks its value{_asked(found[1], context)}{_see(path)}"
    else:
        text = f"{path}: {_begun_small(error.format_message()).rstrip('.')}{_see(path)}"
    return f"error: {text}", error.exit_code


def _stray(arguments: list[str]) -> str:
    """Where values belong."""
    if "--set" in arguments:
        return "a change is written --set FIELD=VALUE, without blanks"
    return "a value stands behind its option, and a text with blanks in quotation marks"


def _context_of(app: typer.Typer, arguments: list[str]) -> Any:
    """Of the command that the arguments name, for errors that come without one."""
    root: Any = typer.main.get_command(app)
    context = root.context_class(root, info_name="feather")
    command = root.commands.get(arguments[0]) if arguments else None
    return context if command is None else root.context_class(command, info_name=arguments[0], parent=context)


def _see(path: str) -> str:
    return f"; {path} --help shows how it is used"


def _options(context: Any) -> dict[str, Any]:
    """Names of the command's options, those that are hidden too, but for short forms -> the options."""
    return {name: one for one in context.command.params for name in one.opts if name.startswith("--")}


def _no_such_option(error: Any, context: Any, path: str) -> str:
    name = error.option_name
    known, others = _options(context), _commands_with(name, context)
    text = f"{path} has no option {name}"
    meant = GUESSES.get(name)
    if meant in known:
        return f"{text}: {HINTS[name]}" if name in HINTS else f"{text} (did you mean {meant!r}?){_see(path)}"
    if others:
        return f"{text}, which is one of {' and '.join(others)}{_see(path)}"
    return f"{text}{nearest(name, [*known, '--help'])}{_see(path)}"


def _commands_with(name: str, context: Any) -> list[str]:
    """Other commands that have an option of this name."""
    root = context.find_root().command
    commands = getattr(root, "commands", {})
    having = (other for other, command in commands.items() if any(name in one.opts for one in command.params))
    return [f"feather {other}" for other in having if f"feather {other}" != context.command_path]


def _missing(error: Any, context: Any, path: str) -> str:
    one = error.param
    if one is None:
        return f"{path}: {_begun_small(error.format_message()).rstrip('.')}{_see(path)}"
    name = one.opts[0] if one.param_type_name == "option" else (one.metavar or one.human_readable_name)
    value = f" {one.metavar}" if one.param_type_name == "option" and one.metavar else ""
    more = f": {_begun_small(one.help).rstrip('.')}" if one.help else ""
    return f"{path} needs {name}{value}{more}{_see(path)}"


def _bad_value(error: Any, context: Any, path: str) -> str:
    one = error.param
    name = one.opts[0] if one is not None else (error.param_hint or "a value")
    return f"{path}: {name} {_in_words(_begun_small(error.message).rstrip('.'), error.__cause__ or error.__context__)}"


def _in_words(reason: str, cause: Any) -> str:
    """The parser's reason: `0 is not in the range x>=1`, or what pydantic says, which the value does not stand in."""
    if hasattr(cause, "errors"):
        first = cause.errors()[0]
        expected = re.sub(r"^input should be( a valid)? ?|, unable to parse.*", "", reason)
        expected = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}.get(
            expected, expected
        )
        return f"is {_plain(first['input'])}, expected {expected}"
    if found := re.fullmatch(r"(.*) is not in the range (.*)", reason):
        return f"is {found[1]}, expected {_range(found[2])}"
    if found := re.fullmatch(r"(.*) is not a valid (\w+).*", reason):
        return f"is {found[1]}, expected {KINDS.get(found[2], found[2])}"
    return f"is wrong: {reason}"


def _plain(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _range(text: str) -> str:
    """`x>=1` and `1<=x<=16` in words."""
    if found := re.fullmatch(r"x>=?(.*)", text):
        return f"{found[1]} or more"
    if found := re.fullmatch(r"(.*?)<=?x<=?(.*)", text):
        return f"a number from {found[1]} to {found[2]}"
    return text


def _asked(name: str, context: Any) -> str:
    """What an option's value is, for its name."""
    one = _options(context).get(name) if context is not None else None
    if one is None or not one.help:
        return ""
    return f"{' ' + one.metavar if one.metavar else ''}: {_begun_small(one.help).rstrip('.')}"


def _no_such_command(name: str, context: Any) -> str:
    commands = list(getattr(context.find_root().command, "commands", {}))
    meant = VERBS.get(name.lower())
    guess = f" (did you mean {meant!r}?)" if meant else nearest(name, commands)
    return f"there is no command {name!r}{guess}; there are {', '.join(commands)}"


def _begun_small(text: str) -> str:
    """A sentence as a part of another."""
    text = " ".join(text.split())
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text
