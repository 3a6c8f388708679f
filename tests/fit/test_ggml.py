"""A fit whose choices are ggml's types: a plain GGUF within its budget, read back by the package gguf."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import featherweight
from featherweight.errors import FeatherError, OutputError
from featherweight.interop.gguf_writing.ggml_library import library_path
from featherweight.tasks.fit.settings import FitSettings
from models import make_tiny

pytestmark = pytest.mark.skipif(
    library_path() is None, reason="ggml's encoder is not here: pip install featherweight[gguf], or FEATHERWEIGHT_GGML"
)
QUICK = FitSettings(
    ways=("q4_0", "q5_0", "q8_0"), windows=8, length=64, tokens=128, refine=1, score=256, target="llama.cpp"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> featherweight.Fit:
    place, draw = tmp_path_factory.mktemp("gguf"), random.Random(0)
    model = make_tiny("llama", place / "model", tokenizer=True)
    text = place / "text.txt"
    text.write_text(" ".join(draw.choice(["once", "upon", "a", "time", "there", "was"]) for _ in range(4000)))
    return featherweight.fit(
        model, place / "out.gguf", 85_000, settings=QUICK, calibration=text, text=text, work=place / "work"
    )


def test_the_file_is_within_its_budget_and_has_the_chosen_types(made: featherweight.Fit) -> None:
    import gguf

    assert made.out.stat().st_size == made.bytes <= 85_000
    assert made.bytes > 0.9 * 85_000
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(made.out).tensors}
    assert len(made.tensor_types) == len(made.layers)
    for line in made.tensor_types:
        name, _, kind = line.removeprefix("--tensor-type ").partition("=")
        assert found[name] == kind.upper()
    assert len(set(found.values())) > 2  # F32 of vectors, and more than one type of matrices


def test_it_was_compared_with_the_original(made: featherweight.Fit) -> None:
    assert made.kl is not None
    assert 0 < made.kl < 0.1
    assert (made.out.parent / "out.gguf.json").exists()


def test_what_is_there_stays(made: featherweight.Fit, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already"):
        featherweight.fit(made.out.parent / "model", made.out, 85_000, settings=QUICK)
    from dataclasses import replace

    with pytest.raises(FeatherError, match="ggml has no type 'q9_0'"):
        featherweight.fit(
            made.out.parent / "model", tmp_path / "x.gguf", 85_000, settings=replace(QUICK, ways=("q9_0",)),
            work=tmp_path / "work",
        )  # fmt: skip
