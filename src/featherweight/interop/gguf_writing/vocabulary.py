"""The vocabulary of a GGUF file, from a folder's tokenizer: tokens, kinds, merges or scores, special tokens, template.

Two kinds of tokenizers have a place there: byte-level BPE ("gpt2"), whose cutting of text into words llama.cpp knows by
name (`pre_tokenizers.py`), and BPE on characters with bytes for what is unknown ("llama", that of SentencePiece), where
the rank of the merge that makes a token is its score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf

from featherweight.errors import CheckpointError
from featherweight.interop.gguf_writing.pre_tokenizers import pre_tokenizer_name
from featherweight.model.text.chat_template import ChatTemplate
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.system.files import read_object
from featherweight.system.transformers_calls import asking_transformers

SPACE = "\u2581"
"""What stands for a blank in the tokens of SentencePiece."""
LOWEST = -1e6
"""Score of tokens that no merge makes."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad", "sep": "sep", "mask": "mask"}


@dataclass(frozen=True)
class Vocabulary:
    """kind : `tokenizer.ggml.model`; tokens, types : one a row of the embedding; scores : of the kind "llama"; merges,
    pre : of the kind "gpt2"; special : numbers by name; flags : `add_bos_token` and the like"""

    kind: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = ""
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    template: str = ""

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write all of it."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_scores(self.scores)
        if self.types:
            writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(folder: Path, config: Mapping[str, Any], rows: int, pre: str = "") -> Vocabulary:
    """The vocabulary of a model.

    rows : of its embedding
    pre : name of the pre-tokenizer, where it is not to be found out

    CheckpointError for a tokenizer that GGUF has no place for. A folder without one gives the kind "none".
    """
    tokenizer = Tokenizer.open(folder)
    if tokenizer is None:
        return Vocabulary("none")
    core = tokenizer.source if tokenizer.direct else getattr(tokenizer.source, "backend_tokenizer", None)
    if core is None:
        raise CheckpointError(f"the tokenizer of {folder} has no form of the tokenizers library: GGUF needs its merges")
    with asking_transformers(f"write the tokenizer of {folder} as JSON"):
        content: dict[str, Any] = json.loads(core.to_str())
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"the tokenizer of {folder} is of the kind {str(model.get('type'))[:40]!r}; a GGUF of these models has BPE"
        )
    settings = read_object(folder / "tokenizer_config.json")
    template = ChatTemplate.find(folder, settings)
    tokens, types = _tokens(content, rows, str(folder))
    numbers = {token: number for number, token in enumerate(tokens)}
    before, after = tokenizer.around()
    special = _special_tokens(settings, read_object(folder / "generation_config.json"), config, numbers)
    flags = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    about = Vocabulary(
        "gpt2", tokens, types, special=special, flags=flags, template="" if template is None else template.source
    )
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model.get("merges") or []]
    if _byte_level(content):
        name = pre or pre_tokenizer_name(content, str(folder))
        joined = [" ".join(pair) for pair in merges]
        return replace(about, merges=joined, pre=name)
    if not model.get("byte_fallback"):
        raise CheckpointError(f"the tokenizer of {folder} is BPE on neither bytes nor with bytes for what is unknown")
    _mark_bytes(tokens, types, model.get("unk_token"))
    flags["add_space_prefix"] = _space_first(content)
    return replace(about, kind="llama", scores=_scores(tokens, merges), pre=pre or "default")


def _tokens(content: Mapping[str, Any], rows: int, folder: str) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are marked unused, and tokens
    that were added without a row, which the model cannot read, are left out."""
    found: dict[int, tuple[str, int]] = {
        int(number): (token, gguf.TokenType.NORMAL) for token, number in content["model"]["vocab"].items()
    }
    for token in content.get("added_tokens") or []:
        special = token.get("special") or _looks_special(token["content"])
        text = token["content"] if special else token["content"].replace(SPACE, " ")
        kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        found[int(token["id"])] = (text, kind)
    own = len(content["model"]["vocab"])
    if max(content["model"]["vocab"].values(), default=0) >= rows:
        raise CheckpointError(
            f"the tokenizer of {folder} has {own} tokens, its embedding {rows} rows: they do not belong together"
        )
    unused = gguf.TokenType.UNUSED
    pairs = [found.get(number, (f"[PAD{number}]", unused)) for number in range(rows)]
    return [text for text, _ in pairs], [int(kind) for _, kind in pairs]


def _looks_special(text: str) -> bool:
    """Tokens that are control tokens although some tokenizers do not mark them."""
    return (text.startswith(("<|", "<\uff5c")) and text.endswith(("|>", "\uff5c>"))) or text in ("<pad>", "<mask>")


def _byte_level(content: Mapping[str, Any]) -> bool:
    """Whether tokens are made of letters that stand for bytes."""
    return "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])


def _mark_bytes(tokens: list[str], types: list[int], unknown: str | None) -> None:
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = gguf.TokenType.BYTE
        elif token == unknown:
            types[number] = gguf.TokenType.UNKNOWN


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """The earlier a merge, the higher the score of what it makes."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    return [-float(rank[token]) if token in rank else LOWEST for token in tokens]


def _space_first(content: Mapping[str, Any]) -> bool:
    """Whether a text begins as if a blank stood before it."""
    said = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in said or '"prepend_scheme": "always"' in said or '"prepend_scheme": "first"' in said


def _special_tokens(
    settings: Mapping[str, Any], generation: Mapping[str, Any], config: Mapping[str, Any], numbers: Mapping[str, int]
) -> dict[str, int]:
    """Numbers of the tokens with a role: as the tokenizer names them, else as the model's configuration does."""
    special: dict[str, int] = {}
    for name, key in SPECIAL.items():
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number = numbers.get(text) if isinstance(text, str) else None
        if number is None:
            number = _first(config.get(f"{name}_token_id"))
        if number is not None and 0 <= number < len(numbers):
            special[_long_name(key)] = number
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    others = [end for end in ends if end != special.get("eos")] if isinstance(ends, list) else []
    if others and isinstance(others[0], int):
        special["eot"] = others[0]
    return special


def _long_name(name: str) -> str:
    return {"unk": "unknown", "pad": "padding", "sep": "seperator"}.get(name, name)  # so it is spelled in the format


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int else None
