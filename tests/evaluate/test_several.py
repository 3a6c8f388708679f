"""Several models against one original, standard errors over windows, warnings, and texts by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from known_models import Bigram, Counter

from featherweight.errors import CalibrationError, EvaluationError, FeatherWarning
from featherweight.model.text.documents import read_documents
from featherweight.tasks.evaluate.divergence import DivergenceSum, ratio_error
from featherweight.tasks.evaluate.evaluation import evaluate, evaluate_each
from featherweight.tasks.evaluate.perplexity import KeptReader, LogitsReader, measure
from featherweight.tasks.evaluate.protocols import protocol_named
from featherweight.tasks.evaluate.texts import named_text
from featherweight.tasks.evaluate.trust import USELESS_KL, warnings_of
from models import make_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The original and two others of its shape."""
    folder = tmp_path_factory.mktemp("models")
    made = []
    for number in range(3):
        torch.manual_seed(number)
        made.append(make_tiny("llama", folder / f"model-{number}", tokenizer=True))
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 12)
    return path


def test_each_is_what_it_is_alone(models: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, *others = models
    alone = [evaluate(model, original, text, protocol="own", context=32, threads=1) for model in others]
    reads: list[Any] = []
    plain = LogitsReader.__call__

    def counted(self: LogitsReader, ids: torch.Tensor) -> Any:
        reads.append(self)
        return plain(self, ids)

    monkeypatch.setattr(LogitsReader, "__call__", counted)
    progress: list[tuple[int, int]] = []
    together = list(
        evaluate_each(others, original, text, context=32, threads=1, progress=lambda *x: progress.append(x))
    )
    for one, other in zip(together, alone, strict=True):
        assert (one.perplexity, one.perplexity_against) == (other.perplexity, other.perplexity_against)
        assert one.divergence == other.divergence
        assert one.size == other.size
        assert one.size_against is not None
    of_original = [reader for reader in reads if isinstance(reader, KeptReader)]
    of_others = [reader for reader in reads if not isinstance(reader, KeptReader)]
    assert len(of_original) == len(of_others) // 2 > 0
    assert progress[-1][0] == progress[-1][1]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_what_is_kept_is_what_was_read(room: int) -> None:
    model = Counter(11, 16)
    reader = KeptReader(model, room_bytes=room)
    ids = torch.randint(11, (3, 16))
    with torch.inference_mode():
        for rows in (ids, ids, ids[1:2]):
            for row in range(len(rows)):
                expected = LogitsReader(model)(rows).logits(row, 2, 9)
                assert torch.equal(reader(rows).logits(row, 2, 9), expected)


def test_errors_of_a_divergence_are_over_windows() -> None:
    """Tokens of one window move together here: only windows are independent."""
    collected, generator = DivergenceSum(), torch.Generator().manual_seed(0)
    means = []
    for _ in range(40):
        level = float(torch.rand((), generator=generator))
        original = torch.log_softmax(torch.zeros(25, 2), -1)
        other = torch.log_softmax(torch.tensor([[level, -level]]).expand(25, 2), -1)
        collected.add(original, other)
        collected.end_window()
        means.append(float((original.exp() * (original - other)).sum(-1).mean()))
    found = collected.result()
    assert found.mean == pytest.approx(np.mean(means), rel=1e-4)
    assert found.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(40), rel=1e-3)
    values = np.repeat(means, 25)
    assert found.standard_error > 4 * values.std(ddof=1) / math.sqrt(len(values))
    assert ratio_error((1.0,), (3,)) is None


def bigram(sharpness: float, vocabulary: int = 8) -> Bigram:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(vocabulary, vocabulary, generator=generator) * sharpness
    return Bigram(torch.log_softmax(table, -1), 32)


def warned(model: Bigram, original: Bigram | None, tokens: int) -> list[str]:
    ids = torch.randint(8, (tokens,), generator=torch.Generator().manual_seed(2))
    return warnings_of(measure(model, ids, protocol_named("own", 32, tokens), original))


def test_warnings_where_numbers_cannot_be_trusted() -> None:
    assert warned(bigram(0.1), bigram(0.1), 32 * 200) == []
    (alone,) = warned(bigram(0.1), None, 32)
    assert "single window" in alone
    (few,) = warned(bigram(3.0), None, 64)
    assert "uncertain by" in few
    useless = warned(bigram(8.0), bigram(0.1), 32 * 400)
    assert any("of no use" in sentence for sentence in useless)
    assert USELESS_KL == 1.0


def test_a_warning_is_raised_and_kept(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short text of a few words.")
    with pytest.warns(FeatherWarning, match="single window"):
        result = evaluate(models[0], text=path, threads=1)
    assert result.to_json()["warnings"] == list(result.warnings)
    shown = result._repr_html_()
    assert "single window" in shown
    assert f"{result.perplexity:.4f}" in shown


def test_a_warning_says_which_of_several_it_is_about(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A short text of a few words.")
    with pytest.warns(FeatherWarning) as caught:
        results = list(evaluate_each(models[:2], text=path, threads=1))
    said = [str(one.message) for one in caught if "single window" in str(one.message)]
    assert [sentence.partition(": ")[0] for sentence in said] == [str(model) for model in models[:2]]
    assert all(one.warnings[0].startswith("a single window") for one in results)


def datasets_of(rows: list[dict[str, Any]], asked: list[Any]) -> ModuleType:
    module = ModuleType("datasets")

    def load_dataset(*given: Any, **named: Any) -> list[dict[str, Any]]:
        asked.append((given, named))
        return rows

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_wikitext_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": "Words."}]
    monkeypatch.setitem(sys.modules, "datasets", datasets_of(rows, asked))
    monkeypatch.chdir(tmp_path)
    assert named_text("wikitext-2") == "\n\n".join(row["text"] for row in rows)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert named_text("hf:some/set::validation:text") == "\n\n".join(row["text"] for row in rows)
    assert asked[-1] == (("some/set", None), {"split": "validation"})
    (tmp_path / "wikitext-2").write_text("a file of that name")
    assert named_text("wikitext-2") == "a file of that name"


def test_data_sets_that_cannot_be_had_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    talks = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    monkeypatch.setitem(sys.modules, "datasets", datasets_of(talks, []))
    with pytest.raises(EvaluationError, match="has conversations, not texts"):
        named_text("hf:talks")
    broken = datasets_of([], [])

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute")

    broken.load_dataset = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", broken)
    with pytest.raises(EvaluationError, match=r"cannot load the data set hf:x \(ConnectionError: no route\)"):
        named_text("hf:x")
    with pytest.raises(CalibrationError, match="the connection to the hub"):
        read_documents("hf:x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match="pip install datasets"):
        named_text("hf:x")
