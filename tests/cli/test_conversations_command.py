"""`feather converse`, and conversations in `compress`, `calibrate` and `eval`, as the commands show and refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from feather_command import feather_here

from models import make_chat

FEW = ("--turns", 1, "--max-tokens", 8, "--threads", 1)
SMALL = ("--set", "calibration.sequences=8", "--set", "calibration.length=64", "--threads", 1)
SHORT = ("--set", "calibration.conversations={turns: 1, max_tokens: 8}")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat(tmp_path_factory.mktemp("chat") / "model")


def test_converse_and_eval(chat: Path, tmp_path: Path) -> None:
    talks, report, small = tmp_path / "talks.jsonl", tmp_path / "report.json", tmp_path / "small"
    done = feather_here("converse", chat, "--out", talks, "--count", 5, *FEW, "--json", report)
    assert done.code == 0, done.errors
    assert json.loads(report.read_text())["conversations"] == 5
    assert len(talks.read_text().splitlines()) == 6
    refused = feather_here("converse", chat, "--out", talks, "--count", 5, *FEW, "--seed", 1).last_sentence()
    assert "made with other settings (seed is 0, not 1)" in refused
    assert feather_here("compress", chat, "--recipe", "rtn-2", "--out", small).code == 0
    report.unlink()
    command = ("eval", small, "--against", chat, "--limit", 300, "--conversations", talks, "--threads", 1)
    done = feather_here(*command, "--json", report)
    assert done.code == 0, done.errors
    found = json.loads(report.read_text())["control_tokens"]
    assert found["conversations"] == 5
    assert found["positions"] == sum(one["positions"] for one in found["tokens"].values())
    assert f"{found['positions']} in 5 conversations: <|im_start|>, <|im_end|>" in done.output
    assert f"{found['kl']:.5f}" in done.output
    assert "name it with --against" in feather_here("eval", small, "--conversations", talks).last_sentence()


def test_self_in_mixtures(chat: Path, tmp_path: Path) -> None:
    mixture = ("--calibration", "self=1,shipped=3")
    done = feather_here("compress", chat, "--recipe", "gptq-3", "--out", tmp_path / "out", *mixture, *SMALL, *SHORT)
    assert done.code == 0, done.errors
    assert (tmp_path / "out.conversations.jsonl").exists()
    kept = tmp_path / "kept.jsonl"
    command = ("calibrate", chat, "--out", tmp_path / "s.safetensors", *mixture, *SMALL, *SHORT)
    done = feather_here(*command, "--set", f"calibration.conversations.file={kept}")
    assert done.code == 0, done.errors
    assert kept.read_bytes() == (tmp_path / "out.conversations.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ("self=-1,shipped=1", "the weight of the calibration text self is -1.0"),
        ("self=0,shipped=0", "are all zero"),
        ("selv=1,shipped=1", "there is no calibration file selv"),
        ("self=0.01,shipped=1", "self has a share of less than one of 8 windows"),
    ],
)
def test_bad_mixtures(chat: Path, tmp_path: Path, mixture: str, said: str) -> None:
    command = ("compress", chat, "--recipe", "gptq-3", "--out", tmp_path / "out", *SMALL, *SHORT)
    assert said in feather_here(*command, "--calibration", mixture).last_sentence()
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_template(llama: Path, tmp_path: Path) -> None:
    command = ("compress", llama, "--recipe", "gptq-3", "--out", tmp_path / "out", "--calibration", "self", *SMALL)
    assert "need a model with a chat template" in feather_here(*command).last_sentence()
