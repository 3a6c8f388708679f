"""Tiny random models, compressed in a few lines: nothing here uses the package's own compression."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featherweight.model.layers.modules import CodedModule
from featherweight.storage.checkpoint.format import quantization_config
from featherweight.storage.codes.base import Code

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

V5 = int(transformers.__version__.split(".")[0]) >= 5


def uniform(weight: Tensor) -> Code:
    """4 bit, min-max, asymmetric, groups of 16 columns."""
    from featherweight.storage.codes.uniform import Uniform

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 16)).view(rows, -1, 16)
    low = padded.amin(-1).clamp(max=0)
    scales = ((padded.amax(-1).clamp(min=0) - low) / 15).half().float().clamp(min=1e-4)
    zero_points = (-low / scales).round().clamp(0, 15)
    codes = (padded / scales[..., None] + zero_points[..., None]).round().clamp(0, 15)
    return Uniform.encode(codes.reshape(rows, -1)[:, :columns], scales, zero_points, 4, 16)


def trit_planes(weight: Tensor) -> Code:
    """Two planes, groups of 16 columns: the sign where |w| is large, then a third of it by chance."""
    from featherweight.storage.codes.trit_planes import TritPlanes

    rows, columns = weight.shape
    trits = torch.stack([weight.sign() * (weight.abs() > weight.abs().mean() * 0.7), torch.randn_like(weight).sign()])
    scales = weight.abs().mean() * torch.rand(rows, -(-columns // 16), 2)
    return TritPlanes.encode(trits.to(torch.int8), scales, 16)


def dense(weight: Tensor) -> Code:
    from featherweight.storage.codes.dense import Dense

    return Dense(weight.bfloat16())


CODES: tuple[Callable[[Tensor], Code], ...] = (uniform, trit_planes, dense)


@dataclass(frozen=True)
class Folder:
    """A compressed folder and the same model with the decoded weights."""

    path: Path
    decoded: Path
    codes: dict[str, Code]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    def tensors(self) -> dict[str, Tensor]:
        return load_all(self.path)

    def rewrite(self, **config: Any) -> None:
        (self.path / "config.json").write_text(json.dumps(self.config | config))


def load_all(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def llama(**settings: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": False, "attention_bias": True, **settings},
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    )


def bert() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
        )
    )


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def qwen_moe(generation: int) -> Any:
    name = f"Qwen{generation}Moe"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
    "mixtral": mixtral,
    "qwen2-moe": lambda: qwen_moe(2),
    "qwen3-moe": lambda: qwen_moe(3),
}

KEEP = ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "LayerNorm", ".gate.weight", "shared_expert_gate", "cls.")


def compress(
    source: Path, out: Path, codes: tuple[Callable[[Tensor], Code], ...] = CODES, keep: tuple[str, ...] = KEEP
) -> Folder:
    """Compress every matrix of a plain folder, with the codes in turn, and write the decoded model beside it."""
    torch.manual_seed(1)
    stored, decoded, made = {}, {}, {}
    conv1d = "gpt2" in json.loads((source / "config.json").read_text())["model_type"]
    for index, (name, weight) in enumerate(load_all(source).items()):
        if weight.dim() != 2 or any(part in name for part in keep):
            stored[name] = decoded[name] = weight
            continue
        code = codes[index % len(codes)](weight.T.contiguous() if conv1d else weight)
        made[name.removesuffix(".weight")] = code
        for key, tensor in code.tensors().items():
            stored[f"{name.removesuffix('.weight')}.{key}"] = tensor
        decoded[name] = code.decode().T.contiguous() if conv1d else code.decode()
    for folder, tensors in ((out / "compressed", stored), (out / "decoded", decoded)):
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((source / "config.json").read_text())
    result = Folder(out / "compressed", out / "decoded", made)
    specs = {name: code.spec for name, code in made.items()}
    result.rewrite(quantization_config=quantization_config(specs, {"name": "test"}))
    return result


def build(name: str, out: Path, **settings: Any) -> Folder:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # biases and norms too, so that a wrong one shows
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out / "plain")
    return compress(out / "plain", out, **settings)


TOKENS = torch.arange(30).view(2, 15)
EAGER: dict[str, Any] = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if V5 else {})


def auto_class(name: str) -> Any:
    return transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM


def from_pretrained(cls: Any, folder: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    return cls.from_pretrained(folder, **{"dtype" if V5 else "torch_dtype": dtype}, **EAGER, **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS, attention_mask=torch.ones_like(TOKENS))[0]


def layers(model: Any) -> dict[str, CodedModule]:
    return {m.name: m for m in model.modules() if isinstance(m, CodedModule)}


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Weights are equal in every bit, which tests of stored tensors show; products of them need not be.

    A matrix decoded for one call and the same one held by nn.Linear may lie at different addresses and go through other
    routes of the processor's BLAS, which add up in another order: a last bit of float32 or bfloat16.
    """
    assert found.dtype == expected.dtype
    tolerance = 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
