"""How a model folder's text becomes tokens and back: the one rule of calibrate, eval, generate and chat.

What counts is transformers' AutoTokenizer of the installed version. Importing it takes seconds that a short answer
should not wait for, so a folder whose tokenizer.json says everything by itself (`plain.py` knows which do) is read
with the tokenizers library alone; every other goes to transformers.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from featherweight.errors import CheckpointError, FeatherError
from featherweight.model.text.chat_template import ChatTemplate
from featherweight.model.text.plain import EXTRA_TOKENS, SOME_TEXT, plain_tokenizer
from featherweight.system.transformers_calls import asking_transformers

FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.bpe", "*.spm")
"""Names of which a folder with a tokenizer has at least one."""
DAMAGED = "the tokenizer's files may be damaged"


class Template(Protocol):
    """A conversation as text."""

    @property
    def takes_tools(self) -> bool:
        """Whether it says anything of the tools that a model may call."""

    def render(
        self, messages: Sequence[Mapping[str, Any]], answer: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        """With `answer`, as the prompt for the next one; `tools` as JSON schemas."""


class Tokenizer:
    """The tokenizer of a model.

    Attributes
    ----------
    chat_template : how a conversation becomes a text, or None.
    source : the tokenizer of transformers, or of the tokenizers library.
    direct : whether it works without transformers.
    """

    def __init__(self, source: Any, settings: dict[str, Any] | None, chat_template: Template | None) -> None:
        self.source, self.chat_template = source, chat_template
        self.direct = settings is not None
        self._settings = settings or {}

    @classmethod
    def open(cls, folder: str | Path, trust_remote_code: bool = False) -> Tokenizer | None:
        """None if the folder has no tokenizer. CheckpointError if it has one that cannot be used."""
        folder = Path(folder)
        if not any(any(folder.glob(pattern)) for pattern in FILES):
            return None
        plain = None if trust_remote_code else plain_tokenizer(folder)
        if plain is not None:
            core, settings = plain
            template = ChatTemplate.find(folder, settings)
            if template is None or not any(name in template.source for name in EXTRA_TOKENS):
                return cls(core, settings, template)
        return cls.of(auto_tokenizer(folder, trust_remote_code))

    @classmethod
    def of(cls, tokenizer: Any) -> Tokenizer:
        """Of a tokenizer of transformers; one of ours is given back."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer, None, _template_of(tokenizer))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special` adds what the model expects around one, such as its first token."""
        _check_text([text])
        with asking_transformers("turn the text into tokens", DAMAGED):
            if self.direct:
                return list(self.source.encode(text, add_special_tokens=special).ids)
            return [int(token) for token in self._ask(text, special)]

    def encode_all(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """The same of several texts."""
        if not texts:
            return []
        _check_text(texts)
        with asking_transformers("turn the text into tokens", DAMAGED):
            if self.direct:
                return [e.ids for e in self.source.encode_batch(list(texts), add_special_tokens=special)]
            return [[int(token) for token in tokens] for tokens in self._ask(list(texts), special)]

    def _ask(self, texts: str | list[str], special: bool) -> Any:
        return self.source(texts, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of tokens; that of special ones is left out unless they are asked for."""
        with asking_transformers("turn tokens into text", "the tokenizer may not belong to this model"):
            return str(self.source.decode([int(token) for token in tokens], skip_special_tokens=not special))

    def added(self) -> dict[str, int]:
        """The tokens beside those that text is cut into, special or not, by what they are written as."""
        if self.direct:
            return {token.content: number for number, token in self.source.get_added_tokens_decoder().items()}
        found: dict[Any, Any] = getattr(self.source, "get_added_vocab", dict)()
        return {str(text): int(number) for text, number in found.items()}

    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that are put before and after every text."""
        plain, whole = self.encode("a", special=False), self.encode("a")
        for first in range(len(whole) - len(plain) + 1):
            if plain and whole[first : first + len(plain)] == plain:
                return whole[:first], whole[first + len(plain) :]
        return [], []

    @property
    def bos(self) -> int | None:
        """The token that begins a text, whether it is put there or not."""
        return self._named("bos")

    @property
    def eos(self) -> int | None:
        """The token that ends a text."""
        return self._named("eos")

    def _named(self, name: str) -> int | None:
        if not self.direct:
            found = getattr(self.source, f"{name}_token_id", None)
        else:
            token = self._settings.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            found = None if text is None else self.source.token_to_id(text)
        return found if isinstance(found, int) else None


def _check_text(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FeatherError(
                f"the text has something that is no character at place {error.start} (a byte that is not UTF-8, or "
                "half a surrogate pair): take it out"
            ) from None


def auto_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """What transformers makes of a folder; CheckpointError where it makes nothing of use."""
    from transformers import AutoTokenizer

    hint = "the original model's tokenizer files belong beside the weights"
    with asking_transformers(f"load the tokenizer of {folder}", hint), quiet():
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        refuse_useless(found, folder)
    return found


def refuse_useless(tokenizer: Any, folder: Path) -> None:
    """CheckpointError for a class that has built itself without a vocabulary because its file is missing.

    One that cannot be asked so, because it wants boxes on a page beside the text, say, is none of these.
    """
    try:
        found = tokenizer(SOME_TEXT, add_special_tokens=False)["input_ids"]
    except Exception:  # whoever gives it text is told
        return
    if not found:
        raise CheckpointError(
            f"the tokenizer of {folder} turns text into nothing, some of its files are missing: "
            "copy them from the original model"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the advice of transformers out of our output while one of its objects is made or called."""
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


class ForeignTemplate:
    """A tokenizer class with a way of its own to write conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    takes_tools = True  # it is for the class to say

    def render(
        self, messages: Sequence[Mapping[str, Any]], answer: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        given = {"tools": list(tools)} if tools else {}
        with asking_transformers("write this conversation as the tokenizer's class wants it"):
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer, **given
                )
            )


def _template_of(tokenizer: Any) -> Template | None:
    """The template that transformers would use, rendered within bounds unless its class has another way."""
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        return None
    if isinstance(source, dict):
        source = source.get("default")
    tokens = getattr(tokenizer, "special_tokens_map", None)
    if not isinstance(source, str) or not isinstance(tokens, dict) or not _usual(tokenizer):
        return ForeignTemplate(tokenizer)
    return ChatTemplate(source, json.loads(json.dumps(tokens, default=str)))


def _usual(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    return getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template
