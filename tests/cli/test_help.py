"""Pages of help: every command has examples that can be typed, options in groups, and comes at once."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from feather_command import feather_here
from typer.main import get_command

import featherweight
from featherweight.cli.help import COMMANDS, EXAMPLES, GROUPS, group_of
from featherweight.cli.main import app

ROOT: Any = get_command(app)
NAMES = tuple(ROOT.commands)
UNGROUPED = {"--trust-remote-code", "--full", "--version", "--install-completion", "--show-completion"}


def test_every_command_stands_in_one_group() -> None:
    assert sorted(name for names in COMMANDS.values() for name in names) == sorted(NAMES)
    assert set(EXAMPLES) == {"feather", *NAMES}
    options = {option for command in ROOT.commands.values() for one in command.params for option in one.opts}
    assert {option for names in GROUPS.values() for option in names} <= options


@pytest.mark.parametrize("name", NAMES)
def test_page_of_a_command(name: str) -> None:
    page = feather_here(name, "--help")
    assert page.code == 0
    assert page == feather_here(name, "-h") == feather_here("help", name)
    assert "\nExamples:\n" in page.output
    for option in ROOT.commands[name].params:
        if option.param_type_name == "option":
            assert option.help, option.opts
            assert option.opts[0] in page.output
            grouped = [title for title, names in GROUPS.items() if option.opts[0] in names]
            assert len(grouped) == 1 or (not grouped and option.opts[0] in UNGROUPED), option.opts
            assert f"\n{group_of(name, option.opts[0])}:\n" in page.output
    assert all(len(line) <= 90 for line in page.output.splitlines())


def test_the_shortcut_shows_what_the_parser_shows(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit):
            app(args=arguments, prog_name="feather")
        assert feather_here(*arguments).output == capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_can_be_typed(name: str) -> None:
    for line, what in EXAMPLES[name]:
        assert what
        words = shlex.split(line.rpartition("| ")[2])
        assert words[0] == "feather"
        if "--set" in words:  # several changes behind one
            words = [word for word in words if "=" not in word or words[words.index(word) - 1] == "--set"]
        command = ROOT.commands[words[1]]
        assert name in ("feather", words[1]) or any(word.startswith(words[1]) for word in words)
        command.make_context(words[1], words[2:], resilient_parsing=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_can_be_quiet_and_speak_json(name: str) -> None:
    options = {option for one in ROOT.commands[name].params for option in one.opts}
    assert {"--quiet", "--json"} <= options


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["report", "-h"]])
def test_help_waits_for_nothing_large(arguments: list[str]) -> None:
    """What takes seconds to import is imported by the commands that need it, not by their pages."""
    source = str(Path(featherweight.__file__).parents[1])
    large = ("torch", "transformers", "numpy", "matplotlib", "jinja2", "safetensors")
    code = "import sys; from featherweight.cli.entry import run; from featherweight.cli.main import app\n"
    code += f"try:\n run(app, {arguments!r})\nexcept SystemExit:\n pass\n"
    code += f"print(*sorted(set({large!r}) & sys.modules.keys()), file=sys.stderr)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, env={"PYTHONPATH": source, "PATH": ""}, timeout=60, text=True)
    assert "Usage: feather" in done.stdout, done.stderr
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """The shell's script, and what it gets: commands, options, names of presets."""
    source = str(Path(featherweight.__file__).parents[1])
    asked = {
        "bash": ("COMP_WORDS", "COMP_CWORD", "complete_bash"),
        "zsh": ("_TYPER_COMPLETE_ARGS", "", "complete_zsh"),
        "fish": ("_TYPER_COMPLETE_ARGS", "", "complete_fish"),
    }
    words, place, instruction = asked[shell]
    line = "feather compress MODEL --recipe gptq-3-a"
    environment = {"PYTHONPATH": source, "PATH": "", "_FEATHER_COMPLETE": instruction, words: line}
    if place:
        environment[place] = "4"
    if shell == "fish":
        environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    program = "from featherweight.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert "gptq-3-actorder" in done.stdout, done
