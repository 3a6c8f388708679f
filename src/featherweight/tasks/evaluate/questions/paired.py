"""Accuracies with their intervals, and whether two models that answered the same items differ.

The items are the same, so the tests are paired: what both answer right or both wrong says nothing of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from featherweight.errors import EvaluationError

NORMAL_95 = 1.959963984540054
EXACT_UP_TO = 1000
"""Items answered otherwise up to which McNemar's test is exact; from there on the approximation is off by less than
0.4 % of a p between 0.01 and 0.1."""
INSTALL = "pip install 'featherweight[tasks]'"


class Interval(NamedTuple):
    """Of a share."""

    low: float
    high: float


def wilson(right: int, items: int) -> Interval:
    """The 95 % interval of Wilson (1927) for a share of `right` in `items`, at least one."""
    share, z2 = right / items, NORMAL_95**2
    centre = share + z2 / (2 * items)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / items + z2 / (4 * items * items))
    return Interval(max(0.0, (centre - half) / (1 + z2 / items)), min(1.0, (centre + half) / (1 + z2 / items)))


@dataclass(frozen=True)
class Paired:
    """Answers beside the original's on the same items.

    accuracy, interval : the original's
    lost, won : items that only the original, and that only this model answers right
    p : of McNemar's test, two-sided, that both are as likely to be the one that is right; None without statsmodels
    test : "exact" (binomial) or "chi-squared" (with continuity correction), "" without statsmodels
    kappa : Cohen's, of right and wrong: 1 where all agree, 0 what chance would give; None without statsmodels, and
        where it is not defined, as both models are right, or wrong, in every item
    """

    accuracy: float
    interval: Interval
    lost: int
    won: int
    p: float | None
    test: str
    kappa: float | None


def paired(answers: Sequence[bool], original: Sequence[bool]) -> Paired:
    """Of two models; true where an item is answered right. EvaluationError where they are not of the same items."""
    if len(answers) != len(original):
        raise EvaluationError(
            f"a task has {len(answers)} items for this model and {len(original)} for the original: they are no pairs"
        )
    both = sum(a and b for a, b in zip(answers, original, strict=True))
    lost, won = sum(original) - both, sum(answers) - both
    right = sum(original)
    p, test, kappa = _tests(((both, won), (lost, len(answers) - both - lost - won)))
    return Paired(right / len(original), wilson(right, len(original)), lost, won, p, test, kappa)


def can_test() -> bool:
    """Whether statsmodels is there."""
    try:
        import statsmodels.stats.contingency_tables  # noqa: F401
    except ImportError:
        return False
    return True


def _tests(table: tuple[tuple[int, int], tuple[int, int]]) -> tuple[float | None, str, float | None]:
    """p, the test's name, and kappa, by statsmodels; of ((both right, only this), (only the original, neither))."""
    if not can_test():
        return None, "", None
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.inter_rater import cohens_kappa

    (both, won), (lost, neither) = table
    exact = won + lost <= EXACT_UP_TO
    p = float(mcnemar(table, exact=exact, correction=True).pvalue) if won + lost else 1.0
    defined = both + won + lost + neither not in (both, neither)
    return p, "exact" if exact else "chi-squared", float(cohens_kappa(table, return_results=False)) if defined else None
