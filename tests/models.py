"""Tiny random checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PLAIN = {key: value for key, value in COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
# family: class of the configuration, class of the model, its settings
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", COMMON),
    "mistral": ("MistralConfig", "MistralForCausalLM", COMMON),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", COMMON | EXPERTS),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", PLAIN | {"num_key_value_heads": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        PLAIN | QWEN_EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 64},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", COMMON),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", COMMON | QWEN_EXPERTS),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", COMMON),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", COMMON),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", COMMON),
    "phi": ("PhiConfig", "PhiForCausalLM", PLAIN),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", PLAIN | {"num_key_value_heads": 2}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | {"bos_token_id": 0, "eos_token_id": 1},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", PLAIN | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", PLAIN),
    "bert": ("BertConfig", "BertForMaskedLM", PLAIN),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", COMMON | EXPERTS),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        COMMON | EXPERTS | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
}


def make_tiny(
    family: str,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    model_class: str | None = None,
    tokenizer: bool = False,
    shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of FAMILIES) to `folder` and return the folder.

    Parameters
    ----------
    model_class : another class of transformers for the same configuration, e.g. "GPT2Model"
    tokenizer : add a byte-level tokenizer whose ids are the bytes
    shard_size : as `max_shard_size` of save_pretrained
    overrides : settings of the configuration
    """
    import transformers

    config_name, default_model, settings = FAMILIES[family]
    config = getattr(transformers, config_name)(**(settings | overrides))
    torch.manual_seed(seed)
    model = getattr(transformers, model_class or default_model)(config).to(dtype)
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A byte-level tokenizer with 256 entries, one for each byte, and no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)
