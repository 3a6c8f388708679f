"""Intervals of accuracies, and two models on the same items."""

from __future__ import annotations

import math
import sys

import pytest

from featherweight.errors import EvaluationError
from featherweight.tasks.evaluate.questions import paired as module
from featherweight.tasks.evaluate.questions.asking import change_text, p_text
from featherweight.tasks.evaluate.questions.paired import EXACT_UP_TO, can_test, paired, wilson

needs_statsmodels = pytest.mark.skipif(not can_test(), reason="statsmodels is not installed")


def answers(both: int, won: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Of a model and its original."""
    own = [True] * (both + won) + [False] * (lost + neither)
    original = [True] * both + [False] * won + [True] * lost + [False] * neither
    return own, original


@pytest.mark.parametrize(
    ("right", "items", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (8, 10, (0.4902, 0.9433)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson(right: int, items: int, expected: tuple[float, float]) -> None:
    assert wilson(right, items) == pytest.approx(expected, abs=1e-4)


@needs_statsmodels
def test_wilson_is_that_of_statsmodels() -> None:
    from statsmodels.stats.proportion import proportion_confint

    for right, items in ((0, 1), (1, 1), (3, 7), (400, 1000), (999, 1000)):
        assert wilson(right, items) == pytest.approx(proportion_confint(right, items, method="wilson"), abs=1e-12)


def test_what_became_of_the_answers() -> None:
    found = paired(*answers(both=5, won=2, lost=4, neither=1))
    assert (found.accuracy, found.lost, found.won) == (9 / 12, 4, 2)
    assert found.interval == wilson(9, 12)
    with pytest.raises(EvaluationError, match="2 items for this model and 1 for the original"):
        paired([True, False], [True])


@needs_statsmodels
def test_mcnemar_is_exact_for_few() -> None:
    assert paired(*answers(20, 10, 0, 5)).p == pytest.approx(2 * 0.5**10)
    assert paired(*answers(3, 6, 6, 3)).p == 1
    assert paired(*answers(7, 0, 0, 2)).p == 1
    binomial = 2 * sum(math.comb(9, k) for k in range(3)) / 2**9
    assert paired(*answers(1, 2, 7, 90)).p == pytest.approx(binomial)
    assert paired(*answers(1, 7, 2, 90)).p == pytest.approx(binomial), "it is two-sided"
    assert paired(*answers(1, 7, 2, 90)).test == "exact"


@needs_statsmodels
def test_mcnemar_of_many() -> None:
    won, lost = EXACT_UP_TO // 2 + 50, EXACT_UP_TO // 2
    found = paired(*answers(10, won, lost, 10))
    statistic = (abs(won - lost) - 1) ** 2 / (won + lost)
    assert found.test == "chi-squared"
    assert found.p == pytest.approx(math.erfc(math.sqrt(statistic / 2)))


@needs_statsmodels
def test_kappa() -> None:
    assert paired(*answers(4, 0, 0, 5)).kappa == pytest.approx(1)
    assert paired(*answers(0, 5, 5, 0)).kappa == pytest.approx(-1)
    assert paired(*answers(25, 25, 25, 25)).kappa == pytest.approx(0)
    observed, expected = 0.7, 0.5 * 0.6 + 0.5 * 0.4
    assert paired(*answers(40, 10, 20, 30)).kappa == pytest.approx((observed - expected) / (1 - expected))
    for everything in ((6, 0, 0, 0), (0, 0, 0, 6)):
        found = paired(*answers(*everything))
        assert found.kappa is None
        assert "kappa not defined" in change_text(found)
    assert paired(*answers(0, 6, 0, 0)).kappa == 0, "the two agree in nothing, and chance would not let them"


def test_without_statsmodels_the_counts_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.stats.contingency_tables", None)
    assert not module.can_test()
    found = paired(*answers(5, 2, 4, 1))
    assert (found.lost, found.won, found.p, found.test, found.kappa) == (4, 2, None, "", None)
    assert change_text(found) == "4 lost, 2 won; p needs statsmodels (pip install 'featherweight[tasks]')"


def test_small_p_are_written_with_their_exponent() -> None:
    assert (p_text(0.25), p_text(0.001), p_text(0.0004)) == ("0.250", "0.001", "4.0e-04")
