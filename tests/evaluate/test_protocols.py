"""Which tokens each protocol scores, by enumeration, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.errors import EvaluationError
from featherweight.tasks.evaluate.protocols import NAMES, Setting, protocol_named


def scored(name: str, tokens: int, context: int) -> list[tuple[int, int]]:
    """(scored token, tokens of context before it) for the whole text."""
    protocol = protocol_named(name, None, tokens, context)
    return [(place, place - w.start) for w in protocol.windows(tokens) for place in range(w.first, w.stop)]


@pytest.mark.parametrize("name", ["own", "2048", "4096"])
def test_non_overlapping_windows_score_all_but_their_first_token(name: str) -> None:
    assert scored(name, 11, 4) == [(1, 1), (2, 2), (3, 3), (5, 1), (6, 2), (7, 3)]


def test_papers_score_2047_tokens_a_window() -> None:
    protocol = protocol_named("2048", 4096, 5000)
    assert [(w.start, w.stop, w.scored) for w in protocol.windows(5000)] == [(0, 2048, 2047), (2048, 4096, 2047)]


def test_llama_cpp_scores_255_tokens_of_512() -> None:
    protocol = protocol_named("llama.cpp", 2048, 1500)
    assert protocol.bos_each_window
    assert [(w.start, w.first, w.stop) for w in protocol.windows(1500)] == [(0, 257, 512), (512, 769, 1024)]
    assert protocol.scored(1500) == 510


def test_llama_cpp_rule_is_logits_from_half_to_the_last_but_one() -> None:
    for context in range(3, 40):
        places = [place for place, _ in scored("llama.cpp", context, context)]
        assert places == [logit + 1 for logit in range(context // 2, context - 1)]


@given(st.integers(2, 40), st.integers(0, 100))
def test_strided_scores_each_token_once_with_half_a_window_before_it(context: int, more: int) -> None:
    tokens = context + more
    places = scored("strided", tokens, context)
    first = context - context // 2
    assert [place for place, _ in places] == list(range(first, tokens))
    assert all(context // 2 <= before < context for _, before in places)


@given(st.sampled_from(NAMES), st.integers(3, 30), st.integers(0, 100))
def test_windows_are_whole_and_inside_the_text(name: str, context: int, more: int) -> None:
    protocol = protocol_named(name, None, context + more, context)
    windows = list(protocol.windows(context + more))
    assert windows
    assert protocol.scored(context + more) == sum(w.stop - w.first for w in windows) > 0
    for window in windows:
        assert 0 <= window.start < window.first < window.stop <= context + more
        assert window.stop - window.start == context


def test_own_is_the_models_context_or_a_shorter_text() -> None:
    assert protocol_named("own", 1024, 5000).context == 1024
    assert protocol_named("own", 1024, 100).context == 100
    assert protocol_named("strided", 1024, 5000).stride == 512


@pytest.mark.parametrize(
    ("name", "own", "tokens", "context", "words"),
    [
        ("own", 10, 0, None, ["empty"]),
        ("own", 10, 1, None, ["1 token"]),
        ("own", None, 10, None, ["--context"]),
        ("2048", 1024, 9999, None, ["2048", "1024", "own", "--context"]),
        ("2048", 4096, 2047, None, ["2048", "2047"]),
        ("4096", None, 4095, None, ["4096", "4095"]),
        ("llama.cpp", 2048, 511, None, ["512", "511"]),
        ("own", 1024, 9999, 1025, ["1025", "1024"]),
        ("own", 1024, 100, 101, ["101", "100"]),
        ("own", 1024, 100, 1, ["1", "2"]),
        ("llama.cpp", 1024, 100, 2, ["2", "3"]),
        ("own", 1024, 100, 0, ["0"]),
        ("lama.cpp", 1024, 100, None, ["llama.cpp"]),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    name: str, own: int | None, tokens: int, context: int | None, words: list[str]
) -> None:
    with pytest.raises(EvaluationError) as caught:
        protocol_named(name, own, tokens, context)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_description_says_everything_a_number_depends_on() -> None:
    protocol = protocol_named("strided", 64, 1000)
    text = Setting(protocol, 1000, "no BOS, as the tokenizer adds none", "float32", "ab" * 32, "cd" * 32).describe()
    for part in ("strided", "context 64", "stride 32", "968 of 1000", "BOS", "float32", "abababab", "cdcdcdcd"):
        assert part in text
