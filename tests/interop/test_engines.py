"""What vLLM and transformers are said to run, from names, shapes and specs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import featherweight
from featherweight.interop.engines import Answer, Target
from featherweight.interop.stored import StoredModel
from featherweight.registry import find
from models import make_tiny


def ask(folder: Path, target: str, processes: int = 1) -> Answer:
    cls: type[Target] = find("target", target)
    with StoredModel(folder) as model:
        return cls.ask(model, processes)


def compressed(tmp_path: Path, recipe: Any, *changes: str, **config: Any) -> Path:
    make_tiny("llama", tmp_path / "model", **config)
    featherweight.compress(tmp_path / "model", recipe, tmp_path / "small", changes=changes)
    return tmp_path / "small"


def test_four_bits_are_exported_for_vllm(tmp_path: Path) -> None:
    answer = ask(compressed(tmp_path, "rtn-4", "grid.group_size=32"), "vllm")
    assert answer.runs
    assert answer.how == f"feather export {tmp_path / 'small'} --to compressed-tensors --out OUT"
    (reason,) = answer.reasons
    assert reason.startswith("scales are float16, and vLLM rounds them")


def test_what_an_export_changes_is_among_the_reasons(tmp_path: Path) -> None:
    answer = ask(compressed(tmp_path, "rtn-4", "grid.group_size=32", "embedding=6bit"), "vllm")
    assert any(reason.startswith("model.embed_tokens.weight becomes plain bf16") for reason in answer.reasons)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("rtn-3", "has 3 bits, and its kernels on CPUs take 4"),
        ("ptqtp", "2 trit-planes g128 is no integers with scales"),
    ],
)
def test_other_codes_are_for_the_plugin(recipe: str, said: str, tmp_path: Path) -> None:
    folder = compressed(tmp_path, recipe)
    answer = ask(folder, "vllm")
    assert answer.runs
    assert "plugin" in answer.how
    assert any(said in reason for reason in answer.reasons)
    assert not ask(folder, "vllm", 2).runs


def test_fused_layers_that_are_not_alike_are_named(tmp_path: Path) -> None:
    recipe = {"grid": {"kind": "uniform", "bits": 4, "group_size": 32}, "layers": {"skip": ["k_proj"]}}
    answer = ask(compressed(tmp_path, recipe), "vllm")
    said = r"model.layers.0.self_attn has q_proj W4A16 groups of 32 asymmetric, k_proj plain, v_proj W4A16"
    assert any(said in reason for reason in answer.reasons)


def test_what_cannot_be_shared_among_processes_is_named(tmp_path: Path) -> None:
    folder = compressed(tmp_path, "rtn-4", "grid.group_size=64")
    assert any("4 attention heads cannot be shared among 3" in reason for reason in ask(folder, "vllm", 3).reasons)
    (reason,) = (reason for reason in ask(folder, "vllm", 4).reasons if "down_proj" in reason)
    assert "down_proj: 128 inputs are not 4 times whole groups of 64 inputs" in reason
    assert not ask(tmp_path / "model", "vllm", 3).runs
    assert ask(tmp_path / "model", "vllm", 2).runs


def test_transformers_runs_all_codes_in_one_process(tmp_path: Path) -> None:
    folder = compressed(tmp_path, "ptqtp")
    assert ask(folder, "transformers") == Answer(True, "as it is, with `import featherweight`")
    assert ask(tmp_path / "model", "transformers") == Answer(True, "as it is")
    answer = ask(folder, "transformers", 2)
    assert not answer.runs
    assert "--to dense" in answer.how
