"""Losses against closed forms and token-by-token brute force; KL by hand; one pass equals two."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_models import Bigram, Counter, SoftCapped, random_bigram, uniform
from torch import nn

from featherweight.errors import EvaluationError, FeatherWarning
from featherweight.tasks.evaluate import perplexity as perplexity_module
from featherweight.tasks.evaluate.divergence import kl_divergence
from featherweight.tasks.evaluate.perplexity import LogitsReader, Loss, measure
from featherweight.tasks.evaluate.protocols import NAMES, protocol_named
from known_memory import Memory

VOCABULARY = 7


def text(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [2, 7, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_uniform_logits_give_the_size_of_the_vocabulary(name: str, vocabulary: int) -> None:
    tokens = text(50) % vocabulary
    measured = measure(uniform(vocabulary), tokens, protocol_named(name, None, 50, 8))
    assert measured.loss.perplexity == pytest.approx(vocabulary, rel=1e-6)


@pytest.mark.parametrize("name", ["own", "strided"])
@pytest.mark.parametrize("prefix", [[3], [3, 5]])
@pytest.mark.parametrize(("length", "context"), [(37, 8), (16, 17), (29, 5), (30, 4)])
@torch.no_grad()
def test_windows_behind_what_the_tokenizer_puts_first(name: str, prefix: list[int], length: int, context: int) -> None:
    """One forward pass a scored token, from the definition: a window is the prefix and the rest of C in text."""
    if length + len(prefix) < context:
        context = length + len(prefix)
    tokens, width = text(length), context - len(prefix)
    protocol = protocol_named(name, None, length, context, len(prefix))
    for model in (random_bigram(VOCABULARY), Counter(VOCABULARY)):
        measured = measure(model, tokens, protocol, batch=2, prefix=prefix)
        if name == "own":
            jobs = [(s, s + i) for s in range(0, length - width + 1, width) for i in range(width)]
        else:
            stride = min(context // 2, width)
            starts = list(range(0, length - width + 1, stride))
            jobs = [(s, s + i) for s in starts for i in range(width - stride, width)]
            jobs += [(length - width, place) for place in range(starts[-1] + width, length)]
        losses = []
        for start, place in jobs:
            seen = torch.cat([torch.tensor(prefix), tokens[start:place]])
            logits = model(seen[None]).logits[0, -1].double()
            losses.append(float(-logits.log_softmax(-1)[tokens[place]]))
        assert measured.loss.tokens == len(losses) == protocol.scored(length)
        assert measured.loss.mean == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_arithmetic_by_hand() -> None:
    """Two tokens: after token 0 comes 1 with probability 1/4, after 1 comes 0 with 1/2, after BOS (2) comes 0 with 1/8.

    Windows of 3 with BOS over 0 1 0 1: twice BOS 0 1, so 1/8 and 1/4 twice: perplexity (8 * 4) ** (1 / 2).
    Without: 0 1 0 alone, so 1/4 and 1/2: (4 * 2) ** (1 / 2).
    """
    shares = torch.tensor([[3 / 4, 1 / 4, 0], [1 / 2, 1 / 2, 0], [1 / 8, 7 / 8, 0]])
    tokens = torch.tensor([0, 1, 0, 1])
    with_bos = measure(Bigram(shares.log()), tokens, protocol_named("own", None, 4, 3, prefix=1), prefix=[2])
    assert (with_bos.loss.counts, with_bos.loss.perplexity) == ((2, 2), pytest.approx(32**0.5))
    without = measure(Bigram(shares.log()), tokens, protocol_named("own", None, 4, 3))
    assert (without.loss.counts, without.loss.perplexity) == ((2,), pytest.approx(8**0.5))
    # llama.cpp, windows of 3 with BOS in the first place: the last token alone is scored, from the one before it.
    third = measure(Bigram(shares.log()), tokens, protocol_named("llama.cpp", None, 4, 3, prefix=1), bos=2)
    assert (third.loss.counts, third.loss.perplexity) == ((1,), pytest.approx(2))


def brute_force(model: nn.Module, tokens: torch.Tensor, name: str, context: int, bos: int | None) -> list[float]:
    """Loss of every scored token, one forward pass a token, from the protocols' definitions and not from Protocol."""
    n, half = len(tokens), context // 2
    jobs = []  # (start, scored token)
    if name == "strided":
        for place in range(context - half, n):
            window = max(0, -(-(place + 1 - context) // half))
            start = min(window * half, n - context)
            jobs.append((start, place))
    else:
        first = half + 1 if name == "llama.cpp" else 1
        jobs = [(s, s + i) for s in range(0, n - context + 1, context) for i in range(first, context)]
    losses = []
    for start, place in jobs:
        seen = tokens[start:place].clone()
        if name == "llama.cpp" and bos is not None:
            seen[0] = bos
        logits = model(seen[None]).logits[0, -1].double()
        losses.append(float(-logits.log_softmax(-1)[tokens[place]]))
    return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize(("length", "context"), [(37, 8), (16, 16), (29, 5)])
@torch.no_grad()
def test_every_protocol_equals_brute_force(name: str, bos: int | None, length: int, context: int) -> None:
    tokens = text(length)
    protocol = protocol_named(name, None, length, context)
    for model in (random_bigram(VOCABULARY), Counter(VOCABULARY)):
        measured = measure(model, tokens, protocol, bos=bos, batch=2)
        losses = brute_force(model, tokens, name, context, bos)
        assert measured.loss.tokens == len(losses) == protocol.scored(length)
        assert measured.loss.mean == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_bos_stands_in_the_first_place_only_where_the_protocol_says() -> None:
    model, tokens = random_bigram(VOCABULARY), torch.zeros(16, dtype=torch.int64)
    measure(model, tokens, protocol_named("llama.cpp", None, 16, 8), bos=5)
    assert torch.cat(model.seen).tolist() == [[5] + [0] * 7] * 2
    model.seen.clear()
    measure(model, tokens, protocol_named("own", None, 16, 8), bos=5)
    assert not torch.cat(model.seen).any()


@pytest.mark.parametrize("kind", [Counter, SoftCapped])
@pytest.mark.parametrize("elements", [1, VOCABULARY * 3, 1 << 20])
def test_slices_of_positions_change_nothing(
    kind: type[Counter], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, protocol = text(64), protocol_named("own", None, 64, 16)
    model, other = kind(VOCABULARY, seed=0), kind(VOCABULARY, seed=1)
    with torch.no_grad():
        losses = brute_force(model, tokens, "own", 16, None)
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", elements)
    measured = measure(model, tokens, protocol, against=other)
    assert measured.loss.mean == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert measured.against is not None
    assert measured.against.mean == pytest.approx(measure(other, tokens, protocol).loss.mean, rel=1e-6)


def test_soft_cap_is_seen_and_a_plain_head_is_sliced() -> None:
    for model, sliceable in ((Counter(VOCABULARY), True), (SoftCapped(VOCABULARY), False)):
        # Logits so small that the soft cap changes nothing by itself in float32.
        nn.init.normal_(model.head.weight, std=1e-4)
        nn.init.zeros_(model.head.bias)
        reader = LogitsReader(model)
        with torch.inference_mode():
            positions = reader(text(8)[None])
        assert reader.sliceable is sliceable
        assert (positions.head is not None) is sliceable


def test_full_logits_are_never_built_for_a_plain_head() -> None:
    model, widest = Counter(VOCABULARY), 0

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal widest
        widest = max(widest, output[..., 0].numel())

    model.head.register_forward_hook(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity_module, "CHUNK_ELEMENTS", VOCABULARY * 4)
        measure(model, text(64), protocol_named("own", None, 64, 32))
    assert widest == 4


def test_a_model_does_not_diverge_from_itself() -> None:
    model, tokens = Counter(VOCABULARY), text(40)
    measured = measure(model, tokens, protocol_named("own", None, 40, 8), against=model)
    assert measured.divergence is not None
    assert measured.divergence.mean == measured.divergence.maximum == 0
    assert measured.divergence.top1_agreement == 1
    assert measured.against == measured.loss
    assert measured.loss.log_ratio(measured.against) == (0, 0)


def test_divergence_by_hand() -> None:
    """Two tokens; after 0 the models say (1/2, 1/2) and (1/4, 3/4), after 1 both say (1/4, 3/4)."""
    original = Bigram(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log())
    compressed = Bigram(torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log())
    tokens = torch.tensor([0, 1, 1, 0, 0, 1])
    measured = measure(compressed, tokens, protocol_named("own", 6, 6), against=original)
    assert measured.divergence is not None
    after_zero = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    # Contexts of the five scored tokens: 0, 1, 1, 0, 0. The first of two equal probabilities counts as most likely.
    assert measured.divergence.mean == pytest.approx(3 / 5 * after_zero, rel=1e-6)
    assert measured.divergence.median == measured.divergence.maximum == pytest.approx(after_zero, rel=1e-6)
    assert measured.divergence.top1_agreement == 2 / 5
    expected = -(math.log(0.75) * 3 + math.log(0.25) * 2) / 5
    assert measured.loss.mean == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000), st.sampled_from([2, 5, 300]))
@settings(max_examples=30, deadline=None)
def test_kl_equals_float64(seed: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = torch.randn(2, 3, vocabulary, generator=generator).mul(3).log_softmax(-1)
    p, q = log_p.double().exp().numpy(), log_q.double().exp().numpy()
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(kl_divergence(log_p, log_q).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_kl_with_impossible_tokens() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5]])
    q = torch.tensor([[0.0, 0.25, 0.75]])
    zero_in_q = torch.tensor([[0.5, 0.0, 0.5]])
    assert math.isfinite(float(kl_divergence(p.log(), q.log())))
    assert math.isinf(float(kl_divergence(p.log(), zero_in_q.log())))


def test_paired_error_is_that_of_the_mean_of_window_differences() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(30, 3, 50), rng.normal(30, 3, 50)
    counts = (10,) * 50
    ratio, error = Loss(tuple(a), counts).log_ratio(Loss(tuple(b), counts))
    per_token = (a - b) / 10
    assert ratio == pytest.approx(per_token.mean())
    assert error == pytest.approx(per_token.std(ddof=1) / math.sqrt(50))
    assert Loss((3.0,), (4,)).standard_error is None


def test_standard_error_covers_the_truth() -> None:
    """Of 400 samples with windows of unequal length, about 95 % lie within two standard errors."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        counts = rng.integers(5, 20, 60)
        sums = np.array([rng.exponential(2.0, c).sum() for c in counts])
        loss = Loss(tuple(sums), tuple(int(c) for c in counts))
        assert loss.standard_error is not None
        inside += abs(loss.mean - 2.0) < 2 * loss.standard_error
    assert 0.91 < inside / 400 < 0.985


def test_huge_losses_do_not_overflow() -> None:
    assert Loss((1e6,), (10,)).perplexity == math.inf


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    protocol = protocol_named("own", None, 40, 8)
    measure(uniform(7), text(40), protocol, batch=2, progress=lambda *x: seen.append(x))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_nan_logits_and_foreign_tokens_are_errors() -> None:
    protocol, tokens = protocol_named("own", None, 16, 8), text(16)
    with pytest.raises(EvaluationError, match="NaN"):
        measure(Bigram(torch.full((7, 7), math.nan)), tokens, protocol)
    narrow = Bigram(torch.zeros(7, 3))
    with pytest.raises(EvaluationError, match="vocabulary"):
        measure(narrow, tokens, protocol)
    with pytest.raises(EvaluationError, match="vocabularies of 7 and 9"):
        measure(uniform(7), tokens, protocol, against=Bigram(torch.zeros(7, 9)))


@pytest.mark.parametrize("limit", [5, 2, 1])
def test_windows_that_do_not_fit_together_go_in_smaller_batches(limit: int) -> None:
    model, tokens = Counter(20, 8), torch.randint(20, (100,), generator=torch.Generator().manual_seed(3))
    protocol = protocol_named("own", 8, len(tokens), None)
    expected = measure(model, tokens, protocol, model, batch=6)
    memory = Memory(limit=limit)
    model.register_forward_pre_hook(lambda _, args, named: memory.hold(len(named["input_ids"])), with_kwargs=True)
    with pytest.warns(FeatherWarning, match="cpu ran out of memory: batches are of [13] windows? from here on"):
        found = measure(model, tokens, protocol, model, batch=6)
    assert found.loss.counts == expected.loss.counts
    assert found.loss.sums == pytest.approx(expected.loss.sums, rel=1e-6)
    memory.limit = 0
    with pytest.raises(EvaluationError, match="the memory of cpu does not suffice for one window"):
        measure(model, tokens, protocol, model, batch=1)
