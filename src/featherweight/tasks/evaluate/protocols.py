"""Perplexity protocols by name: which tokens are scored, and with how much context.

A perplexity means nothing without the rule that made it: the same model on the same text gives 5.47 with windows of
2048 tokens and 5.12 with 4096. A `Protocol` fixes the rule; `describe` prints it beside every number.

    own        non-overlapping windows of the model's own context; a shorter text is one window
    2048       non-overlapping windows of 2048 tokens, as in GPTQ (arXiv 2210.17323) and most papers after it
    4096       the same with 4096
    strided    windows of C tokens every C/2; each scored token has at least C/2 tokens before it
    llama.cpp  non-overlapping windows of 512; second half scored

The text is tokenized once, as a whole. Models whose tokenizer puts BOS before a text were trained with it in the first
place and may compute nonsense without (their attention rests on it), so every window begins with it: in llama.cpp's
protocol it stands in place of the window's first token, as there; in all others before the window's part of the text,
which is one token shorter: a window of C tokens is BOS and C - 1 tokens of the text, all of which are scored where
without BOS all but the first of C are. So as many tokens are scored, and the context stays C. What a tokenizer puts
before a text is not always one token, or called BOS: the same holds for whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from featherweight.errors import EvaluationError
from featherweight.registry import nearest

NAMES = ("own", "2048", "4096", "strided", "llama.cpp")
LLAMA_CPP_CONTEXT = 512


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of the text go in; tokens [first, stop) are scored, each from those before it."""

    start: int
    stop: int
    first: int

    @property
    def scored(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class Protocol:
    """A rule that turns a number of tokens into windows.

    `first_scored` is the place in a window (from 0) of the first scored token. `to_the_end` adds a last window that
    ends with the text and scores what is left; otherwise a partial last window is dropped. `prefix` is the number of
    tokens before each window's part of the text, which are counted in `context`. `bos_each_window` puts the BOS token
    in place of the first token of every window.
    """

    name: str
    context: int
    stride: int
    first_scored: int = 1
    to_the_end: bool = False
    bos_each_window: bool = False
    prefix: int = 0

    @property
    def width(self) -> int:
        """Tokens of the text in a window."""
        return self.context - self.prefix

    def windows(self, tokens: int) -> Iterator[Window]:
        """All windows of a text of so many tokens, in order. Every one has `width` tokens of it."""
        start = 0
        while start + self.width <= tokens:
            yield Window(start, start + self.width, start + self.first_scored - self.prefix)
            start += self.stride
        done = start - self.stride + self.width
        if self.to_the_end and start > 0 and done < tokens:
            yield Window(tokens - self.width, tokens, done)

    def scored(self, tokens: int) -> int:
        """How many tokens of the text are scored."""
        return sum(window.scored for window in self.windows(tokens))

    def rule(self) -> str:
        """The rule in words, without the text or model it is applied to."""
        windows = f"windows of {self.context} tokens"
        if self.prefix:
            windows += f" ({self.width} of the text behind {self.prefix} that the tokenizer puts before one)"
        kind = f"non-overlapping {windows}" if self.stride == self.width else f"{windows} every {self.stride}"
        if self.first_scored == self.prefix:
            which = "all tokens of the text in a window scored"
        elif self.first_scored == 1:
            which = "all but the first token of a window scored"
        else:
            which = f"tokens {self.first_scored} to {self.context - 1} of a window (counted from 0) scored"
        end = "the end of the text scored in a last full window" if self.to_the_end else "a partial last window dropped"
        return f"{kind}, {which}, {end}"


def protocol_named(
    name: str, own_context: int | None, tokens: int, context: int | None = None, prefix: int = 0
) -> Protocol:
    """The protocol `name` for a model with `own_context` positions and a text of so many tokens.

    `context` overrides the window length. `prefix` is the number of tokens that every window begins with, not counted
    in `tokens`; llama.cpp's protocol puts BOS in place of a token instead. EvaluationError where the name is unknown,
    the window is longer than the model or the text allows, or the model's context is needed and not known.
    """
    if name not in NAMES:
        raise EvaluationError(f"there is no protocol called {name!r}{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    if tokens == 0:
        raise EvaluationError("the text is empty: there are no tokens to score")
    prefix = 0 if name == "llama.cpp" else prefix
    if tokens == 1 and not prefix:
        raise EvaluationError("the text has 1 token, and at least 2 are needed to score one: use a longer text")
    length = _window_length(name, own_context, tokens + prefix, context, prefix)
    protocol = _protocol(name, length, prefix)
    if own_context is not None and length > own_context:
        raise EvaluationError(
            f"protocol {name!r} needs a context of {length} tokens and the model has {own_context}: "
            f"use --protocol own or --context {own_context}"
        )
    if protocol.width > tokens:
        raise EvaluationError(
            f"protocol {name!r} needs at least {protocol.width} tokens for one window and the text has {tokens}: "
            f"use a longer text or a smaller --context"
        )
    return protocol


def _window_length(name: str, own_context: int | None, tokens: int, context: int | None, prefix: int) -> int:
    if context is not None:
        least = 3 if name == "llama.cpp" else max(2, prefix + 1)
        if context < least:
            raise EvaluationError(f"the context is {context} tokens, and protocol {name!r} needs at least {least}")
        return context
    if name == "llama.cpp":
        return LLAMA_CPP_CONTEXT
    if name.isdigit():
        return int(name)
    if own_context is None:
        raise EvaluationError(
            f"the model's configuration does not say how long its context is, so protocol {name!r} needs --context"
        )
    if own_context < max(2, prefix + 1):
        raise EvaluationError(
            f"the model takes {own_context} token at a time, by its config.json, and nothing is predicted from that"
            if own_context < 2
            else f"the model takes {own_context} tokens at a time, and the tokenizer puts {prefix} before every window"
        )
    return min(own_context, tokens)


def _protocol(name: str, length: int, prefix: int) -> Protocol:
    if name == "strided":
        stride = max(1, min(length // 2, length - prefix))
        return Protocol(name, length, stride, first_scored=length - stride, to_the_end=True, prefix=prefix)
    if name == "llama.cpp":
        # The logits at places length/2 .. length-2 are scored, so the tokens one place later.
        return Protocol(name, length, length, first_scored=length // 2 + 1, bos_each_window=True)
    return Protocol(name, length, length - prefix, first_scored=max(1, prefix), prefix=prefix)


@dataclass(frozen=True)
class Setting:
    """Everything besides the model that a perplexity depends on."""

    protocol: Protocol
    tokens: int
    bos: str  # how BOS was used, in words
    dtype: str
    tokenizer_sha256: str
    text_sha256: str

    @property
    def scored(self) -> int:
        return self.protocol.scored(self.tokens)

    def describe(self) -> str:
        """The sentence that stands beside every number."""
        protocol = self.protocol
        return (
            f"Token perplexity, protocol {protocol.name}: {protocol.rule()}; context {protocol.context}, "
            f"stride {protocol.stride}, {self.scored} of {self.tokens} tokens scored; {self.bos}; "
            f"computed in {self.dtype}; tokenizer sha256 {self.tokenizer_sha256[:16]}, "
            f"text sha256 {self.text_sha256[:16]}."
        )
