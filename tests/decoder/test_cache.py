"""Prompt reuse, batches, threads, the 8-bit cache: what must not change the tokens, and what may change a little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_models import make_model, relative, some_tokens

from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.sampling import Sampling
from featherweight.native import library

VOCABULARY = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16, max_position_embeddings=512)


@pytest.fixture
def model(folder: Path) -> NativeModel:
    return NativeModel.open(folder, threads=2)


WARM = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=3)


def test_a_prompt_that_goes_on_is_not_computed_again(model: NativeModel) -> None:
    first = some_tokens(150)
    answer = model.generate(first, 20, stops=())
    longer = [*first, *answer, *some_tokens(9, seed=5)]
    reused = model.generate(longer, 20, stops=())
    stats = model.stats()
    assert stats.reused_tokens == 169  # the answer's last token was never put in
    assert stats.prompt_tokens == 150 + 10
    model.reset()
    assert model.stats().prompt_tokens == 0
    assert model.generate(longer, 20, stops=()) == reused
    assert model.stats().reused_tokens == 0


@pytest.mark.parametrize("common", [0, 1, 127, 128, 129, 149])
def test_a_prompt_that_turns_off(model: NativeModel, common: int) -> None:
    first = some_tokens(150)
    other = first[:common] + some_tokens(40, seed=9)
    model.generate(other, 5, stops=())
    fresh = model.generate(first, 12, WARM, stops=())
    model.reset()
    assert model.generate(first, 12, WARM, stops=()) == fresh


def test_the_same_prompt_again(model: NativeModel) -> None:
    tokens = some_tokens(30)
    assert model.generate(tokens, 8, stops=()) == model.generate(tokens, 8, stops=())
    assert model.stats().prompt_tokens == 31


def test_a_batch_is_its_parts(model: NativeModel) -> None:
    prompts = [some_tokens(n, seed=n) for n in (1, 17, 140, 64)]
    samplings = [Sampling(), WARM, Sampling(temperature=0.7, min_p=0.05, seed=8), WARM]
    together = model.generate_batch(prompts, 24, samplings, stops=())
    for prompt, sampling, found in zip(prompts, samplings, together, strict=True):
        model.reset()
        assert model.generate(prompt, 24, sampling, stops=()) == found


def test_logits_of_a_batch(model: NativeModel) -> None:
    prompts = [some_tokens(n, seed=n) for n in (5, 130, 40)]
    expected = []
    for prompt in prompts:
        model.reset()
        model.feed(prompt[:-1])
        expected.append(model.feed(prompt[-1:]))
    model.reset()
    for sequence, prompt in enumerate(prompts):
        model.feed(prompt[:-1], sequence)
    found = model.step({sequence: prompt[-1] for sequence, prompt in reversed(list(enumerate(prompts)))})
    assert relative(found.flip(0), torch.stack(expected)) < 1e-5
    assert [model.length(sequence) for sequence in range(4)] == [5, 130, 40, 0]


LONG = 4096


@pytest.fixture(scope="module")
def one_key_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All heads share their keys, so that threads can only share a sequence by its positions."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("one-key-head")
    return make_model("llama", folder, torch.bfloat16, max_position_embeddings=LONG + 64, **sizes)


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_positions_shared_by_threads_do_not_change_a_bit(one_key_head: Path, cache: str) -> None:
    tokens = some_tokens(LONG + 1)
    others = {length: some_tokens(length, seed=length) for length in (3, 257, 1000)}
    found = []
    for threads in (1, 2, 5):
        model = NativeModel.open(one_key_head, threads=threads, kv_cache=cache)
        whole = model.feed(tokens)
        model.reset()
        model.feed(tokens[:-1])
        assert torch.equal(model.feed(tokens[-1:]), whole), threads  # a step's parts are those of a prompt
        model.reset()
        model.feed(tokens[:-1])
        for sequence, text in enumerate(others.values(), 1):
            model.feed(text, sequence)
        batch = model.step({0: tokens[-1], 1: 5, 2: 6, 3: 7})
        assert torch.equal(batch[0], whole), threads
        found.append((whole, batch, model.generate(tokens[:LONG], 20, WARM, stops=())))
    for logits, batch, made in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(batch, found[0][1])
        assert made == found[0][2]


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_threads_do_not_change_a_bit(folder: Path, precision: str) -> None:
    tokens = some_tokens(200)
    models = [NativeModel.open(folder, threads=n, precision=precision) for n in (1, 2, 3)]
    logits = [model.forward(tokens) for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    made = [model.generate(tokens[:50], 30, WARM, stops=()) for model in models]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_instruction_sets_agree(folder: Path, cache: str) -> None:
    """Up to the rounding of fused multiply-adds."""
    found = library.get()
    assert found is not None
    tokens = some_tokens(150)
    logits = {}
    try:
        for name in ("baseline", "avx2", "avx512"):
            try:
                found.select_isa(name)
            except ValueError:
                continue
            model = NativeModel.open(folder, threads=1, precision="float", kv_cache=cache)
            whole = model.forward(tokens[:140])
            model.reset()
            last = model.feed(tokens[:139])
            decoded = [model.feed([token]) for token in tokens[139:]]
            assert relative(last, whole[138]) < 1e-3
            logits[name] = torch.cat([whole, torch.stack(decoded)])
    finally:
        found.select_isa("auto")
    for other in logits.values():
        assert relative(other, logits["baseline"]) < (2e-4 if cache == "float16" else 5e-3)


def test_the_cache_in_8_bits_is_close(folder: Path) -> None:
    tokens = some_tokens(300)
    exact = NativeModel.open(folder, threads=1, precision="float").forward(tokens)
    small = NativeModel.open(folder, threads=1, precision="float", kv_cache="int8")
    found = small.forward(tokens)
    assert 1e-6 < relative(found, exact) < 0.03
    assert torch.cosine_similarity(found, exact, dim=1).min() > 0.998
    small.reset()
    assert relative(torch.stack([small.feed([token]) for token in tokens[:140]]), exact[:140]) < 0.03


def test_the_cache_takes_the_memory_it_says(folder: Path) -> None:
    sizes = {}
    for cache in ("float16", "int8"):
        model = NativeModel.open(folder, threads=1, kv_cache=cache)
        model.feed(some_tokens(200))
        sizes[cache] = model.stats().cache_bytes
    # Two pages of 128 positions: 2 layers, 2 heads, keys and values of 16 elements.
    assert sizes == {"float16": 2 * 128 * 2 * 2 * 2 * 16 * 2, "int8": 2 * 128 * 2 * 2 * 2 * (16 + 4)}


def test_pages_are_used_again(folder: Path) -> None:
    model = NativeModel.open(folder, threads=1)
    for seed in range(6):
        model.generate(some_tokens(140, seed=seed), 4, stops=())
    assert model.stats().cache_bytes == 2 * 128 * 2 * 2 * 2 * 16 * 2


def test_stops_end_a_text(model: NativeModel) -> None:
    tokens = some_tokens(20)
    made = model.generate(tokens, 30, WARM, stops=())
    end = made[11]
    assert model.generate(tokens, 30, WARM, stops=[end]) == made[: made.index(end)]
    assert model.generate(tokens, 30, WARM, stops=made[:1]) == []


def test_every_token_is_told_and_can_end_it(model: NativeModel) -> None:
    tokens = some_tokens(20)
    told: list[int] = []
    made = model.generate(tokens, 10, WARM, on_token=told.append, stops=())
    assert told == made
    few = model.generate(tokens, 10, WARM, on_token=lambda token: token == made[4], stops=())
    assert few == made[: made.index(made[4]) + 1]


def test_an_error_of_the_listener_is_raised(model: NativeModel) -> None:
    def listen(token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(some_tokens(5), 10, on_token=listen)
    assert len(model.generate(some_tokens(5), 10, stops=())) == 10


def test_it_ends_where_the_context_does(folder: Path) -> None:
    model = NativeModel.open(folder, threads=1, context=32)
    whole = NativeModel.open(folder, threads=1).generate(some_tokens(28), 30, stops=())
    assert model.generate(some_tokens(28), 30, stops=()) == whole[:5]  # the last of them needs no place
    assert model.length() == 32
