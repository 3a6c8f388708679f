"""Tokenizers from the metadata of GGUF files, against the models' own rules written down once more."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer as Core
from tokenizers import pre_tokenizers

from featherweight.errors import CheckpointError
from featherweight.interop.gguf.pre_tokenizers import CUTS
from featherweight.interop.gguf.tokenizer import TokenizerFiles
from featherweight.model.text.tokenizer import Tokenizer, auto_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CONFIG = {"vocab_size": 1000, "max_position_embeddings": 128, "model_type": "llama", "architectures": ["x"]}
SPACE = "\u2581"
WORDS = ["hello", "world", "hell", "low", "or", "ld", "don't", "I'LL", "2024", "3.14", "x\n\ny", "  two", "tail  "]
WORDS += ["na\u00efve", "\u6f22\u5b57", "\u304b\u306a", "\U0001f642", "<b>", "</s>", "<|im_end|>", "HelloWorld"]
WORDS += ["\t", "  ", "a\u0301b"]


def metadata(kind: str, tokens: Sequence[str], types: Sequence[int], **more: Any) -> dict[str, Any]:
    found = {"model": kind, "tokens": list(tokens), "token_type": np.array(types, np.int32), **more}
    return {"general.architecture": "llama"} | {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def write(folder: Path, data: dict[str, Any], **config: Any) -> Core:
    folder.mkdir(exist_ok=True)
    made = CONFIG | {f"{n}_token_id": data[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos")} | config
    TokenizerFiles(Path("model.gguf"), data, made).write(folder)
    (folder / "config.json").write_text(json.dumps(made))
    return Core.from_file(str(folder / "tokenizer.json"))


def texts(count: int = 300) -> list[str]:
    chance = random.Random(0)
    joined = ["".join(chance.choice((" ", "", "\n")) + chance.choice(WORDS) for _ in range(8)) for _ in range(count)]
    return ["", " ", *WORDS, *joined]


# SentencePiece --------------------------------------------------------------------------------------------------------


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A vocabulary as Llama 2 has one: named tokens, bytes, joined pieces by rank, single characters."""
    tokens, types = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    joined = ["he", "ll", "or", "ld", SPACE + "w", SPACE + "h", "hell", "hello", "wor", "world", SPACE + "hello"]
    joined += [SPACE + "world", "lo", "low", SPACE + SPACE, "20", "24", "2024", SPACE + SPACE + SPACE + SPACE]
    tokens += joined
    types += [NORMAL] * len(joined)
    characters = sorted(set("helowrdn'tILx2034.y" + SPACE + "abcW"))
    tokens += characters
    types += [NORMAL] * len(characters)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    return tokens, scores, types


def joined_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """The rule itself: of all neighbours that make a piece, those of the highest score, the first of equals; what is
    no piece in bytes."""
    numbers = {token: number for number, token in enumerate(tokens)}
    symbols = list(text)
    while True:
        pairs = [
            (-scores[numbers[left + right]], place)
            for place, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
            if left + right in numbers
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    found = []
    for symbol in symbols:
        known = [numbers[symbol]] if symbol in numbers else [3 + byte for byte in symbol.encode()]
        found += known
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_joined_by_score(prefix: bool, tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": prefix}
    core = write(tmp_path / "m", metadata("llama", tokens, types, scores=np.array(scores, np.float32), **ids))
    for text in texts():
        if "</s>" in text:
            continue
        escaped = (SPACE if prefix and text else "") + text.replace(" ", SPACE)
        found = core.encode(text).ids
        assert found[0] == 1
        assert found[1:] == joined_by_score(escaped, tokens, scores), text
        assert core.decode(found) == text
    assert core.encode("hello</s> x").ids.count(2) == 1


def test_what_users_defined_is_found_in_the_text(tmp_path: Path) -> None:
    """Gemma: no space before a text; spaces in a row, line ends and marks of turns are tokens, found first."""
    tokens, scores, types = pieces()
    more = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", SPACE * 2, SPACE * 3]
    tokens = [token for token in tokens if not token.startswith(SPACE * 2)] + more
    types = ([UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(tokens))[: len(tokens) - 6]
    types += [CONTROL] * 2 + [USER_DEFINED] * 4
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": False}
    data = metadata("llama", tokens, types, scores=np.array(scores, np.float32), **ids)
    data["tokenizer.chat_template"] = "{{ messages }}<start_of_turn>x<end_of_turn>"
    data["tokenizer.ggml.eot_token_id"] = tokens.index("<end_of_turn>")
    core = write(tmp_path / "m", data)
    number = {token: place for place, token in enumerate(tokens)}
    found = core.encode("<start_of_turn>hello   world\n\n\n  x<end_of_turn>").ids
    assert found == [1, number["<start_of_turn>"], number["hello"], number[SPACE * 3], number["world"]] + [
        number["\n\n"], number["\n"], number[SPACE * 2], number["x"], number["<end_of_turn>"]
    ]  # fmt: skip
    assert core.decode(found) == "hello   world\n\n\n  x"
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, number["<end_of_turn>"]]


def test_phi_3_takes_the_space_behind_its_marks(tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    tokens, types, scores = [*tokens, "<|user|>"], [*types, CONTROL], [*scores, -1000.0]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": False}
    data = metadata("llama", tokens, types, scores=np.array(scores, np.float32), **ids)
    data["general.architecture"] = "phi3"
    core = write(tmp_path / "m", data)
    assert core.encode("<|user|>\nhello</s>").ids == [len(tokens) - 1, tokens.index(SPACE + "hello"), 2]


def test_the_rule_is_that_of_sentencepiece(tmp_path: Path) -> None:
    """With a model that the library itself has trained, where it is installed."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(texts(2000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        split_digits=True, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    count = model.get_piece_size()
    kinds = [(model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE)]
    types = [next((kind for asked, kind in kinds if asked(n)), NORMAL) for n in range(count)]
    scores = np.array([model.get_score(n) for n in range(count)], np.float32)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": False}
    tokens = [model.id_to_piece(n) for n in range(count)]
    core = write(tmp_path / "f", metadata("llama", tokens, types, scores=scores, **ids))
    for text in texts():
        if text and "</s>" not in text:
            assert core.encode(text).ids == model.encode(text), text


# byte-level BPE -------------------------------------------------------------------------------------------------------


def bytes_and_words(**more: Any) -> dict[str, Any]:
    """All bytes, a few merges, two marks of turns and a mark that users defined."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 w", "2 0", "20 2", "202 4", "\u0120 \u0120"]
    tokens = [*alphabet, *[merge.replace(" ", "") for merge in merges], "<|im_start|>", "<|im_end|>", "<b>", "[PAD0]"]
    types = [NORMAL] * (256 + len(merges)) + [CONTROL, CONTROL, USER_DEFINED, UNUSED]
    end = tokens.index("<|im_end|>")
    given: dict[str, Any] = {"merges": merges, "bos_token_id": end - 1, "eos_token_id": end, "pre": "gpt-2"}
    return metadata("gpt2", tokens, types, **(given | more))


@pytest.mark.parametrize("name", CUTS)
def test_text_is_cut_as_the_name_says(name: str, tmp_path: Path) -> None:
    """By the expressions, in another library for them; words are then joined by merges."""
    data = bytes_and_words(pre=name, add_bos_token=False)
    core = write(tmp_path / "m", data)
    for text in texts(100):
        text = unicodedata.normalize("NFC", text) if CUTS[name].composed else text
        words = [text]
        for pattern in CUTS[name].patterns:
            words = [part for word in words for part in cut(pattern, word)]
        got = core.pre_tokenizer.pre_tokenize_str(text)
        assert [text[first:last] for _, (first, last) in got] == [word for word in words if word], text
        assert core.decode(core.encode(text).ids, skip_special_tokens=False) == text
    numbers = {token: n for n, token in enumerate(data["tokenizer.ggml.tokens"])}
    assert core.encode("<b>hello<|im_end|>").ids == [numbers[t] for t in ("<b>", "hello", "<|im_end|>")]


def test_letters_and_their_marks_are_put_together_where_the_models_do(tmp_path: Path) -> None:
    for name, expected in {"qwen2": "\u00e1", "llama-bpe": "a\u0301"}.items():
        core = write(tmp_path / name, bytes_and_words(pre=name, add_bos_token=False))
        assert core.decode(core.encode("a\u0301").ids) == expected


def cut(pattern: str, text: str) -> list[str]:
    """Matches, and what lies between them."""
    found, end = [], 0
    for match in regex.finditer(pattern, text):
        found += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*found, text[end:]] if part]


def test_digits_are_cut_by_name(tmp_path: Path) -> None:
    numbers = {token: n for n, token in enumerate(bytes_and_words()["tokenizer.ggml.tokens"])}
    single, three = [numbers[digit] for digit in "2024"], [numbers["202"], numbers["4"]]
    for name, expected in {"smollm": single, "qwen2": single, "llama-bpe": three, "gpt-2": [numbers["2024"]]}.items():
        core = write(tmp_path / name, bytes_and_words(pre=name))
        assert core.encode("2024", add_special_tokens=False).ids == expected


@pytest.mark.parametrize(
    ("more", "first", "last"),
    [
        ({}, 0, 0),
        ({"pre": "llama-bpe"}, 1, 0),
        ({"pre": "llama-bpe", "add_bos_token": False}, 0, 0),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 1),
    ],
)
def test_what_stands_around_a_text(more: dict[str, Any], first: int, last: int, tmp_path: Path) -> None:
    data = bytes_and_words(**more)
    core = write(tmp_path / "m", data)
    begin, end = data["tokenizer.ggml.bos_token_id"], data["tokenizer.ggml.eos_token_id"]
    ids = core.encode("hello").ids
    assert ids[:first] + ids[len(ids) - last :] == [begin] * first + [end] * last
    assert len(ids) == 1 + first + last


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("llama", "llama"), ("llama", "mistral"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3", "gemma3_text")]
    + [("phi3", "phi3")],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_makes_the_same_of_the_files(
    architecture: str, model_type: str, kind: str, tmp_path: Path
) -> None:
    """Whatever class it chooses for the kind of model."""
    if architecture == "qwen2" and kind == "llama":
        pytest.skip("no model of that kind has such a vocabulary")
    if kind == "gpt2":
        data = bytes_and_words(pre="qwen2" if architecture == "qwen2" else "llama-bpe", add_bos_token=True)
    else:
        tokens, scores, types = pieces()
        ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        if model_type.startswith("gemma"):
            ids["add_space_prefix"] = False
        data = metadata("llama", tokens, types, scores=np.array(scores, np.float32), **ids)
    data["general.architecture"] = architecture
    core = write(tmp_path / "m", data, model_type=model_type)
    theirs, ours = auto_tokenizer(tmp_path / "m"), Tokenizer.open(tmp_path / "m")
    assert ours is not None
    assert ours.eos == data["tokenizer.ggml.eos_token_id"]
    for text in texts(100):
        expected = core.encode(text).ids
        assert theirs(text)["input_ids"] == expected, text
        assert ours.encode(text) == expected
        assert theirs.decode(expected, skip_special_tokens=True) == core.decode(expected)


def test_where_transformers_cuts_otherwise_is_said(tmp_path: Path) -> None:
    data = bytes_and_words(pre="llama-bpe") | {"general.architecture": "qwen2"}
    (note,) = TokenizerFiles(Path("m.gguf"), data, CONFIG).notes
    assert "transformers 5 cuts it as qwen2 does" in note


# what stands beside it ------------------------------------------------------------------------------------------------


def test_templates_and_sampling(tmp_path: Path) -> None:
    data = bytes_and_words()
    data |= {"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 20, "general.sampling.min_p": True}
    data |= {"tokenizer.chat_template": "one", "tokenizer.chat_templates": ["tools"]}
    data["tokenizer.chat_template.tools"] = "two"
    write(tmp_path / "m", data)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == [
        {"name": "default", "template": "one"},
        {"name": "tools", "template": "two"},
    ]
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.6, 20, True)
    assert "min_p" not in generation


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    files = TokenizerFiles(Path("m.gguf"), {"tokenizer.ggml.model": "none"}, CONFIG | {"eos_token_id": 5})
    files.write(tmp_path)
    assert files.notes == ("the file has no tokenizer",)
    assert [path.name for path in tmp_path.iterdir()] == ["generation_config.json"]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 5}


def test_a_file_that_does_not_say_how_text_is_cut(tmp_path: Path) -> None:
    data = bytes_and_words()
    del data["tokenizer.ggml.pre"]
    (note,) = TokenizerFiles(Path("m.gguf"), data, CONFIG).notes
    assert "does not say how text is cut" in note


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model": "t5"}, r"of the kind 't5' \(unigram\), and gpt2 and llama are read"),
        ({"model": "odd"}, "of the kind 'odd', and gpt2"),
        ({"model": 3}, "tokenizer.ggml.model is 3"),
        ({"pre": "qwen3"}, r"'qwen3' .*\(did you mean 'qwen2'\?\)"),
        ({"tokens": []}, "has no list of tokens"),
        ({"tokens": ["a"] * 2000}, "has 2000 tokens, and the embedding 1000 rows"),
        ({"token_type": np.array([1], np.int32)}, "tokenizer.ggml.token_type has 1 entries for 269 tokens"),
        ({"merges": ["a"]}, "the merge 'a' is no pair"),
        ({"merges": ["a zz"]}, "zz"),
        ({"model": "llama"}, "has no scores"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1"),
    ],
)
def test_metadata_of_which_no_tokenizer_can_be_made(more: dict[str, Any], words: str) -> None:
    data = bytes_and_words() | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        TokenizerFiles(Path("model.gguf"), data, CONFIG)
    assert str(caught.value).startswith("no tokenizer can be made of the metadata of model.gguf: ")
    assert "\n" not in str(caught.value)
