"""Control tokens apart: a planted fault is found at them and nowhere else, and its figures are those of the table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_models import Bigram

from featherweight import evaluate
from featherweight.errors import EvaluationError, FeatherWarning
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.tasks.evaluate.control_tokens import control_tokens
from featherweight.tasks.evaluate.result import Evaluation
from featherweight.tasks.report.page import write_report
from models import CHAT_TEMPLATE, END, START, VOCABULARY, chat_tokenizer

SIZE = VOCABULARY + 2
TALKS = 24


def original() -> torch.Tensor:
    """Logits by the last token: a turn ends behind a full stop, and one begins behind the line break after it."""
    table = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    table[:, START:] = -8
    table[byte("."), END] = table[byte("\n"), START] = 7
    return table


def byte(letter: str) -> int:
    return int(chat_tokenizer()(letter)["input_ids"][0])


def copy(noise: float = 0.05, end: float = 0.0) -> torch.Tensor:
    """As if it were compressed: noise everywhere, and the logit of the end of a turn less by `end`."""
    table = original()
    table += noise * torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
    table[:, END] -= end
    return table


def talk(number: int) -> list[dict[str, Any]]:
    chance = np.random.default_rng(number)
    words = ["".join(chr(97 + c) for c in chance.integers(0, 26, 12)) + "." for _ in range(2)]
    return [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk(n)}) for n in range(TALKS)))
    return path


def compared(table: torch.Tensor, talks: Path, **settings: Any) -> Evaluation:
    tokenizer = chat_tokenizer()
    text = talks.with_name("text.txt")
    text.write_text("some text. and more of it.\n" * 200)
    models = ((Bigram(one, 512), tokenizer) for one in (table, original()))
    return evaluate(*models, text, conversations=talks, device="cpu", **settings)


def by_hand(table: torch.Tensor) -> dict[str, list[np.ndarray]]:
    """KL of each position, by conversation, at control tokens and elsewhere, in float64."""
    found: dict[str, list[np.ndarray]] = {"control": [], "else": []}
    log_p, log_q = original().double().log_softmax(-1), table.double().log_softmax(-1)
    for n in range(TALKS):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk(n))
        ids = chat_tokenizer()(text)["input_ids"]
        kl = [float((log_p[a].exp() * (log_p[a] - log_q[a])).sum()) for a in ids[:-1]]
        control = np.array([target >= START for target in ids[1:]])
        found["control"].append(np.array(kl)[control])
        found["else"].append(np.array(kl)[~control])
    return found


def test_a_damaged_control_token_is_found_there_alone(talks: Path) -> None:
    table = copy(end=5.0)
    with pytest.warns(FeatherWarning, match="control tokens is .* more than twice"):
        found = compared(table, talks).control
    assert found is not None
    expected = by_hand(table)
    control, rest = np.concatenate(expected["control"]), np.concatenate(expected["else"])
    assert found.positions == len(control) == 3 * TALKS
    assert found.positions_elsewhere == len(rest)
    assert found.kl == pytest.approx(control.mean(), rel=1e-4)
    assert found.kl_elsewhere == pytest.approx(rest.mean(), rel=1e-3)
    # as many positions in every conversation: the error is that of a mean of their means
    means = np.array([one.mean() for one in expected["control"]])
    assert found.kl_standard_error == pytest.approx(means.std(ddof=1) / np.sqrt(TALKS), rel=1e-2, abs=1e-9)
    assert found.excess == pytest.approx(control.mean() - 2 * rest.mean(), rel=1e-3)
    assert found.tokens["<|im_end|>"]["kl"] > 100 * found.tokens["<|im_start|>"]["kl"]
    assert found.kl_elsewhere < 0.01
    assert found.predicted == found.positions
    ends, starts = (table.double().softmax(-1)[byte(a), b] for a, b in ((".", END), ("\n", START)))
    assert found.probability == pytest.approx(float(2 * ends + starts) / 3, rel=1e-4)
    sound = original().double().softmax(-1)
    sound_mean = float(2 * sound[byte("."), END] + sound[byte("\n"), START]) / 3
    assert found.probability_against == pytest.approx(sound_mean, rel=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_undamaged_copies_are_not_warned_about(talks: Path, noise: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FeatherWarning)
        found = compared(copy(noise), talks).control
    assert found is not None
    assert found.warning is None
    if noise == 0:
        assert found.kl == found.kl_elsewhere == 0
        assert found.top1_agreement == found.top1_agreement_elsewhere == 1


def test_a_model_that_is_bad_everywhere_may_still_end_no_turn(talks: Path) -> None:
    """Divergence at control tokens is not above twice that elsewhere, but they have lost most of their probability."""
    with pytest.warns(FeatherWarning, match=r"original predicts a control token .* has a probability of 0\.\d+ there"):
        found = compared(copy(noise=2.5, end=3.0), talks).control
    assert found is not None
    assert found.excess < 0
    assert found.probability is not None
    assert found.probability_against is not None
    assert found.probability < found.probability_against / 2


def test_few_conversations_are_no_reason_for_a_warning(talks: Path) -> None:
    lines = talks.read_text().splitlines()
    for count, warned in ((9, False), (10, True)):
        talks.write_text("\n".join(lines[:count]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compared(copy(end=5.0), talks).control
        assert found is not None
        assert (found.warning is not None) is warned
    talks.write_text(lines[0])
    found = compared(copy(), talks).control
    assert found is not None
    assert found.kl_standard_error is None


def test_conversations_are_cut_to_the_context(talks: Path) -> None:
    found = compared(copy(), talks, context=20).control
    assert found is not None
    assert found.positions + found.positions_elsewhere == 19 * TALKS


def test_in_json_and_report(talks: Path, tmp_path: Path) -> None:
    with pytest.warns(FeatherWarning):
        report = compared(copy(end=5.0), talks).to_json()
    kept = json.loads(json.dumps(report, allow_nan=False))["control_tokens"]
    assert kept["positions"] == 3 * TALKS
    assert kept["kl_standard_error"] >= 0
    page = write_report(tmp_path / "report.html", [{"name": "damaged", "evaluation": report}]).read_text()
    assert "KL, control" in page
    assert f"{kept['kl']:.4f}" in page
    assert f"{kept['positions']} positions" in page
    assert "more than twice" in page
    plain = write_report(tmp_path / "plain.html", [{"name": "x", "evaluation": {"perplexity": 3.0}}]).read_text()
    assert "control" not in plain.split("</style>")[1]


def test_which_tokens_control(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    assert control_tokens(Tokenizer.of(tokenizer)) == {START: "<|im_start|>", END: "<|im_end|>"}
    # named by the template, made of parts, in a branch that a small conversation does not take; and one it never writes
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<think>", "<pad>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.thinking %}<think>{% endif %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}"
    )
    assert set(control_tokens(Tokenizer.of(tokenizer)).values()) == {"<|user|>", "<think>", "<|im_end|>"}
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(EvaluationError, match="writes none of the tokenizer's added tokens"):
        control_tokens(Tokenizer.of(tokenizer))


def test_what_is_refused(talks: Path) -> None:
    pair = (Bigram(original(), 512), chat_tokenizer())
    with pytest.raises(EvaluationError, match="name it with --against"):
        evaluate(pair, conversations=talks)
    bare = (Bigram(original(), 512), chat_tokenizer(None))
    with pytest.raises(EvaluationError, match="has no chat template, so it has no control tokens"):
        evaluate(bare, bare, conversations=talks)
    refusing = (pair[0], chat_tokenizer(CHAT_TEMPLATE + "{{ raise_exception('no') if messages[0].content == 'x' }}"))
    for content, words in (
        ("", "is empty"),
        (json.dumps({"text": "plain"}), "holds plain text"),
        ("{", "line 1 of .* is not JSON"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}), "line 1 of .* cannot be written: .*no"),
    ):
        talks.write_text(content)
        with pytest.raises(EvaluationError, match=words):
            evaluate(refusing, refusing, conversations=talks)
