"""Terminals and homes as they are elsewhere: nothing breaks, and nothing is asked."""

from __future__ import annotations

import io
import json
import locale
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from feather_command import feather_here

import featherweight

SOURCE = str(Path(featherweight.__file__).parents[1])
PLAIN = {"PYTHONPATH": SOURCE, "PATH": os.environ.get("PATH", ""), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
FEATHER = f"{sys.executable} -m featherweight"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash, its exit code that of the first program that fails in a pipe."""
    command = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(
        command, capture_output=True, env=PLAIN | environment, timeout=240, stdin=subprocess.DEVNULL, check=False
    )


class Ascii(io.TextIOWrapper):
    """A terminal without UTF-8."""

    def __init__(self, terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def shown(self) -> str:
        self.flush()
        raw = self.buffer
        assert isinstance(raw, io.BytesIO)
        return raw.getvalue().decode("ascii")


@pytest.mark.parametrize("columns", ["40", "20", "1"])
def test_narrow_terminals(columns: str, llama: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    commands: list[tuple[Any, ...]] = [
        ("--help",),
        ("eval", "--help"),
        ("methods",),
        ("methods", "trit-2"),
        ("methods", "--full"),
        ("inspect", compressed),
        ("plan", llama, "--recipe", "gptq"),
    ]
    for command in commands:
        done = feather_here(*command)
        assert done.code == 0, done.errors
        assert done.output
    if columns == "40":
        assert max(len(line) for line in feather_here("methods").output.splitlines()) <= 40


def test_letters_that_cannot_be_shown(compressed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model knows bytes alone: what it writes is no ASCII."""
    from featherweight.cli.main import main

    written = json.loads(
        feather_here(
            "generate", compressed, "--prompt", "é", "--temperature", 0, "--max-tokens", 20, "--json", "-"
        ).output
    )
    assert not written["text"].isascii()
    for arguments in (["generate", str(compressed), "--prompt", "é", "--temperature", "0"], ["methods", "trit-2"]):
        out, errors = Ascii(), Ascii()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", errors)
            with pytest.raises(SystemExit):
                main(arguments)
        assert out.shown()
    out = Ascii(terminal=False)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        command = ["generate", str(compressed), "--prompt", "é", "--temperature", "0", "--max-tokens", "20"]
        with pytest.raises(SystemExit):
            main([*command, "--json", "-"])
    assert json.loads(out.shown())["text"] == written["text"]  # JSON loses nothing


def test_a_pipe_that_is_closed_early() -> None:
    for line in (f"{FEATHER} methods | head -1", f"{FEATHER} methods --json - | head -1", f"{FEATHER} -h | true"):
        done = shell(line)
        assert done.stderr == b"", line
        assert done.returncode in (0, 141), line


def test_closed_streams(compressed: Path) -> None:
    for line in (f"{FEATHER} methods gptq >&-", f"{FEATHER} chat {compressed} <&-", f"{FEATHER} methods gptq 2>&- <&-"):
        done = shell(line)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("home", ["/dev/null", "", "/proc/nowhere"])
def test_a_home_that_cannot_be_written(home: str, compressed: Path) -> None:
    line = f"printf 'Hello\\n' | {FEATHER} chat {compressed} --max-tokens 3 --temperature 0"
    done = shell(line, HOME=home)
    assert done.returncode == 0, done.stderr
    assert b"model: " in done.stdout
    assert b"Traceback" not in done.stderr
    assert b"rror" not in done.stderr


def test_no_network(tmp_path: Path) -> None:
    for command in (("plan",), ("recommend",), ("inspect",), ("eval",), ("chat",)):
        said = feather_here(*command, "somebody/no-such-model-here").last_sentence()
        assert "somebody/no-such-model-here" in said
        assert "local folder" in said


def test_a_locale_with_commas(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are written with points, and read so."""
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "de_DE.utf8"):
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue
        break
    try:
        command = ("generate", compressed, "--prompt", "It was", "--temperature", "0.5", "--json", "-")
        assert json.loads(feather_here(*command).output)["seconds"] >= 0
        assert "4.156" in feather_here("methods", "gptq").output
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, with NO_COLOR: no sequence sets a colour (3x and 4x of `ESC [ ... m`)."""
    import re

    from featherweight.cli.main import main

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for arguments in (["methods", "--full"], ["methods", "gptq"]):
        out = Ascii()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            with pytest.raises(SystemExit):
                main(arguments)
        assert not re.search(r"\x1b\[(\d+;)*[34]\d(;\d+)*m", out.shown())


def test_quiet(llama: Path, tmp_path: Path) -> None:
    """Results alone: no progress, no notes; what the JSON has is the same."""
    out = tmp_path / "out"
    loud = feather_here("compress", llama, "--recipe", "rtn-4", "--out", out)
    assert loud.errors
    done = feather_here("compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "again", "-q")
    assert done.code == 0
    assert done.errors == ""
    assert "bits per weight" in done.output
    assert feather_here("verify", out, "--quiet").errors == ""
    said = feather_here("generate", out, "--prompt", "It", "--max-tokens", 3, "--quiet")
    assert said.errors == ""
    refused = feather_here("compress", llama, "--recipe", "rtn-5", "--out", out, "--quiet")
    assert "rtn-5" in refused.sentence()


def test_json_on_standard_output(llama: Path, compressed: Path) -> None:
    """Nothing but the JSON, whatever the command shows otherwise."""
    commands: list[tuple[Any, ...]] = [
        ("methods",),
        ("methods", "gptq"),
        ("inspect", compressed),
        ("verify", compressed),
        ("plan", llama, "--recipe", "rtn-4"),
        ("recommend", llama, "--size", "1GB"),
        ("generate", compressed, "--prompt", "It was", "--max-tokens", 3),
    ]
    for command in commands:
        done = feather_here(*command, "--json", "-")
        assert done.code == 0, done.errors
        assert json.loads(done.output)
