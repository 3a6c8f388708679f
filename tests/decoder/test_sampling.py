"""Sampling in the native library, against the definitions in transformers."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_models import transformers
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.model.decoder import native
from featherweight.model.decoder.sampling import Sampling


def sample(logits: Tensor, sampling: Sampling, history: list[int] | None = None, drawn: int = 0) -> int:
    values = logits.to(torch.float32).contiguous()
    seen = torch.tensor(history or [], dtype=torch.int32)
    settings = native.sampling_struct(sampling)
    return int(
        native.functions().fw_sample(
            values.data_ptr(), len(values), seen.data_ptr(), len(seen), ctypes.addressof(settings), drawn
        )
    )


def expected_shares(logits: Tensor, sampling: Sampling, history: list[int]) -> Tensor:
    """Probabilities by the processors of transformers, in the order in which it applies them."""
    process = transformers.generation.logits_process
    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(process.MinPLogitsWarper(sampling.min_p))
    scores = logits[None].clone()
    for step in steps:
        scores = step(torch.tensor([history], dtype=torch.int64), scores)
    return scores[0].double().softmax(-1)


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=7),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.5, top_k=12, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
    Sampling(temperature=1.0, top_k=500),
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_shares_of_tokens(sampling: Sampling) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 2
    history = [1, 1, 5, 39, 7]
    shares = expected_shares(logits, sampling, history)
    count = 4000
    found = Counter(sample(logits, sampling, history, drawn) for drawn in range(count))
    for token in range(40):
        share = float(shares[token])
        if share == 0:
            assert found[token] == 0
        else:
            spread = (count * share * (1 - share)) ** 0.5
            assert abs(found[token] - count * share) < 4.5 * spread + 1, token


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=70),
    st.integers(0, 80),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.05, 5.0),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
)
def test_only_tokens_that_are_kept(
    values: list[float], top_k: int, top_p: float, min_p: float, temperature: float, seed: int, drawn: int
) -> None:
    logits = torch.tensor(values)
    sampling = Sampling(temperature, top_k, top_p, min_p, seed=seed)
    token = sample(logits, sampling, [], drawn)
    assert token == sample(logits, sampling, [], drawn)
    assert 0 <= token < len(values)
    assert top_k == 0 or int((logits > logits[token]).sum()) < top_k
    weights = ((logits.double() - logits.max()) / temperature).exp()
    assert weights[token] >= min_p * (1 - 1e-5)
    likelier = weights[weights > weights[token] * (1 + 1e-5)]  # closer ones may be equal in float32
    if top_k == 0 and len(likelier):
        assert float(likelier.sum() / weights.sum()) < top_p + 1e-5


def split_mix(seed: int, index: int) -> float:
    """The generator SplitMix64, in [0, 1)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_random_numbers_are_those_of_the_seed() -> None:
    """The token is the one at u of the kept probability, in the order of tokens: the same on every machine."""
    logits = torch.arange(64, dtype=torch.float32).mul(0.7).sin() * 3
    sampling = Sampling(temperature=1.0, top_k=30, top_p=0.9, seed=42)
    sums = expected_shares(logits, sampling, []).cumsum(0)
    found = [sample(logits, sampling, [], drawn) for drawn in range(12)]
    assert found == [int((sums <= split_mix(42, drawn)).sum()) for drawn in range(12)]
    assert found == [47, 11, 19, 20, 2, 55, 12, 47, 20, 38, 11, 29]


def test_the_likeliest_is_the_first_of_equals() -> None:
    logits = torch.zeros(100)
    logits[[17, 60, 99]] = 3.0
    assert sample(logits, Sampling()) == 17
    assert sample(logits, Sampling(temperature=1.0, top_k=1)) == 17
    assert sample(logits, Sampling(repetition_penalty=1.5), [17]) == 60
    assert sample(logits, Sampling(temperature=1.0, top_p=0.0, seed=5)) in (17, 60, 99)


def test_repetition_penalty_counts_a_token_once() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert sample(logits, Sampling(repetition_penalty=1.04), [0, 0, 0]) == 0
    assert sample(logits, Sampling(repetition_penalty=1.06), [0]) == 1


def test_a_large_vocabulary_with_a_flat_distribution() -> None:
    logits = torch.randn(150_000, generator=torch.Generator().manual_seed(0)) * 0.01
    tokens = {sample(logits, Sampling(temperature=1.0, top_p=0.5), [], drawn) for drawn in range(40)}
    assert len(tokens) == 40
    assert all(float((logits > logits[t]).float().mean()) < 0.51 for t in tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 31, 40])
def test_logits_that_are_no_numbers(bad: float, place: int) -> None:
    logits = torch.zeros(41)
    logits[place] = bad
    assert sample(logits, Sampling(temperature=1.0)) == -1
    assert sample(torch.full((5,), -float("inf")), Sampling()) == -1
    logits[place] = -float("inf")
    assert sample(logits, Sampling()) == int(place == 0)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0}],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(FeatherError, match=next(iter(settings))):
        Sampling(**settings)
    with pytest.raises(FeatherError):
        Sampling(temperature=float("nan"))
