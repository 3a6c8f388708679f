"""Tasks from lines of JSON: how they are read, and how models answer them."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from known_models import Counter, Words

from featherweight.errors import EvaluationError, FeatherError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.sampling import Sampling
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.tasks.evaluate.evaluation import bundled_text
from featherweight.tasks.evaluate.opening import open_model
from featherweight.tasks.evaluate.questions import asking
from featherweight.tasks.evaluate.questions.asking import choose, results_of
from featherweight.tasks.evaluate.questions.engines import NativeEngine, TransformersEngine
from featherweight.tasks.evaluate.questions.items import BUNDLED, Task, answer, bundled_task, read_task
from featherweight.tasks.evaluate.questions.likelihood import Request, cut, fitted, pair
from models import make_tiny

WORDS = Words("<s> the river was frozen ice steam Question: Answer: what is cold water a")


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def asked(
    path: Path, following: dict[str, dict[str, float]], context: int | None = None
) -> dict[str, tuple[bool, ...]]:
    engine = TransformersEngine(WORDS.bigram(following, context), WORDS, context)
    return dict(answer(read_task(path), engine, Tokenizer.of(WORDS)).scores)


def test_choices_and_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        {"context": "the river was", "choices": ["ice", "steam"], "answer": 0},
        "",
        {"context": "the river was", "choices": ["ice", "steam"], "answer": "steam"},
        {"question": "what is cold water", "choices": ["ice", "steam"], "answer": 1},
    )
    following = {"was": {"ice": 0.6, "steam": 0.2}, "Answer:": {"ice": 0.1, "steam": 0.3}}
    assert asked(path, following) == {"acc": (True, False, True), "acc_norm": (True, False, True)}
    task = read_task(path)
    assert [item.line for item in task.items] == [1, 3, 4]
    assert task.items[2].context == "Question: what is cold water\nAnswer:"
    assert task.items[2].choices == (" ice", " steam")


def test_long_choices_are_less_likely_but_not_by_the_character(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"context": "the", "choices": ["ice", "river was frozen"], "answer": 1})
    following = {"the": {"ice": 0.3, "river": 0.5}, "river": {"was": 0.5}, "was": {"frozen": 0.5}}
    assert asked(path, following) == {"acc": (False,), "acc_norm": (True,)}


def test_a_cloze_is_right_where_every_token_is_the_likeliest(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        {"context": "the river", "target": "was frozen"},
        {"context": "the river", "target": "was cold"},
    )
    assert asked(path, {"river": {"was": 0.4}, "was": {"frozen": 0.4, "cold": 0.39}}) == {"acc": (True, False)}
    assert asked(path, {"river": {"is": 0.4}, "was": {"frozen": 0.9}}) == {"acc": (False, False)}


def test_files_may_be_compressed_and_have_a_hash_of_what_is_in_them(tmp_path: Path) -> None:
    line = json.dumps({"context": "the", "target": "river"})
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    plain, packed = read_task(tmp_path / "a.jsonl"), read_task(tmp_path / "a.jsonl.gz")
    assert (plain.items, plain.sha256) == (packed.items, packed.sha256)


def test_one_space_stands_before_a_continuation_unless_there_is_white_space(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        {"context": "a", "target": "b"},
        {"context": "a ", "target": "b"},
        {"context": "a", "target": "\nb"},
    )
    assert [item.choices for item in read_task(path).items] == [(" b",), ("b",), ("\nb",)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", r"is \[1\]: a line is"),
        ({"choices": ["a", "b"], "answer": 0}, "neither a context nor a question"),
        ({"context": "a", "question": "b", "target": "c"}, "both a context and a question"),
        ({"context": "a"}, "neither choices nor a target"),
        ({"context": "a", "choices": ["a", "b"], "target": "a"}, "both choices and a target"),
        ({"context": " ", "target": "a"}, "the context is ' ', expected a text"),
        ({"question": 3, "target": "a"}, "the question is 3, expected a text"),
        ({"context": "a", "target": ""}, "target is '', expected a text"),
        ({"context": "a", "choices": "ab", "answer": 0}, "choices are 'ab', expected a list"),
        ({"context": "a", "choices": ["a"], "answer": 0}, "expected a list of at least two"),
        ({"context": "a", "choices": ["a", 2], "answer": 0}, "a choice is 2, expected a text"),
        ({"context": "a", "choices": ["a", "a"], "answer": 0}, "two choices are the same, 'a'"),
        ({"context": "a", "choices": ["a", "b"]}, "there is no answer, expected the place of a choice, 0 to 1"),
        ({"context": "a", "choices": ["a", "b"], "answer": 2}, "the answer is 2, expected"),
        ({"context": "a", "choices": ["a", "b"], "answer": True}, "the answer is True, expected"),
        ({"context": "a", "choices": ["a", "b"], "answer": "c"}, "the answer is 'c', expected"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path / "own.jsonl", {"context": "a", "target": "b"}, line)
    with pytest.raises(EvaluationError, match=said) as error:
        read_task(path)
    assert "own.jsonl, line 2" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"the task .*empty.jsonl is empty"):
        read_task(write(tmp_path / "empty.jsonl", "", "  "))
    with pytest.raises(EvaluationError, match="there is no task file"):
        choose(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(EvaluationError, match="is not UTF-8"):
        choose(tmp_path / "bad.jsonl")


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"'novels_choise' \(did you mean 'novels-choice'\?\)") as error:
        choose("novels_choise")
    assert "pip install 'featherweight[tasks]'" in str(error.value)
    with pytest.raises(EvaluationError, match="two tasks are called novels-cloze"):
        choose(["novels-cloze", "novels-cloze"])
    with pytest.raises(EvaluationError, match="no task is named"):
        choose([])
    with pytest.raises(EvaluationError, match="0 items were asked for"):
        choose("novels-cloze", items=0)
    with pytest.raises(EvaluationError, match="the engine is 'fast', expected transformers or native"):
        choose("novels-cloze", engine="fast")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "novels-cloze", {"context": "a", "target": "b"})
    (task,) = choose("novels-cloze").tasks
    assert isinstance(task, Task)
    assert len(task.items) == 1, "a file of that name goes before"


def test_a_choice_longer_than_the_context_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"context": "the", "choices": ["ice", "river was frozen ice"], "answer": 0})
    with pytest.raises(EvaluationError, match=r"own.jsonl, line 1: the choice 'river was frozen ice' has 4 tokens"):
        asked(path, {}, context=3)


def test_a_context_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"context": "is the river was", "choices": ["ice", "steam"], "answer": 0})
    model = WORDS.bigram({"was": {"ice": 0.6}}, 3)
    found = answer(read_task(path), TransformersEngine(model, WORDS, 3), Tokenizer.of(WORDS))
    assert (found.scores["acc"], found.cut) == ((True,), 1)
    assert max(seen.shape[1] for seen in model.seen) == 3
    assert WORDS.words.index("is") not in model.seen[-1].tolist()[0]


def test_what_stands_before_every_text_stays_where_a_context_is_cut() -> None:
    whole = Request((0, 1, 2, 3, 4), (5, 6))
    assert fitted(whole, 6, 1) == whole
    assert fitted(whole, 4, 1) == Request((0, 3, 4), (5, 6))
    assert fitted(whole, 2, 1) == Request((0,), (5, 6))
    assert fitted(Request((0, 9, 1, 2), (5, 6)), 2, 2) == Request((0,), (5, 6))
    with pytest.raises(ValueError, match="longer than the model's context"):
        fitted(whole, 1, 1)


def test_pairs_are_tokenized_together(tmp_path: Path) -> None:
    bos = Words(" ".join(WORDS.words), bos=0)
    reader = Tokenizer.of(bos)
    river, was = bos.words.index("river"), bos.words.index("was")
    assert pair(reader, [0], "the river ", "was") == Request((0, 1, river), (was,))
    assert pair(Tokenizer.of(WORDS), [], "the river", " was") == Request((1, river), (was,))
    merged = Merging()
    assert pair(Tokenizer.of(merged), [], "ab", "c") == Request((3,), (2,)), "one token for both: apart"
    assert pair(Tokenizer.of(merged), [9], "ab", "c") == Request((9,), (4,)), "scored whole, from what is before"


class Merging:
    """Texts that are one token each, and would be another one with a letter more."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [{"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}[text]]}


def test_batches_and_what_pads_them_change_nothing() -> None:
    """Compared with one request at a time; Counter looks at the whole context."""
    model = Counter(11, 64)
    generator = torch.Generator().manual_seed(3)
    requests = []
    for context, continuation in ((3, 1), (20, 4), (1, 9), (7, 7), (20, 4), (50, 2)):
        tokens = torch.randint(11, (context + continuation,), generator=generator).tolist()
        requests.append(Request(tuple(tokens[:context]), tuple(tokens[context:])))
    seen: list[tuple[int, int]] = []
    together = TransformersEngine(model, None, 64).likelihoods(requests, lambda *x: seen.append(x))
    assert seen[-1] == (6, 6)
    for request, found in zip(requests, together, strict=True):
        logits = model(torch.tensor([request.inputs])).logits.detach()[0, len(request.context) - 1 :].log_softmax(-1)
        chosen = torch.tensor(request.continuation)
        assert found.nats == pytest.approx(float(logits.gather(1, chosen[:, None]).sum()), abs=1e-4)
        assert found.greedy == bool((logits.argmax(-1) == chosen).all())


def test_a_model_whose_logits_are_no_numbers() -> None:
    model = WORDS.bigram({})
    model.table[3, 2] = math.nan
    engine = TransformersEngine(model, WORDS, None)
    assert engine.likelihoods([Request((1,), (2,))])[0].nats < 0
    with pytest.raises(EvaluationError, match="NaN or infinite on a task"):
        engine.likelihoods([Request((1, 3), (2,))])
    with pytest.raises(EvaluationError, match="the tokenizer does not belong to this model"):
        engine.likelihoods([Request((1,), (len(WORDS.words),))])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama", torch.float32, tokenizer=True)


def test_the_native_decoder_answers_alike(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = open_model(llama, "float32", torch.device("cpu"))
    native = NativeModel.open(llama, threads=1, precision="float")
    reader = Tokenizer.of(tokenizer)
    texts = [("It was a dark", [" night", " and stormy day", "."]), ("It was", [" a"]), ("Rain", [" fell", "y"])]
    requests = [pair(reader, [], context, choice) for context, choices in texts for choice in choices]
    own = TransformersEngine(model, tokenizer, 64).likelihoods(requests)
    engine = NativeEngine(native, tokenizer)
    for _ in range(2):  # the second time something is in the cache
        for one, other in zip(engine.likelihoods(requests), own, strict=True):
            assert one.nats == pytest.approx(other.nats, abs=0.02 * abs(other.nats))
    alone = [NativeEngine(native, tokenizer).likelihoods([request])[0].nats for request in reversed(requests)]
    assert [one.nats for one in engine.likelihoods(requests)] == pytest.approx(alone[::-1], abs=1e-3)
    fresh = [native.forward(request.inputs)[len(request.context) - 1 :].log_softmax(-1) for request in requests]
    sums = [
        float(logits.gather(1, torch.tensor(request.continuation)[:, None]).sum())
        for logits, request in zip(fresh, requests, strict=True)
    ]
    assert [one.nats for one in NativeEngine(native, tokenizer).likelihoods(requests)] == pytest.approx(sums, abs=1e-3)


def test_what_is_kept_of_a_cache_is_what_was_fed(llama: Path) -> None:
    native = NativeModel.open(llama, threads=1, precision="float")
    whole = native.forward([5, 6, 7, 8, 9])
    native.keep(2)
    assert native.length() == 2
    assert torch.allclose(native.feed_all([7, 8, 9]), whole[2:], atol=1e-4)
    with pytest.raises(FeatherError, match="sequence 0 has 5 tokens, of which 6 are to stay"):
        native.keep(6)


def test_both_engines_write_the_same_and_stop_at_a_text(llama: Path) -> None:
    model, tokenizer = open_model(llama, "float32", torch.device("cpu"))
    engines = [
        TransformersEngine(model, tokenizer, 64),
        NativeEngine(NativeModel.open(llama, threads=1, precision="float"), tokenizer),
    ]
    prompt = Tokenizer.of(tokenizer).encode("It was a dark night")
    whole, native = (engine.write(prompt, 6, [], Sampling()) for engine in engines)
    assert whole == native
    end = whole[2]
    for engine in engines:
        assert engine.write(prompt, 6, [end], Sampling()) == whole[: whole.index(end)]
    assert cut("one, two. three", [".", ","]) == "one"
    assert cut("one", ["", "x"]) == "one"


def test_the_shipped_tasks_are_what_they_are_said_to_be() -> None:
    text = " ".join(bundled_text().split())
    for name in BUNDLED:
        task = bundled_task(name)
        assert len(task.items) >= 300
        passages = [" ".join(item.context.split()) for item in task.items]
        assert len(set(passages)) == len(passages)
        assert not [passage for passage in passages if passage in text], "none is of the text of the perplexity"
        assert min(len(passage.split()) for passage in passages) >= 8
    choice, cloze = (bundled_task(name) for name in BUNDLED)
    for item in choice.items:
        assert len(item.choices) == 4
        assert len({len(one.split()) for one in item.choices}) == 1
        lengths = [len(one) for one in item.choices]
        assert max(lengths) <= 1.3 * min(lengths)
    ends = [one for item in choice.items for one in item.choices]
    assert len(set(ends)) == len(ends), "an end that came back would be known not to fit"
    counted = [sum(item.answer == place for item in choice.items) / len(choice.items) for place in range(4)]
    assert max(counted) < 0.32, "the right one stands in every place"
    for item in cloze.items:
        assert item.choices[0].strip() in item.context


def test_the_bundled_model_answers_the_shipped_tasks_well_above_chance() -> None:
    from featherweight.system.places import ASSETS

    model = NativeModel.open(ASSETS / "reference", threads=1)
    tokenizer = Tokenizer.open(ASSETS / "reference")
    chosen = choose(BUNDLED, items=80, engine="native")
    choice, cloze = results_of(chosen, chosen.ask(NativeEngine(model, tokenizer), tokenizer), None)
    assert choice.scores[0].interval.low > 0.4, "a guess is right in a quarter of all items"
    assert cloze.scores[0].interval.low > 0.05
    assert choice.scores[0].accuracy < 0.95, "and there is something left to lose"
