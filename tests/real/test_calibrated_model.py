"""Orderings that the papers claim, on the bundled model: calibrated against data-free, ours against published PTQTP.

Little text and few tuning steps, so that this runs in a minute or two; benchmarks/quality.py has the full figures.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from remembering import own_precision, remembering

from featherweight.tasks.compress.compression import compress
from featherweight.tasks.evaluate.evaluation import evaluate

REFERENCE = Path(__file__).parents[2] / "src" / "featherweight" / "assets" / "reference"
TEXT = ("calibration.sequences=16", "calibration.length=512")
MORE_TEXT = ("calibration.sequences=32", "calibration.length=512")  # with half of it .40 of ptqtp's divergence, not .34
TOKENS = 8192
TUNED = "corrections=[{kind: scale-tuning, steps: 12, batch_size: 1, learning_rate: 5.0e-3, checks: 2}]"
long = pytest.mark.skipif("FEATHERWEIGHT_LONG_TESTS" not in os.environ, reason="set FEATHERWEIGHT_LONG_TESTS=1")
ALIKE = "allocation={kind: fixed}"  # the same bits in all layers
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn-3": ("rtn-3", ()),
    "gptq-3": ("gptq-3", ()),  # its whole text: what the sweep gains grows with it
    "ptqtp": ("ptqtp", ()),
    "pt2-llm": ("pt2-llm", TEXT),
    "trit-1": ("trit-1", (*TEXT, "corrections=[]")),
    "trit-1, one plane": ("trit-1", (*TEXT, "corrections=[]", ALIKE)),
    "trit-2": ("trit-2", (*MORE_TEXT, TUNED)),
    "trit-2, two planes": ("trit-2", (*MORE_TEXT, TUNED, ALIKE)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Divergence from the original and true bits of a recipe's result, in its layers and in all, each made once."""
    found: dict[str, tuple[float, float, float]] = {}
    original = remembering(REFERENCE)

    def measure(name: str) -> tuple[float, float, float]:
        if name not in found:
            recipe, changes = RECIPES[name]
            out = tmp_path_factory.mktemp("made") / name
            with own_precision():
                made = compress(REFERENCE, recipe, out, changes=changes)
            result = evaluate(out, original, limit=TOKENS)
            assert result.divergence is not None
            found[name] = (result.divergence.mean, made.bits_per_weight_linear, made.bits_per_weight_model)
        return found[name]

    return measure


@pytest.mark.slow
def test_the_hessian_sweep_loses_a_quarter_less_on_the_same_grid(measured: Any) -> None:
    """.68 of it where the network runs in float32; bfloat16, chosen where it is faster, makes .70 of it."""
    nearest, swept = measured("rtn-3"), measured("gptq-3")
    assert swept[1] == nearest[1]
    assert swept[0] < 0.75 * nearest[0]


@pytest.mark.slow
def test_two_planes_are_far_better_than_published_ptqtp_at_the_same_bits(measured: Any) -> None:
    published, ours = measured("ptqtp"), measured("trit-2, two planes")
    assert ours[1] < published[1] + 1e-3
    assert ours[0] < 0.4 * published[0]
    assert ours[0] < measured("gptq-3")[0]


@pytest.mark.slow
def test_one_plane_beats_the_published_one(measured: Any) -> None:
    published, ours = measured("pt2-llm"), measured("trit-1, one plane")
    assert ours[1] <= 1.8502 < published[1]
    assert ours[0] < 0.8 * published[0]


@pytest.mark.slow
@long
@pytest.mark.parametrize(("preset", "planes", "bits"), [("trit-2", "two planes", 0.35), ("trit-1", "one plane", 0.5)])
def test_a_plane_more_by_role_pays(measured: Any, preset: str, planes: str, bits: float) -> None:
    """A third to a half of a bit more in all layers, and with two planes still a smaller file than ptqtp's."""
    alike, by_role = measured(f"{preset}, {planes}"), measured(preset)
    assert 0 < by_role[1] - alike[1] < bits
    assert by_role[0] < 0.95 * alike[0]
    assert preset == "trit-1" or by_role[2] < measured("ptqtp")[2] - 1
