"""Rotation of the residual stream (QuaRot; RSQ, arXiv 2503.01820): the function stays, in float64."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import ModelSession, tiny_model

from featherweight.errors import RecipeError
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.quantize.transforms.rotation import ResidualRotation
from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from models import make_tiny


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def session_of(folder: Path, family: str = "llama", **overrides: Any) -> ModelSession:
    model, anatomy = tiny_model(folder, family, torch.float64, initializer_range=0.2, **overrides)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).double()
    in_float64(model)
    return ModelSession(model, anatomy, list(torch.randint(0, 256, (2, 20), generator=generator)), [])


def rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def logits(session: ModelSession) -> torch.Tensor:
    with torch.no_grad():
        return session.module(torch.stack(session.windows)).logits


@pytest.mark.parametrize(("block", "heads"), [("whole", True), (16, False), (128, True)])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)])
def test_the_function_stays(family: str, tied: bool, block: Any, heads: bool, tmp_path: Path) -> None:
    session = session_of(tmp_path, family, tie_word_embeddings=tied)
    before, weight = logits(session), session.weight("model.layers.0.self_attn.q_proj")
    ResidualRotation(block=block, heads=heads).transform_model(session, seed=5)
    assert torch.allclose(logits(session), before, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(session.weight("model.layers.0.self_attn.q_proj"), weight)
    assert session.config_changes == ({"tie_word_embeddings": False} if tied else {})
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(session.changed)
    norms = [value for name, value in session.changed.items() if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert all(bool((value == 1).all()) for value in norms)


NARROW = {"hidden_size": 72, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 36}


def test_the_whole_of_any_width_is_rotated(tmp_path: Path) -> None:
    """A width of 72 and heads of 36, for which there are no Hadamard matrices here."""
    session = session_of(tmp_path, **NARROW)
    before, events = logits(session), list[dict[str, Any]]()
    ResidualRotation().transform_model(session, events.append, seed=5)
    assert torch.allclose(logits(session), before, rtol=1e-9, atol=1e-9)
    assert [event["block"] for event in events if event["event"] == "rotation"] == [72]


def test_an_order_that_does_not_divide_the_stream_is_refused(tmp_path: Path) -> None:
    session = session_of(tmp_path, **NARROW)
    with pytest.raises(RecipeError, match=r"transform rotation: block is 48, expected .* divides 72; nearest is 36$"):
        ResidualRotation(block=48).transform_model(session, seed=5)
    assert not session.changed


EXPERTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("qwen2-moe", {}),
    ("qwen3-moe", {}),
    ("qwen3-moe", {"mlp_only_layers": [0]}),  # a dense block first
]


@pytest.mark.parametrize("stacked", [False, True], ids=["an expert per module", "stacked experts"])
@pytest.mark.parametrize(("family", "settings"), EXPERTS, ids=["mixtral", "qwen2-moe", "qwen3-moe", "dense-block"])
def test_the_function_of_experts_stays(
    family: str, settings: dict[str, Any], stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, through the access that runs use: checkpoints with a matrix per expert, and with 3-D tensors."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(  # routers and attention would go through float32
        torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **rest: softmax(x, dim, dtype=x.dtype)
    )
    monkeypatch.setattr(CalibrationSettings, "torch_dtype", lambda *_: torch.float64)
    folder = experts_checkpoint(family, tmp_path, stacked, **settings)
    with Checkpoint.open(folder) as checkpoint:
        anatomy = read_anatomy(checkpoint)
        assert any(layer.fused_slice for layer in anatomy.layers) == stacked
        assert all(layer.producer for layer in anatomy.layers if layer.role == "o_proj")  # whose heads turn as well
        ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
        with Calibration.open(checkpoint, anatomy, ids) as calibration:
            with calibration.whole_model() as whole:
                in_float64(whole.model)
                experts = [layer.name for layer in anatomy.layers if layer.expert == 1]
                before, weights = whole.model(ids).logits, {name: whole.weight(name) for name in experts}
                ResidualRotation().transform_model(whole, seed=5)
                after = whole.model(ids).logits
                assert all(not torch.allclose(whole.weight(name), weights[name], rtol=1e-2) for name in experts)
                norms = [tensor for name, tensor in whole.changed.items() if name.endswith("norm.weight")]
                changed = {name: whole.weight(name) for name in experts}
            assert after.dtype == torch.float64
            assert torch.allclose(after, before, rtol=1e-9, atol=1e-9)
            assert len(norms) == 5
            assert all(bool((norm == 1).all()) for norm in norms)
            for session in calibration.blocks():  # loaded once more
                for name in session.names:
                    if name in changed:
                        assert torch.equal(session.weight(name), changed[name].float()), name


def experts_checkpoint(family: str, folder: Path, stacked: bool, **settings: Any) -> Path:
    """A random model in float64 with a matrix per expert, or its experts in 3-D tensors as transformers 5 has them."""
    from safetensors.torch import load_file, save_file

    make_tiny(family, folder, torch.float64, initializer_range=0.2, **settings)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "norm" in name or name.endswith("bias"):
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator).double()
    pattern = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
    found = {match[0]: match for name in tensors if (match := pattern.fullmatch(name))}
    assert found, "transformers writes a matrix per expert"
    if stacked:
        blocks = dict.fromkeys(match[1] for match in found.values())
        count = 1 + max(int(match[2]) for match in found.values())
        gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        for block in blocks:
            parts = {(m[3], int(m[2])): tensors.pop(name) for name, m in found.items() if m[1] == block}
            experts = range(count)
            both = [torch.cat([parts[gate, e], parts[up, e]]) for e in experts]
            tensors[f"{block}.mlp.experts.gate_up_proj"] = torch.stack(both)
            tensors[f"{block}.mlp.experts.down_proj"] = torch.stack([parts[down, e] for e in experts])
        for name in [name for name in tensors if ".block_sparse_moe.gate." in name]:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def in_float64(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' own computes in float32
            module.forward = functools.partial(rms_norm, module)


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
