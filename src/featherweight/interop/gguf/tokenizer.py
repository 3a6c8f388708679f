"""The tokenizer, templates and generation settings of a model in GGUF, as files beside the weights.

Two kinds of vocabulary belong to the architectures that are read: byte-level BPE with its merges ("gpt2"), and
SentencePiece's BPE ("llama"), in which the neighbours whose piece has the highest score are joined first, and what is
no piece is spelled in bytes. Both become a tokenizer.json of the library tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.errors import CheckpointError, shown
from featherweight.interop.gguf.pre_tokenizers import CUTS, Cut
from featherweight.registry import nearest
from featherweight.system.files import to_json, write_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens."""
SPACE = "\u2581"
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Named tokens, here and in the metadata."""
ENDS_OF_TURNS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
)
"""Control tokens that end an answer where the chat template has them, whether the metadata says so or not."""
OTHER_KINDS = {
    "bert": "WordPiece",
    "t5": "unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo",
    "gemma4": "Gemma 4",
}
WITHOUT_RIGHT_SPACE = ("<s>", "<unk>", "<|endoftext|>")
"""Phi-3's other control tokens take the white space that follows with them."""


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says of tokens.

    types : of each token
    named : bos, eos, unk, pad -> token
    """

    kind: str
    tokens: list[str]
    types: list[int]
    named: dict[str, int]


class TokenizerFiles:
    """Makes the files; problems of the metadata are found when it is made, before anything is written.

    notes : what is odd, a sentence each
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.path, self.metadata, self.config = path, metadata, config
        self.notes: tuple[str, ...] = ()
        self.vocabulary = self._vocabulary()
        self._core = None if self.vocabulary is None else self._made(self.vocabulary)

    def write(self, folder: Path) -> None:
        """tokenizer.json, tokenizer_config.json and generation_config.json; nothing of a tokenizer if there is none."""
        if self._core is not None and self.vocabulary is not None:
            write_text(folder / "tokenizer.json", self._core.to_str(pretty=False))
            write_text(folder / "tokenizer_config.json", to_json(self._settings(self.vocabulary)))
        write_text(folder / "generation_config.json", to_json(self._generation()))

    # what the metadata says -----------------------------------------------------------------------------------------

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        found = self.metadata.get(f"tokenizer.{key}", default)
        if found is not default and not isinstance(found, kind):
            raise self._odd(f"tokenizer.{key} is {shown(found)}")
        return found

    def _odd(self, what: str) -> CheckpointError:
        return CheckpointError(f"no tokenizer can be made of the metadata of {self.path}: {what}")

    def _vocabulary(self) -> Vocabulary | None:
        kind = self._get("ggml.model", str, "none")
        if kind in ("none", "no_vocab"):
            self.notes = ("the file has no tokenizer",)
            return None
        if kind not in ("gpt2", "llama"):
            known = f" ({OTHER_KINDS[kind]})" if kind in OTHER_KINDS else ""
            raise self._odd(f"its vocabulary is of the kind {shown(kind)}{known}, and gpt2 and llama are read")
        tokens = self._get("ggml.tokens", list, None)
        if not tokens or not all(isinstance(token, str) for token in tokens):
            raise self._odd("it has no list of tokens")
        if len(tokens) > self.config["vocab_size"]:
            raise self._odd(f"it has {len(tokens)} tokens, and the embedding {self.config['vocab_size']} rows")
        types = self._numbers("ggml.token_type", len(tokens))
        named = {}
        for name, key in NAMED.items():
            token = self._get(f"ggml.{key}_token_id", int, None)
            if token is not None and 0 <= token < len(tokens):
                named[name] = token
        found = [NORMAL] * len(tokens) if types is None else [int(value) for value in types]
        return Vocabulary(kind, tokens, _marked(tokens, found, named, types is None and kind == "llama"), named)

    def _numbers(self, key: str, count: int) -> Any:
        found = self._get(key, np.ndarray, None)
        if found is not None and len(found) != count:
            raise self._odd(f"tokenizer.{key} has {len(found)} entries for {count} tokens")
        return found

    # tokenizer.json -------------------------------------------------------------------------------------------------

    def _made(self, vocabulary: Vocabulary) -> Any:
        try:
            core = self._byte_level(vocabulary) if vocabulary.kind == "gpt2" else self._sentence_piece(vocabulary)
            core.add_tokens(self._added(vocabulary, special=False))
            core.add_special_tokens(self._added(vocabulary, special=True))
            around = self._around(vocabulary)
            if around is not None:
                core.post_processor = around
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # nothing narrower is raised by tokenizers
            raise self._odd(" ".join(str(error).split())[:200]) from error
        return core

    def _byte_level(self, vocabulary: Vocabulary) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        cut, merges = self._cut(), []
        for merge in self._get("ggml.merges", list, []):
            pair = tuple(merge.split(" ")) if isinstance(merge, str) else ()
            if len(pair) != 2:
                raise self._odd(f"the merge {shown(merge)} is no pair of tokens")
            merges.append(pair)
        core = Tokenizer(models.BPE(_by_text(vocabulary.tokens), merges, fuse_unk=False, ignore_merges=cut.whole_words))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        core.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
        if cut.composed:
            core.normalizer = normalizers.NFC()
        return core

    def _cut(self) -> Cut:
        name = self._get("ggml.pre", str, "")
        if not name:
            self.notes += (
                "the file does not say how text is cut into words (tokenizer.ggml.pre), which old converters left out: "
                "the tokens may differ from those of the original",
            )
            return CUTS["default"]
        if name not in CUTS:
            raise self._odd(
                f"it cuts text into words as {shown(name)}{nearest(name, CUTS)} does, which is not known here"
            )
        if self.metadata.get("general.architecture") == "qwen2" and CUTS[name].patterns != CUTS["qwen2"].patterns:
            self.notes += (
                f"text is cut into words as {name} does, and transformers 5 cuts it as qwen2 does for any model of "
                "that kind: the tokens may differ from those of the original",
            )
        return CUTS[name]

    def _sentence_piece(self, vocabulary: Vocabulary) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers

        scores = self._numbers("ggml.scores", len(vocabulary.tokens))
        if scores is None:
            raise self._odd("it has no scores")
        tokens = [  # what users defined is matched in the text itself, which has spaces
            token.replace(SPACE, " ") if kind == USER_DEFINED else token
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        ]
        unknown = vocabulary.named.get("unk")
        core = Tokenizer(
            models.BPE(
                _by_text(tokens),
                _merges(vocabulary, scores.astype(np.float64).tolist()),
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        replaced = normalizers.Replace(" ", SPACE)
        restored = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._get("ggml.add_space_prefix", bool, True):
            core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced])
            core.decoder = decoders.Sequence([*restored, decoders.Strip(" ", 1, 0)])
        else:
            core.normalizer, core.decoder = replaced, decoders.Sequence(restored)
        return core

    def _added(self, vocabulary: Vocabulary, special: bool) -> list[Any]:
        """Tokens that are found in a text before it is cut; special ones are left out when tokens are shown as text."""
        from tokenizers import AddedToken

        found = []
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
            if kind in ((CONTROL, UNKNOWN) if special else (USER_DEFINED,)) and token:
                text = token.replace(SPACE, " ") if not special and vocabulary.kind == "llama" else token
                strips = special and self._is_phi3(vocabulary) and token not in WITHOUT_RIGHT_SPACE
                found.append(AddedToken(text, rstrip=strips, normalized=False, special=special))
        return found

    def _is_phi3(self, vocabulary: Vocabulary) -> bool:
        return vocabulary.kind == "llama" and self.metadata.get("general.architecture") == "phi3"

    def _around(self, vocabulary: Vocabulary) -> Any:
        """What puts the first and the last token around a text, None where there are none."""
        from tokenizers import processors

        begins = CUTS[self._get("ggml.pre", str, "") or "default"].begins if vocabulary.kind == "gpt2" else True
        flags = {"bos": ("ggml.add_bos_token", begins), "eos": ("ggml.add_eos_token", False)}
        put = {
            name: vocabulary.named[name]
            for name, (key, default) in flags.items()
            if self._get(key, bool, default) and name in vocabulary.named
        }
        if not put:
            return None
        texts = {name: vocabulary.tokens[token] for name, token in put.items()}
        first, last = [texts["bos"]] if "bos" in put else [], [texts["eos"]] if "eos" in put else []
        return processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *[f"{token}:1" for token in first], "$B:1", *[f"{token}:1" for token in last]],
            special_tokens=[(texts[name], token) for name, token in put.items()],
        )

    # what stands beside it ------------------------------------------------------------------------------------------

    def _settings(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """tokenizer_config.json."""
        found: dict[str, Any] = {f"{name}_token": vocabulary.tokens[token] for name, token in vocabulary.named.items()}
        found |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        template = self._template()
        return found if template is None else found | {"chat_template": template}

    def _template(self) -> Any:
        """One template, or several with names; the one without a name is the default."""
        default = self._get("chat_template", str, None)
        others = []
        for name in self._get("chat_templates", list, []):
            text = self._get(f"chat_template.{name}", str, None)
            if text is not None:
                others.append({"name": name, "template": text})
        if not others:
            return default
        return [*([] if default is None else [{"name": "default", "template": default}]), *others]

    def _generation(self) -> dict[str, Any]:
        """generation_config.json: what begins and ends a text, and how to sample where the file says so."""
        found = {
            f"{n}_token_id": self.config[f"{n}_token_id"] for n in ("bos", "pad") if f"{n}_token_id" in self.config
        }
        found = {name: token for name, token in found.items() if token is not None}
        ends = self._ends()
        if ends:
            found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        sampling = {}
        for name, key in SAMPLING.items():
            value = self.metadata.get(f"general.sampling.{key}")
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                sampling[name] = value if isinstance(value, int) else float(str(np.float32(value)))
        if sampling.get("temperature", 1) > 0 and sampling:
            found |= sampling | {"do_sample": True}
        return found

    def _ends(self) -> list[int]:
        """Tokens that end an answer, the text's own end first."""
        if self.vocabulary is None:
            return [self.config["eos_token_id"]] if "eos_token_id" in self.config else []
        tokens, types, count = self.vocabulary.tokens, self.vocabulary.types, len(self.vocabulary.tokens)
        keys = [f"ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        named = [self._get(key, int, None) for key in keys]
        template = self._get("chat_template", str, "")
        written = [
            token
            for token, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL and text in ENDS_OF_TURNS and text in template
        ]
        return list(dict.fromkeys(token for token in (*named, *written) if token is not None and 0 <= token < count))


SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Of generation_config.json and of `general.sampling`."""


def _marked(tokens: list[str], types: list[int], named: Mapping[str, int], guess: bool) -> list[int]:
    """Types of tokens, with named ones that old converters did not mark; `guess` where a file has no types at all."""
    found = list(types)
    for name, token in named.items():
        if found[token] in (NORMAL, USER_DEFINED, UNUSED):
            found[token] = UNKNOWN if name == "unk" else CONTROL
    if guess:
        for number, text in enumerate(tokens):
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                found[number] = BYTE
    return found


def _by_text(tokens: list[str]) -> dict[str, int]:
    """Numbers by text; of a text that stands there twice the first counts."""
    found: dict[str, int] = {}
    for number, token in enumerate(tokens):
        found.setdefault(token, number)
    return found


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the highest score first."""
    pieces = {
        token: number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (NORMAL, UNUSED)
    }
    found = []
    for piece, number in pieces.items():
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                found.append((-scores[number], number, piece[:cut], piece[cut:]))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
