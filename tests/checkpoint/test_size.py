"""Sizes of hand-made folders, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from featherweight.storage.checkpoint.format import quantization_config
from featherweight.storage.checkpoint.size import bytes_per_token, measure_size
from featherweight.storage.codes import code_layout

VOCABULARY, HIDDEN, FFN = 10, 8, 16
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
LINEAR = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
NORMS = 3 * HIDDEN
EMBEDDING = VOCABULARY * HIDDEN


def llama(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    tensors = {f"model.layers.0.{name}.weight": torch.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}
    for name in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN, dtype=dtype)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.ones(VOCABULARY, HIDDEN, dtype=dtype)
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def compress(tensors: dict[str, torch.Tensor], specs: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    tensors = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in specs}
    for module, spec in specs.items():
        for name, layout in code_layout(spec).items():
            tensors[f"{module}.{name}"] = torch.ones(layout.shape).to(layout.dtype)
    return tensors


def test_an_original_has_the_bits_of_its_type(tmp_path: Path) -> None:
    folder = write(tmp_path, llama())
    size = measure_size(folder)
    assert size.linear_weights == LINEAR
    assert size.linear_bits == size.model_bits == 16
    assert size.model_weights == LINEAR + NORMS + 2 * EMBEDDING
    assert size.bytes == (folder / "model.safetensors").stat().st_size > size.tensor_bytes


def test_biases_are_not_weights_of_linear_layers_but_of_the_model(tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(HIDDEN, dtype=torch.float32)}
    size = measure_size(write(tmp_path, llama() | bias, model_type="qwen2", architectures=["Qwen2ForCausalLM"]))
    assert (size.linear_weights, size.linear_bits) == (LINEAR, 16)
    assert size.model_weights == LINEAR + NORMS + 2 * EMBEDDING + HIDDEN
    assert size.tensor_bytes == 2 * (LINEAR + NORMS + 2 * EMBEDDING) + 4 * HIDDEN


def test_everything_a_code_stores_counts_and_so_do_layers_left_alone(tmp_path: Path) -> None:
    """Seven layers: q and k left in bf16, five trit-planes of 2 planes in groups of 4 with fp16 scales."""
    specs = {}
    for name, shape in SHAPES.items():
        if name not in ("self_attn.q_proj", "self_attn.k_proj"):
            spec = {"kind": "trit-planes", "planes": 2, "tied": False, "group_size": 4, "packing": "base3"}
            specs[f"model.layers.0.{name}"] = {**spec, "shape": list(shape)}
    folder = write(tmp_path, compress(llama(), specs), quantization_config=quantization_config(specs, {}))
    square = 2 * -(-HIDDEN * HIDDEN // 5) + 2 * 2 * HIDDEN * HIDDEN // 4
    wide = 2 * -(-HIDDEN * FFN // 5) + 2 * 2 * HIDDEN * FFN // 4
    dense = 2 * HIDDEN * HIDDEN
    size = measure_size(folder)
    assert size.linear_weights == LINEAR
    assert size.linear_bytes == 2 * dense + 2 * square + 3 * wide
    assert size.linear_bits == 8 * size.linear_bytes / LINEAR
    assert size.model_weights == LINEAR + NORMS + 2 * EMBEDDING
    assert size.tensor_bytes == size.linear_bytes + 2 * (NORMS + 2 * EMBEDDING)
    assert bytes_per_token(folder) == size.tensor_bytes - 2 * EMBEDDING


@pytest.mark.parametrize("kind", ["uniform", "dense"])
def test_zero_points_count(kind: str, tmp_path: Path) -> None:
    spec = {"kind": kind, "bits": 3, "symmetric": False, "group_size": 8, "dtype": "float32"}
    specs = {f"model.layers.0.{name}": {**spec, "shape": list(shape)} for name, shape in SHAPES.items()}
    size = measure_size(write(tmp_path, compress(llama(), specs), quantization_config=quantization_config(specs, {})))
    if kind == "dense":
        assert size.linear_bits == 32
    else:  # 3 bits a code; a group of 8 weights has an fp16 scale and a 3-bit zero point
        assert size.linear_bits == pytest.approx(3 + (16 + 3) / 8, abs=0.02)
        assert size.linear_bits >= 3 + (16 + 3) / 8


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    tensors = llama()
    twice = write(tmp_path / "twice", tensors, tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    once = write(tmp_path / "once", tensors, tie_word_embeddings=True)
    for folder in (twice, once):
        size = measure_size(folder)
        assert size.model_weights == LINEAR + NORMS + EMBEDDING
        assert size.tensor_bytes == 2 * (LINEAR + NORMS + EMBEDDING)
        assert bytes_per_token(folder) == size.tensor_bytes  # the head reads the whole embedding
    assert measure_size(twice).bytes > measure_size(once).bytes


def test_an_untied_embedding_is_not_read_for_a_token(tmp_path: Path) -> None:
    assert bytes_per_token(write(tmp_path, llama())) == 2 * (LINEAR + NORMS + EMBEDDING)


def mixtral(folder: Path) -> Path:
    tensors = {n: t for n, t in llama().items() if ".mlp." not in n}
    prefix = "model.layers.0.block_sparse_moe"
    tensors[f"{prefix}.gate.weight"] = torch.ones(4, HIDDEN, dtype=torch.bfloat16)
    for expert in range(4):
        for name, shape in (("w1", (FFN, HIDDEN)), ("w2", (HIDDEN, FFN)), ("w3", (FFN, HIDDEN))):
            tensors[f"{prefix}.experts.{expert}.{name}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    names = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    return write(folder, tensors, **names, num_local_experts=4, num_experts_per_tok=1)


def test_experts_a_token_is_not_sent_to_are_not_read(tmp_path: Path) -> None:
    folder = mixtral(tmp_path)
    attention, router, expert = 4 * HIDDEN * HIDDEN, 4 * HIDDEN, 3 * HIDDEN * FFN
    assert measure_size(folder).linear_weights == attention + router + 4 * expert
    assert bytes_per_token(folder) == 2 * (attention + router + expert + NORMS + EMBEDDING)


def test_slices_of_a_stacked_tensor(tmp_path: Path) -> None:
    """Fused experts [4, out, in] are stored slice by slice once compressed."""
    tensors = {n: t for n, t in llama().items() if ".mlp." not in n}
    prefix = "model.layers.0.mlp"
    tensors[f"{prefix}.gate.weight"] = torch.ones(4, HIDDEN, dtype=torch.bfloat16)
    specs = {}
    for expert in range(4):
        for name, shape in (("gate_up_proj", [2 * FFN, HIDDEN]), ("down_proj", [HIDDEN, FFN])):
            spec = {"kind": "uniform", "bits": 4, "symmetric": True, "group_size": 8, "shape": shape}
            specs[f"{prefix}.experts.{name}[{expert}]"] = spec
    names = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 2}
    config = {**names, "num_local_experts": 4, "quantization_config": quantization_config(specs, {})}
    folder = write(tmp_path, compress(tensors, specs), **config)
    size = measure_size(folder)
    dense, expert = 4 * HIDDEN * HIDDEN + 4 * HIDDEN, 3 * HIDDEN * FFN
    assert size.linear_weights == dense + 4 * expert
    assert size.linear_bytes == 2 * dense + 4 * expert * (4 + 2) // 8
    assert bytes_per_token(folder) == 2 * (dense + NORMS + EMBEDDING) + 2 * expert * 6 // 8


def test_other_tools_models_have_bytes_only(tmp_path: Path) -> None:
    size = measure_size(write(tmp_path, llama(), quantization_config={"quant_method": "gptq"}))
    assert size.bytes > 0
    assert size.linear_bits is None
    assert size.model_bits is None


def test_unknown_structure_still_has_a_size(tmp_path: Path) -> None:
    folder = write(tmp_path, {"odd": torch.ones(3, 5)}, model_type="odd", architectures=["Odd"])
    size = measure_size(folder)
    assert (size.model_weights, size.model_bits, size.linear_bits) == (15, 32, None)
    assert bytes_per_token(folder) == 60
