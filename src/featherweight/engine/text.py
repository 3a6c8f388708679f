"""Text to tokens and back, from a folder's tokenizer.json, without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from featherweight.engine.chat_template import ChatTemplate
from featherweight.errors import CheckpointError


class TextCodec(Protocol):
    """What generation needs of a tokenizer."""

    chat_template: ChatTemplate | None

    def encode(self, text: str, special: bool = True) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        chat_template: how a conversation becomes a text, or None.
    """

    def __init__(self, core: Any, settings: dict[str, Any], chat_template: ChatTemplate | None) -> None:
        self._core, self._settings = core, settings
        self.chat_template = chat_template
        first = _text_of(settings.get("bos_token"))
        self._first = None if first is None else core.token_to_id(first)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer | None:
        """None if the folder has no tokenizer.json. CheckpointError if it cannot be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        from tokenizers import Tokenizer as Core

        try:
            core = Core.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer ({error}): restore the file") from error
        core.no_padding()
        core.no_truncation()
        settings = _object(folder / "tokenizer_config.json")
        return cls(core, settings, ChatTemplate.find(folder, settings))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special` adds what the model expects around one, such as its first token."""
        tokens: list[int] = self._core.encode(text, add_special_tokens=special).ids
        wanted = self._settings.get("add_bos_token")
        if special and self._first is not None and isinstance(wanted, bool):
            begins = tokens[:1] == [self._first]
            if wanted and not begins:
                return [self._first, *tokens]
            if not wanted and begins:
                return tokens[1:]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._core.decode(list(tokens), skip_special_tokens=True))


class TextStream:
    """Text of tokens as they come: a character is written once all its bytes are there.

    Tokenizers decode a token differently at the beginning of a text than within it, so every step decodes some tokens
    that came before, too, and writes what is new.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], object]) -> None:
        self._decode, self._write = decode, write
        self._tokens: list[int] = []
        self._first = self._read = 0  # tokens before _read have been written; those from _first on are context

    def put(self, token: int) -> None:
        self._tokens.append(token)
        before = self._decode(self._tokens[self._first : self._read])
        text = self._decode(self._tokens[self._first :])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            self._write(text[len(before) :])
            self._first, self._read = self._read, len(self._tokens)

    def end(self) -> str:
        """Write what is left, incomplete characters as replacement characters, and return the whole text."""
        before = self._decode(self._tokens[self._first : self._read])
        rest = self._decode(self._tokens[self._first :])[len(before) :]
        if rest:
            self._write(rest)
        self._first = self._read = len(self._tokens)
        return self._decode(self._tokens)


def _text_of(token: Any) -> str | None:
    """A special token is given as text or as an object with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): restore the file") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object: restore the file")
    return found
