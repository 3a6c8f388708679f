"""Conversations that a model writes: the same however often it is stopped, of this model and these settings alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import CalibrationError, OutputError
from featherweight.methods.calibrate.settings import CalibrationSettings, ConversationSettings
from featherweight.model.text.documents import read_documents
from featherweight.model.text.mixture import Mixture
from featherweight.model.text.windows import conversation_tokens, conversation_windows, windows
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.data import text_windows
from featherweight.tasks.converse import prompts, writers
from featherweight.tasks.converse.conversations import Conversations, conversations_for, converse
from featherweight.tasks.converse.file import ConversationFile
from models import CHAT_TEMPLATE, END, START, chat_tokenizer, make_chat

SHORT = {"max_tokens": 12, "turns": 2}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat(tmp_path_factory.mktemp("chat") / "model")


def written(model: Path, path: Path, count: int, **settings: Any) -> bytes:
    with Checkpoint.open(model) as checkpoint:
        converse(Conversations(checkpoint, ConversationSettings(**(SHORT | settings))), path, count)
    return path.read_bytes()


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_after(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    add, seen = ConversationFile.add, 0

    def stopping(self: ConversationFile, row: dict[str, Any]) -> None:
        nonlocal seen
        if seen == rows:
            raise KeyboardInterrupt
        seen += 1
        add(self, row)

    monkeypatch.setattr(ConversationFile, "add", stopping)


def test_stopped_is_as_uninterrupted(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(chat, tmp_path / "whole.jsonl", 23)
    path = tmp_path / "stopped.jsonl"
    part = tmp_path / "stopped.jsonl.part"
    for more in (5, 9):
        with monkeypatch.context() as patch:
            stop_after(patch, more)
            with pytest.raises(KeyboardInterrupt):
                written(chat, path, 23)
        assert not path.exists()
    assert len(part.read_bytes().splitlines()) == 1 + 14
    with part.open("ab") as stream:
        stream.write(b'{"messages": [{"role"')  # the power failed within a line
    assert written(chat, path, 23) == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["stopped.jsonl", "whole.jsonl"]


def test_what_is_written_does_not_depend_on_what_is_written_with_it(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = written(chat, tmp_path / "together.jsonl", 7)
    monkeypatch.setattr(writers.NativeWriter, "together", 1)
    assert written(chat, tmp_path / "alone.jsonl", 7) == together
    assert written(chat, tmp_path / "few.jsonl", 3) == b"".join(together.splitlines(keepends=True)[:4])
    assert written(chat, tmp_path / "few.jsonl", 7) == together
    assert written(chat, tmp_path / "other.jsonl", 7, seed=1) != together


def test_a_file_that_is_there_needs_no_model(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(chat, tmp_path / "talks.jsonl", 4)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the model is opened")

    monkeypatch.setattr("featherweight.tasks.converse.conversations.open_writer", refuse)
    assert written(chat, tmp_path / "talks.jsonl", 4) == before
    assert written(chat, tmp_path / "talks.jsonl", 2) == before


class Scripted:
    """Answers of as many letters as the script says, in the order of the questions; the last one for ever."""

    together = 1

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.seen = list(lengths), []

    def write(self, asked: Any, most: int, seeds: Any) -> list[list[int]]:
        self.seen.extend(asked)
        found = []
        for _ in asked:
            length = self.lengths.pop(0) if len(self.lengths) > 1 else self.lengths[0]
            found.append([64] * min(length, most))
        return found


def test_turns_and_limits(chat: Path, tmp_path: Path) -> None:
    """An answer that the limit of tokens cuts is the conversation's last one, and no end of a turn follows it."""
    path = tmp_path / "talks.jsonl"
    with Checkpoint.open(chat) as checkpoint:
        settings = ConversationSettings(turns=3, max_tokens=10, top_p=0.9)
        writer = Scripted(3, 99, 10, 9, 4)
        converse(Conversations(checkpoint, settings, writer=writer), path, 3)
        tokenizer = Conversations(checkpoint, settings).tokenizer
    header, *rows = rows_of(path)
    assert header["featherweight_conversations"] == 1
    assert (header["seed"], header["turns"], header["max_tokens"]) == (0, 3, 10)
    assert (header["temperature"], header["top_p"], header["top_k"]) == (0.8, 0.9, 50)  # the folder says nothing
    answers = [[len(m["content"]) for m in row["messages"] if m["role"] == "assistant"] for row in rows]
    assert answers == [[3, 10], [10], [9, 4, 4]]
    assert [row["finished"] for row in rows] == [False, False, True]
    for row, document in zip(rows, read_documents(path), strict=True):
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        ids = conversation_tokens(tokenizer, document)
        assert (ids[-1] == 64) is not row["finished"]
        assert ids.count(END) == len(row["messages"]) - (not row["finished"])


def test_prompts_are_many_and_each_comes_once() -> None:
    count = len({prompts.opening(n, 0, 1).questions for n in range(255)})
    assert count == 255
    assert prompts.opening(255, 0, 1) != prompts.opening(0, 0, 1)
    assert [prompts.opening(n, 0, 3) for n in range(9)] == [prompts.opening(n, 0, 3) for n in range(9)]
    assert [prompts.opening(n, 1, 3) for n in range(9)] != [prompts.opening(n, 0, 3) for n in range(9)]
    assert any(prompts.opening(n, 0, 1).tools for n in range(255))


def test_tools_reach_the_template(tmp_path: Path) -> None:
    number = next(n for n in range(255) if prompts.opening(n, 0, 2).tools)
    for template in (CHAT_TEMPLATE, CHAT_TEMPLATE.replace("tools", "things")):
        model = make_chat(tmp_path / str(len(template)), template=template)
        with Checkpoint.open(model) as checkpoint:
            talk = Conversations(checkpoint, ConversationSettings(**SHORT), writer=(writer := Scripted(5)))
            row = talk.write([number])[0]
            text = talk.tokenizer.decode(writer.seen[0])
        assert ("tools" in row) is ('"parameters"' in text) is (template == CHAT_TEMPLATE)


def test_another_model_or_other_settings_are_refused(chat: Path, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    before = written(chat, path, 2)
    with pytest.raises(
        CalibrationError, match=r"talks.jsonl were made with other settings \(seed is 0, not 1\): remove"
    ):
        written(chat, path, 2, seed=1)
    other = make_chat(tmp_path / "other", seed=3)
    with pytest.raises(CalibrationError, match="were made with another model"):
        written(other, path, 2)
    assert path.read_bytes() == before
    for content, words in (
        (b"", "is empty"),
        (b"not json\n", "no file of conversations that featherweight wrote"),
        (b'{"messages": []}\n', "no file of conversations that featherweight wrote"),
        (before + b"{}\n", "line 4 of the conversations .* is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=words):
            written(chat, path, 2)
        assert path.read_bytes() == content
    with pytest.raises(OutputError, match=r"must end with \.jsonl"):
        written(chat, tmp_path / "talks.txt", 2)


def test_models_that_cannot(tmp_path: Path) -> None:
    silent = make_chat(tmp_path / "silent", template=None)
    with pytest.raises(CalibrationError, match="need a model with a chat template, and .*silent has none"):
        written(silent, tmp_path / "talks.jsonl", 1)
    strict = make_chat(tmp_path / "strict", template="{{ raise_exception('not today') }}")
    with pytest.raises(CalibrationError, match=r"conversation 1 of self cannot be written: .*not today"):
        written(strict, tmp_path / "talks.jsonl", 1)
    narrow = make_chat(tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    with pytest.raises(CalibrationError, match="its first question is .* tokens in the chat template"):
        written(narrow, tmp_path / "talks.jsonl", 1)


def test_a_template_without_system_messages(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHAT_TEMPLATE
    written(make_chat(tmp_path / "model", template=strict), tmp_path / "talks.jsonl", 8)
    assert {row["messages"][0]["role"] for row in rows_of(tmp_path / "talks.jsonl")[1:]} == {"user"}


def test_transformers_writes_what_the_native_decoder_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_chat(tmp_path / "model", "gpt2")
    whole = written(model, tmp_path / "whole.jsonl", 3)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            written(model, tmp_path / "stopped.jsonl", 3)
    assert written(model, tmp_path / "stopped.jsonl", 3) == whole
    assert len(rows_of(tmp_path / "whole.jsonl")) == 4


def test_windows_are_those_of_the_first_conversations(chat: Path, tmp_path: Path) -> None:
    """However many conversations the file has already."""
    path = tmp_path / "talks.jsonl"
    with Checkpoint.open(chat) as checkpoint:
        talk = Conversations(checkpoint, ConversationSettings(**SHORT))
        few = conversations_for(talk, path, 3, 256)
        converse(talk, path, len(few) + 9)
        again = conversations_for(talk, path, 3, 256)
        assert few == again
        ids = [conversation_tokens(talk.tokenizer, document) for document in few]
        assert len(conversation_windows(ids, 256)) >= 3
        assert len(conversation_windows(ids[:-1], 256)) < 3


def test_compress_with_self_in_the_mixture(chat: Path, tmp_path: Path) -> None:
    settings = {"sequences": 8, "length": 64, "conversations": SHORT}
    mixture = [{"self": 0.25}, {"shipped": 0.75}]
    recipe = {"grid": {"kind": "uniform", "bits": 3}, "rounding": {"kind": "hessian"}}
    recipe["calibration"] = {**settings, "text": mixture}
    done = compress(chat, recipe, tmp_path / "out")
    beside = tmp_path / "out.conversations.jsonl"
    assert rows_of(beside)[0]["turns"] == 2
    assert done.recipe["calibration"]["text"] == mixture
    assert compress(chat, recipe, tmp_path / "out").already_complete
    with Checkpoint.open(chat) as checkpoint:
        chosen = CalibrationSettings(**settings)
        ids = text_windows(checkpoint, Mixture.of(mixture), chosen, tmp_path / "out", torch.device("cpu"), None)
    assert ids.shape == (8, 64)
    shipped = windows(chat_tokenizer(), None, CalibrationSettings(sequences=6, length=64)).tolist()
    assert [row for row in ids.tolist() if row in shipped] == shipped
    others = [row for row in ids.tolist() if row not in shipped]
    assert len(others) == 2
    assert all(END in row or START in row for row in others)
    del recipe["calibration"]["text"]
    given = compress(chat, recipe, tmp_path / "given", calibration=f"{beside}=1,shipped=3")
    assert len(given.layers) == len(done.layers)
    assert not (tmp_path / "given.conversations.jsonl").exists()
