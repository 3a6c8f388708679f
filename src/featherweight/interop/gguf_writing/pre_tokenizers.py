"""Names that llama.cpp has for the ways in which byte-level tokenizers cut a text into words before any merge.

What decides is the pipeline in tokenizer.json: its patterns are compared letter by letter, once spelling that means the
same is made one, with those that are read from files (`interop/gguf/pre_tokenizers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.interop.gguf.pre_tokenizers import CUTS

_BYTES = ("bytes",)
_WORDS_OF_GPT2 = ("bytes of words",)

KNOWN: dict[tuple[str, ...], str] = {
    _WORDS_OF_GPT2: "gpt-2",
    ("digits", *_WORDS_OF_GPT2): "smollm",
    (r"\p{N}", *_WORDS_OF_GPT2): "smollm",
    **{(*CUTS[name].patterns, *_BYTES): name for name in ("dbrx", "qwen2", "tekken", "gpt-4o", "deepseek-v3")},
}
"""Steps of a pipeline -> the name. Llama 3's own differs from dbrx in that a word which is a token is not merged."""


def pre_tokenizer_name(content: Mapping[str, Any], folder: str) -> str:
    """llama.cpp's name of a tokenizer's way to cut words; `content` is that of tokenizer.json.

    CheckpointError where it has none, or none is known here.
    """
    steps = tuple(_steps(content.get("pre_tokenizer")))
    found = KNOWN.get(steps)
    if found is None:
        raise CheckpointError(
            f"the tokenizer of {folder} cuts words in a way for which no name of llama.cpp is known here "
            f"({' then '.join(steps)[:160] or 'no pre-tokenizer'}): if you know it, say --set pre=NAME"
        )
    if found == "dbrx" and (content.get("model") or {}).get("ignore_merges"):
        return "llama-bpe"
    return found


def _steps(step: Any) -> list[str]:
    """The pipeline as words: patterns, "digits", and what is made of bytes."""
    if not isinstance(step, dict):
        return []
    kind = step.get("type")
    if kind == "Sequence":
        return [one for inner in step.get("pretokenizers") or [] for one in _steps(inner)]
    if kind == "ByteLevel":
        return list(_WORDS_OF_GPT2 if step.get("use_regex", True) else _BYTES)
    if kind == "Digits":
        return ["digits" if step.get("individual_digits") else "runs of digits"]
    if kind == "Split":
        pattern = step.get("pattern") or {}
        plain = str(pattern.get("Regex", pattern.get("String", "")))
        return (
            [_spelled(plain)]
            if step.get("behavior") in ("Isolated", "Removed")
            else [f"{step.get('behavior')} {plain}"]
        )
    return [str(kind)]


def _spelled(pattern: str) -> str:
    """One spelling of patterns that mean the same."""
    letters = (
        pattern.replace("\r", r"\r")
        .replace("\n", r"\n")
        .replace("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
    )
    return letters.replace(r"\p{N}{1}|", r"\p{N}|")
