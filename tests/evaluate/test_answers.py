"""Tasks in `evaluate`, on the command line, in the record of a folder and in the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from known_models import Words

import featherweight
from featherweight.cli.main import main
from featherweight.errors import EvaluationError, FeatherWarning
from featherweight.storage.run.record import read_record
from featherweight.tasks.evaluate import evaluation
from featherweight.tasks.evaluate.evaluation import evaluate, evaluate_each
from featherweight.tasks.evaluate.questions.engines import TransformersEngine
from featherweight.tasks.evaluate.questions.paired import can_test
from featherweight.tasks.report.runs import read_runs
from models import make_tiny

pytestmark = pytest.mark.filterwarnings("ignore:p-values and kappa")
WORDS = Words("the river was frozen ice steam Question: Answer: what is cold water a")
LINES = [
    {"context": "the river was", "choices": ["ice", "steam"], "answer": place, "id": number}
    for number, place in enumerate([0, 0, 0, 1, 1])
]
LINES += [{"context": "is cold", "choices": ["water", "ice"], "answer": 0}, {"context": "a", "target": "river"}]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the river was frozen ice " * 20)
    return path


def model(ice: float, river: float) -> tuple[Any, Any]:
    following = {"was": {"ice": ice, "steam": 0.5 - ice}, "cold": {"water": 0.5}, "a": {"river": river}}
    return WORDS.bigram(following, 16), WORDS


def test_answers_beside_the_original(questions: Path, text: Path) -> None:
    result = evaluate(model(0.1, 0.9), model(0.4, 0.01), text, tasks=questions)
    (task,) = result.answers
    assert (task.name, task.items, task.engine) == ("questions.jsonl", 7, "transformers")
    (score,) = task.scores
    assert score.right == (False, False, False, True, True, True, True)
    assert score.against is not None
    assert (score.accuracy, score.against.accuracy) == (4 / 7, 4 / 7)
    assert (score.against.lost, score.against.won) == (3, 3), "as accurate, and other answers"
    report = result.to_json()
    (found,) = report["tasks"]
    json.dumps(report, allow_nan=False)
    assert found["scores"]["acc"]["right"] == [0, 0, 0, 1, 1, 1, 1]
    assert found["scores"]["acc"]["flipped"] == pytest.approx(6 / 7)
    assert report["task_settings"] == [task.setting]
    if can_test():
        assert found["scores"]["acc"]["p"] == 1
        assert score.against.kappa == pytest.approx((1 / 7 - 25 / 49) / (1 - 25 / 49))
    shown = result._repr_html_()
    assert "questions.jsonl, acc" in shown
    assert "3 lost, 3 won" in shown


def test_without_an_original_and_without_tasks(questions: Path, text: Path) -> None:
    (task,) = evaluate(model(0.4, 0.9), text=text, tasks=[questions], items=4).answers
    assert task.scores[0].right == (True, True, True, False)
    assert task.scores[0].against is None
    alone = evaluate(model(0.4, 0.9), text=text)
    assert alone.answers == ()
    assert alone.to_json()["task_settings"] is None


def test_the_original_is_asked_once(questions: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plain = TransformersEngine.likelihoods

    def counted(self: TransformersEngine, *arguments: Any) -> Any:
        asked.append(self.model)
        return plain(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "likelihoods", counted)
    original, one, two = model(0.4, 0.01), model(0.1, 0.9), model(0.3, 0.9)
    results = list(evaluate_each([one, two], original, text, tasks=questions))  # type: ignore[list-item]
    assert [id(given) for given in asked] == [id(given) for given in (original[0], one[0], two[0])]
    changes = [(r.answers[0].scores[0].against.lost, r.answers[0].scores[0].against.won) for r in results]  # type: ignore[union-attr]
    assert changes == [(3, 3), (0, 1)]


def test_what_does_not_go_together(questions: Path, text: Path) -> None:
    with pytest.raises(EvaluationError, match="items and an engine are for tasks"):
        evaluate(model(0.4, 0.9), text=text, items=3)
    with pytest.raises(EvaluationError, match="items and an engine are for tasks"):
        evaluate(model(0.4, 0.9), text=text, engine="native")
    with pytest.raises(EvaluationError, match="the native decoder runs folders, and this model is in memory"):
        evaluate(model(0.4, 0.9), text=text, tasks=questions, engine="native")


def test_a_context_that_was_cut_is_said(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"context": "the river was frozen " * 8, "target": "ice"}))
    with pytest.warns(FeatherWarning, match="1 context of the task long.jsonl"):
        result = evaluate(model(0.4, 0.9), text=text, tasks=path)
    assert any("their beginnings were left out" in said for said in result.warnings)


def test_what_needs_statsmodels_says_so(questions: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.stats.contingency_tables", None)
    with pytest.warns(FeatherWarning, match=r"p-values and kappa .* pip install 'featherweight\[tasks\]'"):
        result = evaluate(model(0.1, 0.9), model(0.4, 0.01), text, tasks=questions)
    score = result.to_json()["tasks"][0]["scores"]["acc"]
    assert (score["lost"], score["won"], score["p"], score["kappa"]) == (3, 3, None, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, a, b): a model and two compressions of it."""
    folder = tmp_path_factory.mktemp("folders")
    made = make_tiny("llama", folder / "model", tokenizer=True, max_position_embeddings=512)
    for name, recipe in (("a", "rtn-4"), ("b", "rtn-2")):
        featherweight.compress(made, recipe, folder / name, changes=["grid.group_size=32"], threads=1)
    return made, folder / "a", folder / "b"


def feather(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", *map(str, words), "--threads", "1", "--quiet"])
    assert stop.value.code in (0, None)


def test_on_the_command_line_and_in_the_report(
    folders: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, a, b = folders
    short = evaluation.bundled_text()[:1500]
    monkeypatch.setattr(evaluation, "bundled_text", lambda *_: short)
    asked = ("--against", original, "--context", 64)
    tasks = ("--tasks", "novels-choice,novels-cloze", "--items", 6)
    feather(a, b, *asked, *tasks, "--json", tmp_path / "both.json", "--html", tmp_path / "both.html")
    shown = capsys.readouterr().out
    assert "accuracy (95 %)" in shown
    assert shown.count("novels-choice, acc ") == 3, "the original and two models"
    assert "(original)" in shown
    reports = json.loads((tmp_path / "both.json").read_text())
    assert [[task["name"] for task in report["tasks"]] for report in reports] == [["novels-choice", "novels-cloze"]] * 2
    page = (tmp_path / "both.html").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "novels-choice, acc_norm" in page

    feather(a, *asked)  # later, and without tasks: what is known of them stays
    feather(a, *asked, "--tasks", "novels-cloze", "--items", 4, "--engine", "native")
    recorded = read_record(a)["evaluations"]
    assert len(recorded) == 3
    assert "right" not in json.dumps(recorded)
    capsys.readouterr()
    known, first, second = read_runs([a, b])
    assert known.original
    settings = [str(task["setting"]) for task in first.tasks]
    assert len(settings) == 3
    assert sum("native" in setting for setting in settings) == 1
    assert [str(task["setting"]) for task in second.tasks] == settings[:2]
    assert known.tasks[0]["scores"]["acc"]["accuracy"] == first.tasks[0]["scores"]["acc"]["accuracy_against"]
    featherweight.report([a, b], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("novels-cloze, acc</th>") == 2, "other items, other columns"


def test_errors_are_one_sentence(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "a", "target": "b"}\n{"context": "a"}\n')
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(folders[1]), "--tasks", str(path)])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert "bad.jsonl, line 2 has neither choices nor a target" in said[-1]
