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


CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END = VOCABULARY, VOCABULARY + 1
"""Of a turn, in the chat tokenizer."""


def chat_tokenizer(template: str | None = CHAT_TEMPLATE) -> Any:
    """The byte tokenizer with two special tokens and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def make_chat(
    folder: str | Path, family: str = "llama", template: str | None = CHAT_TEMPLATE, **overrides: Any
) -> Path:
    """A tiny model with the chat tokenizer, whose context is long enough for the shipped prompts."""
    context = {"n_positions": 2048} if family == "gpt2" else {"max_position_embeddings": 2048}
    folder = make_tiny(family, folder, vocab_size=VOCABULARY + 4, eos_token_id=END, **context, **overrides)
    chat_tokenizer(template).save_pretrained(folder)
    return folder
