"""Damaged and unusual tokenizer folders: a sentence each, or what transformers makes of them."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import featherweight
from featherweight.errors import CalibrationError, CheckpointError, FeatherError
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.model.text.windows import load_tokenizer
from featherweight.system.transformers_calls import asking_transformers

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"
NAMES = ("tokenizer.json", "tokenizer_config.json", "config.json")
ODD: tuple[Any, ...] = (None, True, -1, 1e9, "", "x", [], {}, [[]], {"content": 5}, "\ud800")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        shutil.copy(REFERENCE / name, tmp_path)
    return tmp_path


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sentence(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 700
    return said


def test_no_tokenizer_at_all(folder: Path) -> None:
    for name in NAMES[:2]:
        (folder / name).unlink()
    assert Tokenizer.open(folder) is None
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", '{"a": 1}', "\x00\x01"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_damaged_files(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    if content == '{"a": 1}' and name == "tokenizer_config.json":  # settings that say nothing
        theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.open(folder)
        assert ours is not None
        assert ours.encode("It was") == theirs("It was").input_ids
        return
    assert name in sentence(folder) or "tokenizer" in sentence(folder)
    with pytest.raises(CalibrationError, match="calibration needs a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "class_name", ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "T5Tokenizer", "XTokenizer"]
)
def test_a_vocabulary_that_is_missing(class_name: str, folder: Path) -> None:
    """Some classes build themselves without one, and turn text into nothing."""
    settings(folder, tokenizer_class=class_name)
    (folder / "tokenizer.json").unlink()
    try:
        ours = Tokenizer.open(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert ours is not None
        assert len(ours.encode("It was the best")) > 1


def test_code_is_not_run_unasked(folder: Path) -> None:
    settings(folder, auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    try:
        Tokenizer.open(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_texts_that_are_no_text() -> None:
    tokenizer = Tokenizer.open(REFERENCE)
    assert tokenizer is not None
    with pytest.raises(FeatherError, match="at place 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(FeatherError, match="at place 0"):
        tokenizer.encode_all(["a", "\udcff"])
    assert tokenizer.encode_all([]) == []


def test_a_panic_in_rust_is_a_sentence() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(CheckpointError, match="cannot read it: no vocabulary"), asking_transformers("read it"):
        raise PanicException("no vocabulary")
    with pytest.raises(KeyboardInterrupt), asking_transformers("read it"):
        raise KeyboardInterrupt


def mutate(value: Any, chance: random.Random) -> Any:
    """One place of a JSON value changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(list(value))
        if chance.random() < 0.2:
            del value[name]
        else:
            value[name] = mutate(value[name], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        value[place] = mutate(value[place], chance)
        return value
    return chance.choice(ODD)


def test_mutated_folders(folder: Path) -> None:
    """A sentence, or the tokens of transformers."""
    chance = random.Random(8)
    originals = {name: json.loads((folder / name).read_text()) for name in NAMES}
    small = copy.deepcopy(originals["tokenizer.json"])
    small["model"]["vocab"] = {token: number for token, number in small["model"]["vocab"].items() if number < 300}
    small["model"]["merges"] = []
    originals["tokenizer.json"] = small
    compared = 0
    for _ in range(150):
        for name in NAMES:
            (folder / name).write_text(json.dumps(originals[name]))
        name = chance.choice(NAMES[:2] if chance.random() < 0.9 else NAMES)
        (folder / name).write_text(json.dumps(mutate(copy.deepcopy(originals[name]), chance)))
        said, found = "", None
        try:
            ours = Tokenizer.open(folder)
            found = None if ours is None else ours.encode("It was, naïvely")
        except FeatherError as error:
            said = str(error)
        assert "\n" not in said
        if found is not None:
            try:
                theirs = transformers.AutoTokenizer.from_pretrained(folder)
                expected = theirs("It was, naïvely").input_ids
            except BaseException:  # Rust panics
                continue
            assert found == expected, (name, (folder / name).read_text()[:2000])
            compared += 1
    assert compared > 30
