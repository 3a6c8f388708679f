"""Vocabularies of GGUF files: tokens, kinds, scores, names of pre-tokenizers, special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from featherweight.errors import CheckpointError
from featherweight.interop.gguf_writing.pre_tokenizers import pre_tokenizer_name
from featherweight.interop.gguf_writing.vocabulary import vocabulary_of
from featherweight.system.places import ASSETS
from models import make_chat

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def content_of(pre_tokenizer: Any, **settings: Any) -> dict[str, Any]:
    core = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], **settings))
    core.pre_tokenizer = pre_tokenizer
    found: dict[str, Any] = json.loads(core.to_str())
    return found


@pytest.mark.parametrize(
    ("pre_tokenizer", "settings", "name"),
    [
        (pre_tokenizers.ByteLevel(False), {}, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), {}, "smollm"),
        (split(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        (split(LLAMA3), {}, "dbrx"),
        (split(QWEN2), {}, "qwen2"),
        (split(LLAMA3.replace(CONTRACTIONS, SPELLED_OUT)), {}, "dbrx"),
    ],
)
def test_names_of_pipelines(pre_tokenizer: Any, settings: dict[str, Any], name: str) -> None:
    assert pre_tokenizer_name(content_of(pre_tokenizer, **settings), "model") == name


def test_a_pipeline_without_a_name() -> None:
    with pytest.raises(CheckpointError, match=r"no name of llama.cpp is known here \(.*\): .*--set pre=NAME"):
        pre_tokenizer_name(content_of(split(r"\w+")), "model")


def test_the_bundled_one() -> None:
    found = vocabulary_of(ASSETS / "reference", {"vocab_size": 4096}, 4096)
    assert (found.kind, found.pre, len(found.tokens), len(found.types)) == ("gpt2", "gpt-2", 4096, 4096)
    assert found.types[0] == 3
    assert set(found.types[1:]) == {1}
    stored = json.loads((ASSETS / "reference" / "tokenizer.json").read_text())["model"]
    assert {token: number for number, token in enumerate(found.tokens)} == stored["vocab"]
    assert len(found.merges) == len(stored["merges"])
    assert found.special == {"bos": 0, "eos": 0}
    assert found.flags == {"add_bos_token": False, "add_eos_token": False}


def test_chat_tokens_and_template(tmp_path: Path) -> None:
    folder = make_chat(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    found = vocabulary_of(folder, config, 300)
    assert found.tokens[256:258] == ["<|im_start|>", "<|im_end|>"]
    assert found.types[256:260] == [3, 3, 5, 5]
    assert found.special["eos"] == 257
    assert "im_start" in found.template


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    folder = make_chat(tmp_path / "model")
    assert len(vocabulary_of(folder, {}, 257).tokens) == 257  # an added token without a row is left out
    with pytest.raises(CheckpointError, match="has 256 tokens, its embedding 200 rows"):
        vocabulary_of(folder, {}, 200)


def sentencepiece(folder: Path, *, prefix: bool) -> Path:
    """BPE on characters with bytes for what is unknown, as Llama 2 and Gemma have it."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", *"abcdehlorw"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello"), ("w", "o"), ("\u2581", "wo")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_characters_with_bytes(prefix: bool, tmp_path: Path) -> None:
    found = vocabulary_of(sentencepiece(tmp_path, prefix=prefix), {}, 300)
    assert (found.kind, found.pre) == ("llama", "default")
    assert found.flags["add_space_prefix"] is prefix
    assert found.types[:4] == [2, 3, 3, 6]
    assert found.special == {"bos": 1, "eos": 2, "unknown": 0}
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["he"] > score["ll"] > score["hell"] > score["hello"] > score["\u2581hello"] > score["a"]
    assert len(found.tokens) == 300
    assert found.tokens[-1] == "[PAD299]"


def test_a_kind_without_a_place(tmp_path: Path) -> None:
    core = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="of the kind 'WordPiece'"):
        vocabulary_of(tmp_path, {}, 10)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert vocabulary_of(tmp_path, {}, 10).kind == "none"
