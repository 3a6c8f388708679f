"""Calibration text: documents, chat templates, windows, and what is said when there is too little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight import compress
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.model.text.documents import read_documents, text_digest
from featherweight.model.text.windows import (
    as_text,
    calibration_windows,
    context_of,
    special_tokens,
    windows,
    windows_digest,
)
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from models import byte_tokenizer, make_tiny

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


def settings(**values: Any) -> CalibrationSettings:
    return CalibrationSettings(**{"sequences": 8, "length": 32} | values)


def spelled(row: torch.Tensor) -> str:
    return str(byte_tokenizer().decode(row.tolist()))


def test_windows_of_the_shipped_text() -> None:
    one, again = windows(byte_tokenizer(), None, settings()), windows(byte_tokenizer(), None, settings())
    assert one.shape == (8, 32)
    assert one.dtype == torch.int64
    assert torch.equal(one, again)
    assert windows_digest(one) == windows_digest(again)
    other = windows(byte_tokenizer(), None, settings(seed=1))
    assert not torch.equal(one, other)
    assert windows_digest(one) != windows_digest(other)
    whole = read_documents(None)[0].text
    assert spelled(one[0]) in whole


def test_windows_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"{i:05d}" for i in range(400)))
    rows = windows(byte_tokenizer(), path, settings(sequences=70))
    seen = [word for row in rows for word in spelled(row)[5:-5].split() if len(word) == 5]
    assert len(rows) == 70
    assert len(seen) == len(set(seen))


def test_context_cuts_windows() -> None:
    assert windows(byte_tokenizer(), None, settings(), context=20).shape == (8, 20)
    assert context_of({"max_position_embeddings": 128}) == 128
    assert context_of({"text_config": {"n_positions": 64}}) == 64
    assert context_of({"max_position_embeddings": 514, "model_type": "roberta"}) == 512
    assert context_of({}) is None


def test_too_little_text(tmp_path: Path) -> None:
    path, told = tmp_path / "short.txt", []
    path.write_text("word " * 20)
    with pytest.raises(CalibrationError, match=r"100 tokens, enough for 3 windows of 32, but 8 windows \(256 tokens\)"):
        windows(byte_tokenizer(), path, settings())
    path.write_text("word " * 40)
    rows = windows(byte_tokenizer(), path, settings(), notify=told.append)
    assert rows.shape == (6, 32)
    assert "going on with 6 windows" in told[0]["text"]


@pytest.mark.parametrize("content", ["", "  \n"])
def test_empty_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(CalibrationError, match="empty"):
        windows(byte_tokenizer(), path, settings())


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        {"prompt": "ask", "completion": "answer"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}, {"type": "image"}]}]},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    documents = read_documents(path)
    tokenizer = byte_tokenizer()
    plain = [as_text(tokenizer, d) for d in documents]
    assert plain[0] == "plain"
    assert plain[1] == "user: hi\nassistant: hello\n"
    assert plain[2] == "user: one\nassistant: two\n"
    assert plain[3] == "user: ask\nassistant: answer\n"
    assert plain[4] == "user: part\n"
    tokenizer.chat_template = TEMPLATE
    assert as_text(tokenizer, documents[1]) == "<user>hi</s><assistant>hello</s>"
    path.write_text("\n".join(json.dumps(rows[1]) for _ in range(60)))
    found = windows(tokenizer, path, settings())
    assert "<assistant>hello</s>" in spelled(found.reshape(-1))


def test_chat_template_that_refuses(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(CalibrationError, match="no such role"):
        windows(tokenizer, path, settings())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "line 2 of .* is not JSON"),
        ('{"other": 1}', "line 2 of .* neither text nor a conversation"),
        ('{"messages": "hi"}', "messages in line 2 of .* is not a list of messages"),
        ('{"messages": [{"role": 3, "content": "x"}]}', "is not a list of messages"),
        ("[1]", "neither text nor"),
    ],
)
def test_bad_rows(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(CalibrationError, match=words):
        read_documents(path)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration text file .*absent.txt"):
        read_documents(tmp_path / "absent.txt")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_documents(latin)
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(CalibrationError, match="parquet"):
        read_documents(broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="no text files"):
        read_documents(tmp_path / "empty")


def test_hub_data_set_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import featherweight.model.text.documents as documents

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(documents, "import_module", absent)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_documents("hf:allenai/c4:en:train:text")


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import featherweight.model.text.documents as documents

    class Datasets:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
            assert (name, config, split) == ("owner/set", "en", "test")
            return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(documents, "import_module", lambda name: Datasets)
    assert [d.text for d in read_documents("hf:owner/set:en:test:body")] == ["one", "two"]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "x.parquet")
    assert [d.text for d in read_documents(tmp_path / "x.parquet")] == ["one", "two"]


def test_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.json").write_text("{}")
    assert [d.text for d in read_documents(tmp_path)] == ["first", "second"]
    before = text_digest(tmp_path)
    (tmp_path / "b.txt").write_text("changed")
    assert text_digest(tmp_path) != before


def encoder_tokenizer() -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A #", special_tokens=[("!", 0), ("#", 2)]
    )
    return tokenizer


def test_encoders_get_their_special_tokens_and_whole_beginnings(tmp_path: Path) -> None:
    tokenizer = encoder_tokenizer()
    first, last = special_tokens(tokenizer)
    assert (len(first), len(last)) == (1, 1)
    path = tmp_path / "sentences.txt"
    path.write_text(" ".join(f"Sentence number {i} is here." for i in range(200)))
    rows = windows(tokenizer, path, settings())
    assert rows.shape == (8, 32)
    assert bool((rows[:, 0] == first[0]).all())
    assert bool((rows[:, -1] == last[0]).all())
    assert all(spelled(row[1:]).startswith("Sentence") for row in rows)


def test_huge_text_is_sampled_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import featherweight.model.text.windows as text

    monkeypatch.setattr(text, "PIECE", 64)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{i:06d}\n" for i in range(20_000)))
    rows = windows(byte_tokenizer(), path, settings(sequences=16))
    numbers = sorted(int(word) for row in rows for word in spelled(row).split("\n") if len(word) == 6)
    assert numbers[-1] - numbers[0] > 10_000


def test_tokens_without_a_row_are_one_sentence(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model", tokenizer=True, vocab_size=100)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CalibrationError, match=r"has token \d+ and the model a vocabulary of 100") as caught,
    ):
        calibration_windows(checkpoint, None, settings())
    assert "\n" not in str(caught.value)
    with pytest.raises(CalibrationError, match="a vocabulary of 100"):
        compress(folder, "gptq", tmp_path / "out", changes=["calibration.sequences=8", "calibration.length=32"])


def test_every_window_begins_with_what_the_tokenizer_puts_first() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
    )
    rows = windows(tokenizer, None, settings())
    assert (rows[:, 0] == 256).all()
    assert (rows[:, 1:] != 256).all()
