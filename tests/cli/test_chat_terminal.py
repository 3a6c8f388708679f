"""`feather chat` at a terminal: what is pasted is one turn, an empty line is none, and nothing gets to the shell."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featherweight.cli import generate
from featherweight.cli.backends import AnswerStopped, BackendSettings, GenerationSettings
from featherweight.cli.prompt import END_MARKS, PASTE, PASTED, open_listener
from interrupts import restore_signal

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

CHAT = """
import sys, time
from featherweight.cli import generate
from featherweight.cli.backends import AnswerStopped, BackendSettings, GenerationSettings
from featherweight.cli.interrupts import Interrupts

class Backend:
    has_template, context, last = True, None, None
    def read(self, tokens, told): pass
    def prompt(self, messages): return repr([m["content"] for m in messages if m["role"] != "system"])
    def encode(self, text, special=True): return [text]
    def write(self, tokens, choices):
        try:  # Ctrl-C may come as soon as the line is seen
            print("<" + tokens[0] + ">", flush=True)
            if "slowly" in tokens[0].split(", ")[-1]:
                time.sleep(60)
        except KeyboardInterrupt:
            raise AnswerStopped("a part") from None
        return "answer"

generate.open_backend = lambda settings: Backend()
with Interrupts("interrupted"):
    try:
        generate.run_chat(BackendSettings(""), None, GenerationSettings(1, 0.0, 0, 1.0, 0))
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.exit(130)
print("ended", flush=True)
"""


class Chat:
    """The program above on a pseudo-terminal."""

    def __init__(self) -> None:
        child, self.number = pty.fork()
        if child == 0:
            restore_signal()
            os.execv(sys.executable, [sys.executable, "-c", CHAT])
        self.child, self.seen = child, ""
        self.wait("you: ")

    def say(self, text: str) -> None:
        os.write(self.number, text.encode())

    def wait(self, text: str, seconds: float = 60) -> str:
        """Output up to and with `text`, from where the last wait ended."""
        last = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < last, self.seen
            if select.select([self.number], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.number, 65536).decode()
                except OSError:  # the child is gone
                    break
        assert text in self.seen, self.seen
        found, self.seen = self.seen[: self.seen.index(text) + len(text)], self.seen.split(text, 1)[1]
        return found

    def mode(self) -> int:
        return int(termios.tcgetattr(self.number)[3])

    def code(self) -> int:
        with_rest = threading.Timer(30, os.kill, (self.child, signal.SIGKILL))
        with_rest.start()
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        finally:
            with_rest.cancel()


@pytest.fixture
def chat() -> Iterator[Chat]:
    opened = Chat()
    yield opened
    os.close(opened.number)


def test_a_pasted_text_is_one_turn(chat: Chat) -> None:
    chat.say(PASTE + "first\r\r/exit\rrm -rf x\r" + PASTED + "\r")
    chat.wait(repr(["first\n\n/exit\nrm -rf x"]))
    chat.wait("you: ")
    chat.say("before " + PASTE + "a\rb" + PASTED + " behind\r")
    chat.wait("'before a\\nb behind'")
    chat.wait("you: ")
    chat.say("\x04")
    assert END_MARKS in chat.wait("ended")
    assert chat.code() == 0


def test_marks_cut_anywhere(chat: Chat) -> None:
    for key in PASTE + "é\x1b[31m\r\x1b" + PASTED + "\r":
        chat.say(key)
        time.sleep(0.005)
    chat.wait("'é[31m'")


def test_an_empty_line_is_no_turn_and_no_end(chat: Chat) -> None:
    chat.say("\r")
    chat.wait("you: ")
    chat.say("  \r")
    chat.wait("you: ")
    chat.say("hello\r")
    chat.wait("<['hello']>")
    chat.wait("you: ")
    chat.say("/exit\r")
    chat.wait("ended")
    assert chat.code() == 0


def test_editing(chat: Chat) -> None:
    chat.say("wrong\x15two words\x17x\x1b[A\x1b[3~\x1bOP日\x7f!\x7f\x7f\x7f\x7f\x7f\x7f\x7fwo\\\rnext\r")
    chat.wait("'wo\\nnext'")


def test_arrow_keys_bring_back_what_was_said(chat: Chat) -> None:
    """In this chat and in later ones; what was being typed is still there behind it."""
    for text in ("one", "two"):
        chat.say(f"{text}\r")
        chat.wait(f"'{text}']>")
        chat.wait("you: ")
    chat.say("dr\x1b[A\x1b[A\x1b[A\x1b[B\x1bOB!\r")
    chat.wait("'dr!']>")
    chat.wait("you: ")
    chat.say("\x1b[A\x1bOA\r")
    chat.wait("'two']>")
    again = Chat()
    again.say("\x1b[A\r")
    again.wait("<['two']>")
    os.close(again.number)


def test_ctrl_c_ends_the_answer_then_the_chat(chat: Chat) -> None:
    before = chat.mode()
    assert not before & termios.ICANON
    chat.say("slowly\r")
    chat.wait("<['slowly']>")
    chat.say("\x03")
    chat.wait("you: ")
    chat.say("on\r")
    chat.wait("<['slowly', 'a part', 'on']>")
    chat.wait("you: ")
    chat.say("half a line\x03")
    assert END_MARKS in chat.wait("stopped")
    assert chat.code() == 130


def test_what_is_pasted_while_the_model_answers_waits(chat: Chat) -> None:
    chat.say("slowly\r")
    chat.wait("<['slowly']>")
    chat.say(PASTE + "one\r\rtwo" + PASTED)
    time.sleep(0.1)
    # Ctrl-C throws typed input away, as terminals do; the chat goes on.
    chat.say("\x03")
    chat.wait("you: ")
    chat.say("three\r")
    chat.wait("three")


def test_what_nobody_read_does_not_reach_the_shell() -> None:
    """The terminal of a shell: what a chat that has ended left unread would be its next commands."""
    shell, terminal = pty.openpty()
    lines: list[str | None] = []
    before = termios.tcgetattr(terminal)
    stdin, stdout = sys.stdin, sys.stdout
    sys.stdin, sys.stdout = os.fdopen(os.dup(terminal)), os.fdopen(os.dup(terminal), "w")
    try:
        with open_listener() as listener:
            os.write(shell, b"hello\r/exit\rrm -rf x\r")
            lines += [listener.listen(), listener.listen()]
            os.write(shell, b"more\r")
    finally:
        sys.stdin.close()
        sys.stdout.close()
        sys.stdin, sys.stdout = stdin, stdout
    assert lines == ["hello", None]
    assert termios.tcgetattr(terminal) == before
    assert not select.select([terminal], [], [], 0.1)[0]


def test_lines_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter(["one", "", "  ", "two \\", "", "three\\", "four"])

    def read(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    with open_listener() as listener:
        found = []
        while (said := listener.listen()) is not None:
            found.append(said)
    assert found == ["one", "two", "three\nfour"]


class Stopping:
    """A model that is interrupted in its first answer."""

    has_template = True
    context = last = None

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def prompt(self, messages: Any) -> str:
        self.asked.append([message["content"] for message in messages])
        return ""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [1]

    def read(self, tokens: list[int], told: Any) -> None:
        """Nothing to read."""

    def write(self, tokens: list[int], settings: GenerationSettings) -> str:
        if len(self.asked) == 1:
            raise AnswerStopped("what there was ")
        return "all"


def test_a_part_of_an_answer_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, said = Stopping(), iter(["one", "two"])

    def read(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(generate, "open_backend", lambda settings: backend)
    generate.run_chat(BackendSettings(""), None, GenerationSettings(1, 0.0, 0, 1.0, 0))
    assert backend.asked == [["one"], ["one", "what there was", "two"]]
