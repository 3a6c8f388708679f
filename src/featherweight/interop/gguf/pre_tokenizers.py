"""How byte-level vocabularies in GGUF cut text into words, by the names of `tokenizer.ggml.pre`.

A file names its way of cutting and does not have it; the expressions are those of the models' own tokenizers, as far as
they are published. Each cuts what the one before left whole; what it does not match stays a word.
"""

from __future__ import annotations

from dataclasses import dataclass

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHER = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


def _words(digits: str, suffixes: str = _SUFFIXES + "|") -> str:
    """Words with one sign before them, some digits at a time, other signs with the ends of lines behind them."""
    return rf"{suffixes}{_WORD}|\p{{N}}{digits}|{_OTHER}[\r\n]*|{_LINES}|{_SPACES}"


def _cased(digits: str, suffixes: str = "") -> str:
    """Words cut where a capital follows small letters."""
    words = "|".join(word + suffixes for word in _CASED)
    return rf"{words}|\p{{N}}{digits}|{_OTHER}[\r\n/]*|{_LINES}|{_SPACES}"


_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_OTHER}|{_SPACES}"


@dataclass(frozen=True)
class Cut:
    """patterns : regular expressions (Oniguruma), one after the other
    whole_words : a word that is a token is taken as it is, whatever its merges
    begins : texts begin with the first token unless the file says otherwise
    composed : letters and the marks on them are first put together (NFC), as the models' own tokenizers do
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composed: bool = False


_LLAMA3 = Cut((_words("{1,3}"),), whole_words=True, begins=True)
_THREE_DIGITS = Cut((_words("{1,3}"),))
_PLAIN, _SINGLE_DIGITS = Cut((_GPT2,)), Cut((r"\p{N}", _GPT2))
_GPT4O = Cut((_cased("{1,3}", _SUFFIXES + "?"),))
_SIGNS = r"[\p{P}\$\+<=>\^~\|]+"

CUTS: dict[str, Cut] = {
    "default": Cut((_SIGNS, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "megrez"), Cut((_words(""),), composed=True)),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "kormo", "hunyuan", "grok-2"), Cut((_words(""),))),
    "olmo": Cut((_GPT2,), composed=True),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "jais", "exaone4", "trillion", "gigachat", "mellum"), _PLAIN),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "tekken": Cut((_cased(""),), whole_words=True, begins=True),
    "deepseek-coder": Cut(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
    "deepseek-v3": Cut(
        (
            r"\p{N}{1,3}",
            _CJK,
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}|{_SPACES}",
        )
    ),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "minicpm5": Cut((r"\p{N}{1,3}", _words("+")), whole_words=True),
}
"""By name; names that are not here have expressions that are not published, or no model of our architectures."""
