"""The models that are mutated: tiny, of the families both engines run and of some that transformers alone runs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import FAMILIES
from mutations.files import Files, split

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
VOCABULARY = 256 + len(SPECIAL)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
PLAIN = {key: value for key, value in SMALL.items() if key != "head_dim"}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 256, "eos_token_id": 257}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LORC = ("corrections=[{kind: lorc, rank: 2}]",)
FEW = ("calibration.sequences=4", "calibration.length=32")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """How one is made. recipe: None for a plain model; changes: to the recipe; shards: 1 for a single file."""

    name: str
    family: str
    dtype: torch.dtype
    settings: dict[str, Any]
    shards: int = 1
    recipe: str | None = None
    changes: tuple[str, ...] = ()
    first: bool = True  # whether the tokenizer puts a first token before a text

    @property
    def native(self) -> bool:
        return self.family in ("llama", "mistral", "qwen2", "qwen3")


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
BASES = (
    Base("llama-untied", "llama", BF16, SMALL | UNTIED),
    Base("llama-tied", "llama", FP32, SMALL | TIED, shards=3),
    Base("llama-biases", "llama", FP16, SMALL | UNTIED | {"attention_bias": True, "mlp_bias": True}, first=False),
    Base("llama-rope", "llama", BF16, SMALL | UNTIED | {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}, shards=2),
    Base("mistral", "mistral", BF16, SMALL | UNTIED | {"sliding_window": 8}, shards=3),
    Base("qwen2-tied", "qwen2", BF16, PLAIN | TIED, first=False),
    Base("qwen2-untied", "qwen2", FP32, PLAIN | UNTIED, shards=2),
    Base("qwen3-tied", "qwen3", FP16, SMALL | TIED),
    Base("qwen3-untied", "qwen3", BF16, SMALL | UNTIED, shards=3),
    Base("gpt2", "gpt2", FP32, GPT2, first=False),
    Base("qwen3-moe", "qwen3-moe", BF16, SMALL | EXPERTS, shards=2),
    Base("gemma2", "gemma2", BF16, SMALL | {"sliding_window": 8}),
    Base("bert", "bert", FP32, PLAIN),
    Base("llama-rtn-8", "llama", BF16, SMALL | UNTIED, recipe="rtn-8"),
    Base("llama-awq", "llama", BF16, SMALL | UNTIED, recipe="awq", changes=FEW),
    Base("llama-rotated", "llama", FP32, SMALL | UNTIED, shards=2, recipe="quarot-gptq", changes=FEW),
    Base("llama-lorc", "llama", FP16, SMALL | TIED, recipe="zeroquant-v2", changes=LORC),
    Base("qwen2-ptqtp", "qwen2", BF16, PLAIN | TIED, shards=2, recipe="ptqtp"),
    Base("qwen3-rtn-4-head", "qwen3", BF16, SMALL | UNTIED, shards=3, recipe="rtn-4", changes=("layers.head=true",)),
    Base("mistral-gptq", "mistral", BF16, SMALL | UNTIED, recipe="gptq", changes=FEW),
    Base("gpt2-rtn-8", "gpt2", FP32, GPT2, recipe="rtn-8"),
    Base("qwen3-moe-rtn-4", "qwen3-moe", BF16, SMALL | EXPERTS, recipe="rtn-4"),
)
NAMED = {base.name: base for base in BASES}


def build(base: Base, work: Path) -> Files:
    """The base's folder; kept in `work` for the next time."""
    kept = work / base.name
    if not (kept / "whole").exists():
        plain = work / f"{base.name}.plain"
        _make_model(base, plain)
        _make_text(base, plain)
        if base.recipe is None:
            plain.rename(kept)
        else:
            _compress(base, plain, kept)
        (kept / "whole").touch()
    files = Files.of(kept)
    del files.content["whole"]
    files.content.pop("featherweight.log.jsonl", None)
    return files if base.shards == 1 else split(files, base.shards)


def _make_model(base: Base, folder: Path) -> None:
    """Random parameters that all matter: also biases and norms."""
    import transformers

    config_name, model_name, common = FAMILIES[base.family]
    config = getattr(transformers, config_name)(**(common | base.settings))
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mean = 1.0 if "norm" in name and base.family != "gemma2" else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    model.to(base.dtype).save_pretrained(folder)


def _make_text(base: Base, folder: Path) -> None:
    """A tokenizer of bytes with special tokens, a chat template, settings of generation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    if base.first:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
        )
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    if base.family != "bert":
        settings = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
        (folder / "generation_config.json").write_text(json.dumps(settings))


def _compress(base: Base, plain: Path, out: Path) -> None:
    import featherweight

    text = plain.parent / "calibration.txt"
    if not text.exists():
        text.write_text("".join(chr(97 + (i * i + i // 7) % 26) + " " * (i % 5 == 0) for i in range(4000)))
    calibration = {"calibration": text} if base.changes == FEW else {}
    with quiet():
        featherweight.compress(plain, base.recipe, out, changes=base.changes, threads=1, **calibration)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that is called within writes to the terminal, native code and libraries' logs included."""
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
