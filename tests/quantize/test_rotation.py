"""Rotation of the residual stream (QuaRot; RSQ, arXiv 2503.01820): the function stays, in float64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import ModelSession, tiny_model

from featherweight.errors import RecipeError
from featherweight.quantize.transforms.rotation import ResidualRotation


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def session_of(folder: Path, family: str = "llama", **overrides: Any) -> ModelSession:
    model, anatomy = tiny_model(folder, family, torch.float64, initializer_range=0.2, **overrides)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own computes in float32
            module.forward = functools.partial(rms_norm, module)
    return ModelSession(model, anatomy, list(torch.randint(0, 256, (2, 20), generator=generator)), [])


def rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def logits(session: ModelSession) -> torch.Tensor:
    with torch.no_grad():
        return session.module(torch.stack(session.windows)).logits


@pytest.mark.parametrize(("block", "heads"), [("whole", True), (16, False), (48, True)])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True), ("mixtral", False)]
)
def test_the_function_stays(family: str, tied: bool, block: Any, heads: bool, tmp_path: Path) -> None:
    session = session_of(tmp_path, family, tie_word_embeddings=tied)
    if any(layer.fused_slice or layer.tensor not in session._parameters for layer in session.anatomy.layers):
        pytest.skip("this version of transformers stacks the experts")
    before, weight = logits(session), session.weight("model.layers.0.self_attn.q_proj")
    ResidualRotation(block=block, heads=heads).transform_model(session, seed=5)
    assert torch.allclose(logits(session), before, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(session.weight("model.layers.0.self_attn.q_proj"), weight)
    assert session.config_changes == ({"tie_word_embeddings": False} if tied else {})
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(session.changed)
    norms = [value for name, value in session.changed.items() if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert all(bool((value == 1).all()) for value in norms)


def test_an_outlier_channel_is_spread(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    name = "model.layers.0.mlp.gate_proj"
    weight = session.weight(name)
    weight[:, 7] *= 100
    session.set_weight(name, weight)
    ResidualRotation().transform_model(session)
    after = session.weight(name)
    assert float(after.abs().max() / after.std()) < 0.5 * float(weight.abs().max() / weight.std())


@pytest.mark.parametrize("family", ["gemma", "gemma2", "opt", "gpt2"])
def test_other_models_are_refused(family: str, tmp_path: Path) -> None:
    overrides = {} if family in ("opt", "gpt2") else {"initializer_range": 0.2}
    model, anatomy = tiny_model(tmp_path, family, torch.float64, **overrides)
    session = ModelSession(model, anatomy, [torch.arange(20)], [])
    with pytest.raises(RecipeError, match="rotation"):
        ResidualRotation().transform_model(session)
