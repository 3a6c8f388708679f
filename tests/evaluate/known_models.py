"""Models whose next-token distributions are known, and a tokenizer of characters."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Bigram(nn.Module):
    """logits depend on the last token alone: row `token` of a table [vocabulary, vocabulary] of log-probabilities."""

    def __init__(self, table: Tensor, context: int | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.seen: list[Tensor] = []

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        self.seen.append(input_ids.clone())
        return SimpleNamespace(logits=self.table[input_ids])


class Counter(nn.Module):
    """Looks at the whole context: the logits at a place depend on a weighted sum of all tokens before it."""

    def __init__(self, vocabulary: int, context: int | None = None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.values = nn.Parameter(torch.randn(vocabulary, 4, generator=generator), requires_grad=False)
        self.head = nn.Linear(4, vocabulary)
        nn.init.normal_(self.head.weight, generator=generator)
        self.config = SimpleNamespace(max_position_embeddings=context)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def states(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.values[input_ids].cumsum(1) / places

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.states(input_ids)))


class SoftCapped(Counter):
    """As Gemma 2: something is done to the logits after the output layer."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tanh(self.head(self.states(input_ids)) / 2) * 2)


class Sinking(Bigram):
    """A bigram model whose predictions are turned upside down where the first token of its input is not `sink`."""

    def __init__(self, table: Tensor, sink: int, context: int | None = None) -> None:
        super().__init__(table, context)
        self.sink = sink

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        self.seen.append(input_ids.clone())
        sign = torch.where(input_ids[:, :1] == self.sink, 1.0, -1.0)
        return SimpleNamespace(logits=sign[..., None] * self.table[input_ids])


class Characters:
    """Token = place of a letter in the alphabet."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        start = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": start + [ord(c) - ord("a") for c in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(ord("a") + i): i for i in range(26)}


def uniform(vocabulary: int, context: int | None = None) -> Bigram:
    return Bigram(torch.full((vocabulary, vocabulary), -math.log(vocabulary)), context)


def random_bigram(vocabulary: int, context: int | None = None, seed: int = 0) -> Bigram:
    generator = torch.Generator().manual_seed(seed)
    return Bigram(torch.randn(vocabulary, vocabulary, generator=generator).log_softmax(-1), context)


class Words:
    """Token = place of a word in a list; white space parts words and is nothing else."""

    def __init__(self, words: str, bos: int | None = None) -> None:
        self.words, self.bos_token_id, self.eos_token_id = words.split(), bos, None

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        start = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": start + [self.words.index(word) for word in text.split()]}

    def decode(self, tokens: list[int], **_: object) -> str:
        return " ".join(self.words[token] for token in tokens)

    def get_vocab(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    def bigram(self, following: dict[str, dict[str, float]], context: int | None = None) -> Bigram:
        """A model that gives words the probabilities named, after a word; what is left goes to all others alike."""
        count = len(self.words)
        table = torch.full((count, count), 1 / count)
        for word, probabilities in following.items():
            left = (1 - sum(probabilities.values())) / (count - len(probabilities))
            row = [probabilities.get(other, left) for other in self.words]
            table[self.words.index(word)] = torch.tensor(row)
        return Bigram(table.log(), context)
