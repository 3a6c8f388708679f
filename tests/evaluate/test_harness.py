"""Tasks of lm-evaluation-harness: the same answers as the harness's own models give, and as ours for the same items."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featherweight.errors import EvaluationError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.tasks.evaluate.opening import open_model
from featherweight.tasks.evaluate.questions.asking import HarnessTask, choose
from featherweight.tasks.evaluate.questions.engines import NativeEngine, TransformersEngine
from models import END, VOCABULARY, chat_tokenizer, make_tiny

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
CLOZE = """
task: own_cloze
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{target}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
WRITTEN = """
task: own_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
TEXTS = ("It was a dark night", "the rain fell in", "a house stood by the", "nobody knew of the", "On Sunday they")
ENDS = ("storm", "torrents", "river", "letter", "came")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_tiny("llama", folder, torch.float32, vocab_size=VOCABULARY + 4, eos_token_id=END, max_position_embeddings=64)
    chat_tokenizer().save_pretrained(folder)  # the harness's own model needs a token that ends a text
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def items(tmp_path: Path) -> Path:
    lines = []
    for number, text in enumerate(TEXTS * 4):
        choices = [f"{ENDS[(number + i) % 5]}{'s' * (number % 3)}" for i in range(3)]
        lines.append({"context": text, "choices": choices, "answer": number % 3})
    path = tmp_path / "choice.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    cloze = [{"context": text, "target": end} for text, end in zip(TEXTS, ENDS, strict=True)]
    (tmp_path / "cloze.jsonl").write_text("\n".join(json.dumps(line) for line in cloze))
    return tmp_path


def described(folder: Path, template: str, name: str, data: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(template.format(data=folder / data))
    return str(path)


def engine_of(llama: Path, native: bool = False) -> tuple[Any, Any]:
    model, tokenizer = open_model(llama, "float32", torch.device("cpu"))
    if native:
        return NativeEngine(NativeModel.open(llama, threads=1, precision="float"), tokenizer), tokenizer
    return TransformersEngine(model, tokenizer, 64), tokenizer


def theirs(llama: Path, path: str) -> dict[str, Any]:
    """By the harness's own model."""
    from lm_eval.models.huggingface import HFLM

    from featherweight.tasks.evaluate.questions.harness import task_manager

    model, tokenizer = open_model(llama, "float32", torch.device("cpu"))
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    return dict(lm_eval.simple_evaluate(own, tasks=[path], bootstrap_iters=0, task_manager=task_manager(shipped=False)))


@pytest.mark.parametrize("native", [False, True])
def test_choices_are_those_of_the_harness_and_of_our_own_lines(llama: Path, items: Path, native: bool) -> None:
    path = described(items, CHOICE, "own_choice", "choice.jsonl")
    engine, tokenizer = engine_of(llama, native)
    found = choose([path, str(items / "choice.jsonl")]).ask(engine, tokenizer)
    harness, own = found["own_choice.yaml"], found["choice.jsonl"]
    assert harness.scores == own.scores
    assert 0 < sum(own.scores["acc"]) < len(own.scores["acc"])
    samples = sorted(theirs(llama, path)["samples"]["own_choice"], key=lambda one: int(one["doc_id"]))
    for metric in ("acc", "acc_norm"):
        assert list(harness.scores[metric]) == [bool(one[metric]) for one in samples]


def test_a_cloze_has_the_harness_s_accuracy_and_perplexity(llama: Path, items: Path) -> None:
    path = described(items, CLOZE, "own_cloze", "cloze.jsonl")
    engine, tokenizer = engine_of(llama)
    found = choose([path, str(items / "cloze.jsonl")]).ask(engine, tokenizer)
    assert found["own_cloze.yaml"].scores == found["cloze.jsonl"].scores
    expected = theirs(llama, path)["results"]["own_cloze"]["perplexity,none"]
    assert found["own_cloze.yaml"].values == {"perplexity": pytest.approx(expected, rel=1e-4)}


def test_texts_scored_whole_are_cut_into_windows(llama: Path, items: Path) -> None:
    lines = [{"context": "It was a dark and stormy night; the rain fell in torrents. " * 4}, {"context": "Short."}]
    (items / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    path = described(items, ROLLING, "own_rolling", "texts.jsonl")
    (expected,) = (theirs(llama, path)["results"]["own_rolling"][name] for name in ("byte_perplexity,none",))
    for native in (False, True):
        engine, tokenizer = engine_of(llama, native)
        found = choose(path).ask(engine, tokenizer)["own_rolling.yaml"]
        assert found.scores == {}
        assert found.values["byte_perplexity"] == pytest.approx(expected, rel=0.02 if native else 1e-4)


def test_what_is_written_is_what_the_harness_s_model_writes(llama: Path, items: Path) -> None:
    path = described(items, WRITTEN, "own_written", "cloze.jsonl")
    answers = [one["filtered_resps"][0] for one in theirs(llama, path)["samples"]["own_written"]]
    lines = [json.loads(line) for line in (items / "cloze.jsonl").read_text().splitlines()]
    for line, answer in zip(lines[:3], answers[:3], strict=True):
        line["target"] = answer  # three of five are right now
    (items / "cloze.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for native in (False, True):
        engine, tokenizer = engine_of(llama, native)
        found = choose(path).ask(engine, tokenizer)["own_written.yaml"]
        assert found.scores == {"exact_match": (True, True, True, False, False)}


def test_the_first_items_alone_and_progress(llama: Path, items: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = described(items, CHOICE, "own_choice", "choice.jsonl")
    engine, tokenizer = engine_of(llama)
    seen: list[tuple[int, int]] = []
    state = torch.get_rng_state()
    chosen = choose(path, items=4)
    found = chosen.ask(engine, tokenizer, lambda *x: seen.append(x))["own_choice.yaml"]
    assert len(found.scores["acc"]) == 4
    assert seen[-1] == (12, 12)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on as before"
    assert "Running loglikelihood" not in capfd.readouterr().err


def test_a_group_is_its_tasks_one_after_the_other() -> None:
    from featherweight.tasks.evaluate.questions.harness import scores_of

    def sample(number: int, kind: str = "none", **metrics: Any) -> dict[str, Any]:
        return {"doc_id": number, "filter": kind, "metrics": list(metrics), **metrics}

    first = [sample(1, acc=0.0, brier=0.3), sample(0, acc=1.0, brier=1.0)]
    second = [sample(0, acc=1, brier=0.2, other=1)]
    assert scores_of([first, second]) == {"acc": (True, False, True)}
    filtered = [sample(0, "strict", exact_match=0), sample(0, "loose", exact_match=1)]
    assert scores_of([filtered]) == {"exact_match,strict": (False,), "exact_match,loose": (True,)}


@pytest.mark.slow  # the harness reads the descriptions of ten thousand tasks
def test_names_and_what_cannot_be_had(llama: Path, items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match=r"'arc_easi' \(did you mean 'arc_easy'\?\)"):
        choose("arc_easi")
    (task,) = choose("arc_easy").tasks
    assert isinstance(task, HarnessTask)
    with pytest.raises(EvaluationError, match=r"there is no task file none.yaml"):
        choose("none.yaml")
    broken = described(items, CHOICE, "broken", "missing.jsonl")
    engine, tokenizer = engine_of(llama)
    with pytest.raises(EvaluationError, match="cannot run the task .*broken.yaml") as error:
        choose(broken).ask(engine, tokenizer)
    assert "\n" not in str(error.value)


def test_long_contexts_lose_their_beginnings_and_long_continuations_are_refused(llama: Path) -> None:
    from featherweight.tasks.evaluate.questions.harness import HarnessModel

    engine, tokenizer = engine_of(llama)
    model = HarnessModel(engine, Tokenizer.of(tokenizer))
    assert model.max_length == 64

    def request(*texts: str) -> SimpleNamespace:
        return SimpleNamespace(args=texts)

    long = " ".join(["It was a dark and stormy night; the rain fell in torrents."] * 3)
    (found,) = model.loglikelihood([request(long, " It")])
    assert model.cut == 1
    kept = Tokenizer.of(tokenizer).encode(long + " It")[-65:]
    whole = engine.model(torch.tensor([kept[:-1]])).logits.detach()[0].log_softmax(-1)
    assert found[0] == pytest.approx(sum(float(whole[place - 1, kept[place]]) for place in (62, 63, 64)), abs=1e-3)
    with pytest.raises(EvaluationError, match="longer than the model's context of 64"):
        model.loglikelihood([request("a", long)])
    assert math.isfinite(model.loglikelihood([request("", "dark")])[0][0]), "behind what a text begins with"
