"""Mixtures of calibration text: exact shares of windows, windows of whole conversations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.errors import CalibrationError, FeatherError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import load_recipe
from featherweight.model.text.documents import Document, read_documents
from featherweight.model.text.mixture import Mixture, spread
from featherweight.model.text.windows import as_text, conversation_windows, windows
from models import END, START, byte_tokenizer, chat_tokenizer


def settings(**values: Any) -> CalibrationSettings:
    return CalibrationSettings(**{"sequences": 20, "length": 32} | values)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Two files that share no letter."""
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("".join(chr(97 + i % 13) for i in range(4000)))
    two.write_text("".join(chr(110 + i * i % 13) for i in range(4000)))
    return one, two


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5), st.integers(1, 300))
def test_counts_are_shares_made_whole(weights: list[float], total: int) -> None:
    if not any(weights):
        return
    mixture = Mixture.of([{f"s{i}": weight} for i, weight in enumerate(weights)])
    counts = mixture.counts(total)
    assert sum(counts.values()) == total
    for i, weight in enumerate(weights):
        if weight > 0:
            assert abs(counts[f"s{i}"] - total * weight / sum(weights)) < 1 + 1e-6
        else:
            assert f"s{i}" not in counts


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_every_run_has_about_the_shares_of_all(counts: list[int]) -> None:
    order = spread(counts)
    assert sorted(order) == [(source, j) for source, k in enumerate(counts) for j in range(k)]
    for source, k in enumerate(counts):
        for length in range(len(order) + 1):
            seen = sum(one == source for one, _ in order[:length])
            assert abs(seen - length * k / len(order)) <= 0.5 + len(counts) / 2


def test_a_mixture_has_the_windows_of_its_texts(texts: tuple[Path, Path]) -> None:
    one, two = texts
    mixed = windows(byte_tokenizer(), [{str(one): 0.15}, {str(two): 0.85}], settings())
    again = windows(byte_tokenizer(), f"{one}=3,{two}=17", settings())
    assert torch.equal(mixed, again)
    letters = set(byte_tokenizer()("abcdefghijklm")["input_ids"])
    first = torch.tensor([int(row[0]) in letters for row in mixed])
    assert int(first.sum()) == 3
    assert torch.equal(mixed[first], windows(byte_tokenizer(), one, settings(sequences=3)))
    assert torch.equal(mixed[~first], windows(byte_tokenizer(), two, settings(sequences=17)))
    assert not torch.equal(mixed, windows(byte_tokenizer(), f"{one}=3,{two}=17", settings(seed=1)))


def test_one_text_is_as_without_a_mixture(texts: tuple[Path, Path]) -> None:
    alone = windows(byte_tokenizer(), texts[0], settings())
    assert torch.equal(alone, windows(byte_tokenizer(), [{str(texts[0]): 2.5}, {str(texts[1]): 0}], settings()))
    assert torch.equal(windows(byte_tokenizer(), "shipped", settings()), windows(byte_tokenizer(), None, settings()))


def test_too_little_for_a_share(texts: tuple[Path, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("word " * 40)
    with pytest.raises(CalibrationError, match=r"short.txt has 200 tokens, enough for 6 windows .* for its share"):
        windows(byte_tokenizer(), f"{short}=0.5,{texts[0]}=0.5", settings())
    with pytest.raises(CalibrationError, match="one.txt has a share of less than one of 20 windows"):
        windows(byte_tokenizer(), f"{texts[0]}=0.01,{texts[1]}=0.99", settings())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("self=-1,shipped=2", "the weight of the calibration text self is -1.0, expected a number of at least 0"),
        ([{"self": 0}, {"shipped": 0.0}], r"\(self, shipped\) are all zero"),
        ([], "all zero"),
        ("self=1,shipped", "is no mixture"),
        ("self=much", "the weight of the calibration text self is 'much'"),
        ([{"self": float("nan")}], "expected a number"),
        ([{"self": 1}, {"self": 2}], "self is named twice"),
        ("=1", "has no name"),
        (5, "is no mixture"),
    ],
)
def test_no_mixtures(text: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        Mixture.of(text)
    if not isinstance(text, str):
        with pytest.raises(FeatherError, match=rf"calibration\.text.*{words}"):
            load_recipe("gptq", [f"calibration.text={json.dumps(text)}".replace("NaN", ".nan")])


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match="no calibration file sefl; a text is self, shipped, hf:NAME, or the path"
    ):
        Mixture.of("sefl=0.1,shipped=0.9").check()
    statistics = tmp_path / "s.safetensors"
    statistics.write_bytes(b"")
    with pytest.raises(CalibrationError, match="is a file of statistics, which is not mixed"):
        Mixture.of(f"{statistics}=1,shipped=1").check()
    with pytest.raises(CalibrationError, match="`feather converse`"):
        windows(byte_tokenizer(), "self", settings())


def test_windows_of_whole_conversations() -> None:
    talks = [[9, 1, 1], [9, 2], [9, 3, 3, 3], [9, *range(100, 113)], [9, 5], [9, 6, 6, 6, 6]]
    found = conversation_windows(talks, 5)
    # the long one fills windows by itself; what is left of it is not begun with
    long = [list(range(100, 105)), list(range(105, 110))]
    assert found == [[9, 1, 1, 9, 2], [9, 3, 3, 3, 9], *long, [9, 5, 9, 6, 6]]
    assert conversation_windows([list(range(13))], 5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    # a first token is put before a window, unless the conversation brings it
    assert conversation_windows([[9, 1], [9, 2, 2]], 5, [7]) == [[7, 9, 1, 9, 2]]
    assert conversation_windows([[7, 1], [7, 2, 2]], 5, [7]) == [[7, 1, 7, 2, 2]]


def test_conversations_keep_their_marks(tmp_path: Path) -> None:
    """Special tokens are tokens; tools, calls and reasoning reach the template as they are."""
    path = tmp_path / "talks.jsonl"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    talk = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "easy"},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "three"},
    ]
    row = {"messages": talk, "tools": [{"type": "function", "function": {"name": "add"}}]}
    header = {"featherweight_conversations": 1, "seed": 0}
    cut = {"messages": talk[:1] + talk[3:], "finished": False}
    text_tools = {**row, "tools": json.dumps(row["tools"])}
    path.write_text("\n".join(map(json.dumps, (header, row, cut, text_tools))))
    documents = read_documents(path)
    tokenizer = chat_tokenizer()
    text = as_text(tokenizer, documents[0])
    for part in (json.dumps(row["tools"]), "<think>easy</think>", f"<call>{json.dumps(call)}</call>", "tool\n3"):
        assert part in text
    assert as_text(tokenizer, documents[2]) == text
    assert as_text(tokenizer, documents[1]).endswith("<|im_start|>assistant\nthree")
    path.write_text("\n".join(json.dumps(row) for _ in range(40)))
    ids = windows(tokenizer, path, settings(length=400))
    assert (ids[:, 0] == START).all()
    written = tokenizer.decode(ids[0].tolist())
    assert int((ids[0] == END).sum()) == written.count("<|im_end|>") > 4
    assert not any("im_end" in str(byte_tokenizer().decode([t for t in r if t < START])) for r in ids.tolist())


def test_a_refusing_template_names_the_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    rows = [{"messages": [{"role": role, "content": "hi"}]} for role in ("user", "judge")]
    path.write_text("\n".join(map(json.dumps, rows)))
    template = (
        "{% if messages[0].role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(CalibrationError, match=r"conversation in line 2 of .*talks.jsonl cannot be written.*no judges"):
        windows(chat_tokenizer(template), path, settings())
    path.write_text(json.dumps({**rows[0], "tools": "add"}))
    with pytest.raises(CalibrationError, match="tools in line 1 of .* is not a list"):
        read_documents(path)


def test_without_a_template_roles_are_written_out() -> None:
    document = Document(messages=({"role": "user", "content": "hi"},))
    assert as_text(byte_tokenizer(), document) == "user: hi\n"
