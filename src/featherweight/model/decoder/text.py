"""Text of tokens as they are made; how text becomes tokens is `featherweight.model.text`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from featherweight.model.text.chat_template import ChatTemplate
from featherweight.model.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "TextStream", "Tokenizer"]


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
