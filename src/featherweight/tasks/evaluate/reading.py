"""A text as the tokens that a protocol cuts into windows, and what a model computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import EvaluationError
from featherweight.model.layers.modules import CodedModule
from featherweight.model.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Read:
    """A text for a protocol: `tokens` int64 [n] without `prefix`, which stands before each window; `bos` in its first
    place instead; in words."""

    tokens: Tensor
    prefix: tuple[int, ...]
    bos: int | None
    words: str


def read_tokens(tokenizer: Any, text: str, protocol: str) -> Read:
    """The whole text as tokens, and what is done with the tokens that the tokenizer puts before one."""
    reader = Tokenizer.of(tokenizer)
    tokens = reader.encode(text)
    prefix, _ = reader.around()
    replaced = protocol == "llama.cpp"
    if not prefix or tokens[: len(prefix)] != prefix or (replaced and prefix[0] != reader.bos):
        return Read(torch.tensor(tokens, dtype=torch.int64), (), None, "no BOS, as the tokenizer adds none")
    if replaced:
        first = prefix[0]
        words = f"BOS (token {first}) in place of the first token of every window"
        return Read(torch.tensor(tokens, dtype=torch.int64), (), first, words)
    name = "BOS" if prefix == [reader.bos] else "what the tokenizer puts before a text"
    numbers = ", ".join(str(token) for token in prefix)
    words = f"{name} ({'token' if len(prefix) == 1 else 'tokens'} {numbers}) before every window"
    return Read(torch.tensor(tokens[len(prefix) :], dtype=torch.int64), tuple(prefix), None, words)


def check_rows(model: Any, tokens: Tensor) -> None:
    """EvaluationError where a token has no row in the embedding."""
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get() if get is not None else None, "weight", None)
    if weight is not None and len(tokens) and int(tokens.max()) >= weight.shape[0]:
        raise EvaluationError(
            f"the text has token {int(tokens.max())} and the model a vocabulary of {weight.shape[0]}: "
            "the tokenizer does not belong to this model"
        )


def dtype_of(model: Any) -> str:
    """What the first module with weights computes in: a compressed one in another type than its parts are stored in."""
    for module in model.modules():
        if isinstance(module, CodedModule):
            return str(module.compute_dtype).removeprefix("torch.")
        parameter = next((p for p in module.parameters(recurse=False) if p.is_floating_point()), None)
        if parameter is not None:
            return str(parameter.dtype).removeprefix("torch.")
    return "float32"
