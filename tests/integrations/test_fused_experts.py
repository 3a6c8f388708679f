"""Checkpoints that store slices of 3-D expert tensors, named `experts.gate_up_proj[3]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compressed_folders as tiny
import pytest
import torch
import transformers
from compressed_folders import (
    V5,
    Folder,
    assert_same_logits,
    auto_class,
    from_pretrained,
    layers,
    load_all,
    logits,
    quantization_config,
)
from safetensors.torch import save_file

from featherweight.errors import CheckpointError
from featherweight.model.layers.experts import ExpertStack

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def gpt_oss() -> Any:
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no gpt-oss")
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))


def llama4() -> Any:
    config = transformers.Llama4TextConfig(**SIZES, intermediate_size_mlp=64, attention_chunk_size=64, use_cache=False)
    return transformers.Llama4ForCausalLM(config)


def qwen3_moe() -> Any:
    if not V5:
        pytest.skip("transformers 4.x has no fused experts in qwen3-moe")
    return tiny.qwen_moe(3)


FUSED = {"gpt-oss": gpt_oss, "llama4": llama4, "qwen3-moe": qwen3_moe}


def slices(model: Any, out: Path) -> Folder:
    """Compress each expert of each 3-D parameter; save in the layout of the model class."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fused = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    model.config.save_pretrained(out / "compressed")
    stored = {k: v.clone() for k, v in model.state_dict().items() if k not in fused}
    made = {}
    for name, parameter in fused.items():
        turned = type(model.get_submodule(name.rpartition(".")[0])).__name__ in ("GptOssExperts", "Llama4TextExperts")
        for index in range(len(parameter)):
            matrix = parameter.data[index]
            code = tiny.CODES[index % 3]((matrix.T if turned else matrix).contiguous())
            made[f"{name}[{index}]"] = code
            stored |= {f"{name}[{index}].{key}": tensor for key, tensor in code.tensors().items()}
            parameter.data[index] = code.decode().T if turned else code.decode()
    save_file(stored, out / "compressed/model.safetensors", {"format": "pt"})
    folder = Folder(out / "compressed", out / "decoded", made)
    folder.rewrite(
        quantization_config=quantization_config({n: c.spec for n, c in made.items()}, {}),
        architectures=[type(model).__name__],
    )
    return folder


@pytest.mark.parametrize("name", FUSED)
def test_slices_load_and_round_trip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FUSED[name]().eval()
    folder = slices(model, tmp_path)
    for part in (model.config, getattr(model.config, "text_config", model.config)):
        part._attn_implementation = part._experts_implementation = "eager"
    loaded = from_pretrained(auto_class(name), folder.path)
    assert layers(loaded).keys() == folder.codes.keys()
    expected = logits(model)
    assert_same_logits(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    first, again = folder.tensors(), load_all(tmp_path / "again")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) and again[key].dtype == first[key].dtype for key in first)
    assert_same_logits(logits(from_pretrained(auto_class(name), tmp_path / "again")), expected)


def test_a_tensor_compressed_in_part_is_refused(tmp_path: Path) -> None:
    folder = slices(llama4(), tmp_path)
    config = folder.config["quantization_config"]
    for entry in config["codes"]:
        entry["modules"] = {name: shape for name, shape in entry["modules"].items() if "[2]" not in name}
    folder.rewrite(quantization_config=config)
    with pytest.raises(CheckpointError, match=r"'gate_up_proj\[2\]' is missing"):
        from_pretrained(auto_class("llama4"), folder.path)


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    folder = slices(llama4(), tmp_path)
    text = json.dumps(folder.config).replace("gate_up_proj[3]", "gate_up_proj[9]")
    (folder.path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"gate_up_proj\[9\].*4 experts"):
        from_pretrained(auto_class("llama4"), folder.path)


def test_a_stack_behaves_like_the_tensor() -> None:
    torch.manual_seed(0)
    whole = torch.randn(3, 4, 6)
    linears = [[torch.nn.Linear(6, 2, bias=False) for _ in range(2)] for _ in range(3)]
    for row, matrix in zip(linears, whole, strict=True):
        for linear, part in zip(row, matrix.chunk(2), strict=True):
            linear.weight.data = part
            linear.forward = lambda linear=linear: linear.weight  # type: ignore[method-assign]
    stack = ExpertStack(linears, whole.shape, transposed=False)
    inputs = torch.randn(3, 5, 4)
    assert len(stack) == 3
    assert stack.shape == whole.shape
    assert stack.dtype == torch.float32
    assert torch.equal(stack[1], whole[1])
    assert torch.equal(stack[torch.tensor(2)], whole[2])
    assert torch.equal(stack[1:], whole[1:])
    assert torch.equal(stack[torch.tensor([2, 0])], whole[[2, 0]])
    assert torch.equal(torch.bmm(inputs, stack), torch.bmm(inputs, whole))
    assert torch.equal(ExpertStack(linears, (3, 6, 4), True).stacked(), whole.mT)
