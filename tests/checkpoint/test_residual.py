"""Hidden channels: what reads and what writes the residual stream, judged by what transformers computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from arranged_models import DECLARED, VARIANTS, Made, logits_of, same, shuffled, under_another_name
from safetensors.torch import save_file

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.residual import read_residual
from featherweight.storage.checkpoint.anatomy.units import arrange
from featherweight.storage.checkpoint.checkpoint import Checkpoint


@pytest.mark.parametrize("name", [*DECLARED, *VARIANTS, "t5", "gpt-oss", "llama4"])
def test_permuted_hidden_channels_change_nothing(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one, order = made(name), shuffled(64)
    residual = one.residual()
    assert residual.hidden == 64
    moved = residual.arranged(one.tensors, order)
    assert same(one.logits(one.tensors | moved, tmp_path), one.logits(one.tensors, tmp_path))
    reader = residual.of("reader")[0]
    assert torch.equal(moved[reader.tensor], one.tensors[reader.tensor].index_select(reader.dim, torch.tensor(order)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "qwen2-moe", "phi3"])
def test_no_part_of_a_hidden_channel_can_be_left_out(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """Every port counts: the permutation of all others changes the output."""
    one, order = made(name), shuffled(64)
    moved = one.residual().arranged(one.tensors, order)
    model = one.model(one.tensors | moved, tmp_path)
    before, parameters = logits_of(model), dict(model.named_parameters())
    first = f"{model.base_model_prefix}.{'decoder.' if name == 'opt' else ''}{'h' if name == 'gpt2' else 'layers'}.0."
    tried = 0
    for tensor in moved:
        if tensor in parameters and (tensor.startswith(first) or ".0." not in tensor and ".1." not in tensor):
            kept = parameters[tensor].detach().clone()
            with torch.no_grad():
                parameters[tensor].copy_(one.tensors[tensor])
            assert not same(logits_of(model), before), tensor
            with torch.no_grad():
                parameters[tensor].copy_(kept)
            tried += 1
    assert tried >= 7


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "gpt2", "opt", "mixtral", "phi3", "bert"])
def test_hidden_channels_by_structure(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(name)
    with Checkpoint.open(under_another_name(one, tmp_path)) as checkpoint:
        if name == "bert":
            with pytest.raises(CheckpointError, match=r"what cls\.predictions\.transform\.dense\..* hidden channels"):
                read_residual(checkpoint)
            return
        found = read_residual(checkpoint)
    declared = one.residual()
    assert {(p.role, p.tensor, p.dim) for p in found.ports} == {(p.role, p.tensor, p.dim) for p in declared.ports}
    assert found.rotation_refusal is not None


def test_channels_one_by_one_and_together(made: Callable[[str], Made]) -> None:
    """Both ways of saying what goes with a hidden channel agree, also where some are removed."""
    for name in ("bert", "gpt2", "qwen2-moe"):
        one, order = made(name), shuffled(64)[:40]
        residual = one.residual()
        together = residual.arranged(one.tensors, order)
        apart = arrange(one.tensors, [residual.channel(i) for i in range(64)], order)
        assert together.keys() == apart.keys()
        assert all(torch.equal(apart[key], value) for key, value in together.items())
        assert all(40 in value.shape for value in together.values())


def test_which_streams_can_be_rotated(made: Callable[[str], Made]) -> None:
    for name in ("llama", "mistral", "mixtral", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe", "phi3", "gemma"):
        assert made(name).residual().rotation_refusal is None
    for name, why in (("gemma2", "post_attention_layernorm.* stands between"), ("gpt2", "take off the mean")):
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(made(name).residual().rotation_refusal)
    assert made("gemma").residual().norm_offset == 1
    assert made("llama").residual().norm_offset == 0


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3-moe", "phi3"])
def test_rotated_stream_changes_nothing(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """Norms folded into their readers through the ports, and all ports multiplied by one orthogonal matrix."""
    one = made(name)
    residual = one.residual()
    tensors = {key: value.double() for key, value in one.tensors.items()}
    turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    if residual.of("embedding") and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (
            tensors["model.norm.weight"] + residual.norm_offset
        )
        tensors["lm_head.weight"] @= turn
    for port in residual.ports:
        value = tensors[port.tensor]
        if port.role == "reader":
            assert port.norm is not None
            gain = one.tensors[port.norm].double() + residual.norm_offset
            value = value * (gain if port.dim == value.dim() - 1 else gain[:, None])
        if port.role == "norm":
            tensors[port.tensor] = torch.full_like(value, 1 - residual.norm_offset)
        else:
            tensors[port.tensor] = (value.movedim(port.dim, -1) @ turn).movedim(-1, port.dim)
    rotated = {key: value.float() for key, value in tensors.items()}
    found = one.logits(rotated, tmp_path, tie_word_embeddings=False)
    wanted = one.logits(one.tensors, tmp_path)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_a_parameter_of_unknown_use_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("llama")
    shutil.copy(one.folder / "config.json", tmp_path)
    for name, why in (
        ("model.layers.1.layer_scale.gamma", "what model.layers.1.layer_scale.gamma .64. is to the 64 hidden channels"),
        ("model.layers.1.mlp_norm.weight", None),
    ):
        save_file(one.tensors | {name: torch.ones(64)}, tmp_path / "model.safetensors")
        with Checkpoint.open(tmp_path) as checkpoint:
            if why is None:
                assert name in {port.tensor for port in read_residual(checkpoint).of("norm")}
                continue
            with pytest.raises(CheckpointError, match=why):
                read_residual(checkpoint)
