"""What can be typed in a chat beside a turn, how the context makes room, and what is said of answers that were cut."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from feather_command import feather_here

from featherweight.cli.conversation import COMMANDS, HELP, Talk
from featherweight.model.text.documents import BUNDLED
from featherweight.system.state import MOST_LINES, History, state_folder


class Counting:
    """A model whose tokens are the letters of what is said."""

    has_template = True
    last = None

    def __init__(self, context: int | None = None) -> None:
        self.context = context

    def prompt(self, messages: Any) -> str:
        return "".join(message["content"] for message in messages)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(map(ord, text))

    def read(self, tokens: list[int], told: Any) -> None:
        """Nothing to read."""

    def write(self, tokens: list[int], settings: Any) -> str:
        return "answer"


def talk(context: int | None = None, most: int = 10) -> tuple[Talk, list[str]]:
    said: list[str] = []
    return Talk(Counting(context), said.append, most), said


def test_commands_are_no_turns() -> None:
    one, said = talk()
    for line in ("hello", "//exit", "/one\ntwo"):
        assert not one.command(line)
    for line in ("/help", "/reset", "/system Be brief.", "/system", "/sav x"):
        assert one.command(line)
    assert one.turns == []
    assert said[0] == HELP
    assert said[2:4] == ["the system message is set", "the system message is: Be brief."]
    assert "did you mean '/save'?" in said[4]
    assert all(name in HELP for name in COMMANDS)


def test_reset_keeps_the_system_message() -> None:
    one, _ = talk()
    one.command("/system Be brief.")
    one.asked("question")
    one.answered(" answer ")
    assert [message["content"] for message in one.messages] == ["Be brief.", "question", "answer"]
    one.command("/reset")
    assert [message["content"] for message in one.messages] == ["Be brief."]


def test_a_full_context_drops_the_oldest_turns_and_says_so() -> None:
    one, said = talk(context=40)
    one.system = "S" * 4
    for number in range(3):
        assert one.asked(str(number) * 10) is not None
        one.answered("a" * 2)
    assert "".join(map(chr, one.asked("x" * 10) or [])) == "SSSS" + "2" * 10 + "aa" + "x" * 10
    assert said == [
        "the context of 40 tokens is full: the oldest turn is forgotten",
        "the context of 40 tokens is full: the oldest turn is forgotten",
    ]
    assert one.asked("y" * 50) is None
    assert "that is 54 tokens, and the context has 40: shorten it" in said[-1]


def test_a_text_that_is_too_long_costs_no_turns() -> None:
    """Everything before it would have gone for nothing."""
    one, said = talk(context=40)
    one.asked("short")
    one.answered("a")
    assert one.asked("y" * 50) is None
    assert [turn["content"] for turn in one.turns] == ["short", "a"]
    assert len(said) == 1


def test_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("mine")
    one, said = talk()
    one.command("/save")
    assert "nothing to save" in said[-1]
    one.asked("é?")
    one.answered("yes")
    one.command("/save mine.jsonl")
    assert "exists already" in said[-1]
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    one.command("/save talk.jsonl")
    one.asked("more?")
    one.answered("no")
    one.command("/save")  # into the same file
    line = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert [message["content"] for message in line["messages"]] == ["é?", "yes", "more?", "no"]
    one.command("/save nowhere/talk.jsonl")
    assert said[-1].startswith("error: cannot write")
    other, _ = talk()
    other.asked("a")
    other.answered("b")
    other.command("/save")
    assert sorted(path.name[:5] for path in tmp_path.iterdir()) == ["chat-", "mine.", "talk."]


def test_chat_from_a_pipe(compressed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = "Hello\n/nothing\n/system Be brief.\n//exit\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    done = feather_here("chat", compressed, "--max-tokens", 5, "--temperature", 0, "--json", tmp_path / "talk.json")
    assert done.code == 0, done.errors
    assert done.output.count("model: ") == 2
    assert "there is no /nothing" in done.errors
    assert "tokens/s" in done.errors.splitlines()[-1]
    found = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in found if message["role"] != "assistant"] == [
        "Be brief.",
        "Hello",
        "/exit",
    ]


def test_answers_that_are_cut(compressed: Path) -> None:
    """By the number that was asked for, and by the context."""

    def end(*options: Any) -> dict[str, Any]:
        done = feather_here("generate", compressed, "--temperature", 0, *options, "--json", "-")
        assert done.code == 0, done.errors
        return dict(json.loads(done.output))

    cut = end("--prompt", "It was", "--max-tokens", 3)
    assert (cut["end"], cut["tokens"]) == ("limit", 3)
    assert cut["tokens_per_second"] > 0
    full = end("--prompt", "x" * 120, "--max-tokens", 500)
    assert full["end"] == "context"
    assert 128 <= full["prompt_tokens"] + full["tokens"] <= 129  # the last one is written and not read
    other = end("--prompt", "It was", "--max-tokens", 3, "--engine", "transformers")
    assert (other["end"], other["tokens"], other["prompt_tokens"]) == ("limit", 3, cut["prompt_tokens"])


def test_a_long_prompt_is_read_in_parts(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written behind it is the same, and nothing is read twice."""
    from featherweight.cli import backends
    from featherweight.cli.backends import BackendSettings, GenerationSettings, open_backend

    settings = GenerationSettings(8, 0.0, None, None, 0)
    tokens = list(BUNDLED.read_bytes()[:100])
    whole = open_backend(BackendSettings(str(compressed), engine="native")).write(tokens, settings)
    monkeypatch.setattr(backends, "PART", 16)
    backend = open_backend(BackendSettings(str(compressed), engine="native"))
    told: list[tuple[int, int]] = []
    backend.read(tokens, lambda done, total: told.append((done, total)))
    assert told == [(place, 100) for place in range(0, 96 - 15, 16)]
    before = backend.model.stats().prompt_tokens  # type: ignore[attr-defined]
    assert backend.write(tokens, settings) == whole
    assert backend.model.stats().prompt_tokens - before <= 16  # type: ignore[attr-defined]
    told.clear()
    backend.read(tokens, lambda done, total: told.append((done, total)))
    assert told == []


@pytest.mark.parametrize("form", ["file", "file -", "pipe"])
def test_prompts_from_files_and_pipes(
    form: str, compressed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "It was\nthe best\n"
    (tmp_path / "prompt.txt").write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    options = {"file": ("--prompt-file", tmp_path / "prompt.txt"), "file -": ("--prompt-file", "-")}
    settings = ("--max-tokens", 5, "--temperature", 0)
    done = feather_here("generate", compressed, *options.get(form, ("--prompt", "-")), *settings)
    assert done.output == feather_here("generate", compressed, "--prompt", text.removesuffix("\n"), *settings).output
    assert done.code == 0


def test_history() -> None:
    first = History("chat")
    for text in ("one", "two\nlines", "two\nlines", "é"):
        first.add(text)
    assert History("chat").entries == ["one", "two\nlines", "é"]
    folder = state_folder()
    assert folder is not None
    path = folder / "chat.jsonl"
    assert os.name == "nt" or path.stat().st_mode & 0o077 == 0
    path.write_text(path.read_text() + 'half a li\n{"a": 1}\n' + "".join(f'"{n}"\n' for n in range(MOST_LINES)))
    kept = History("chat").entries
    assert len(kept) == MOST_LINES
    assert kept[-1] == str(MOST_LINES - 1)
    assert len(path.read_text().splitlines()) == MOST_LINES
    private = History("chat", keep=False)
    private.add("secret")
    assert private.entries == ["secret"]
    assert "secret" not in path.read_text()


def test_a_history_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history = History("chat")
    history.add("one")
    assert history.entries == ["one"]
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder() is None
    History("chat").add("two")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
