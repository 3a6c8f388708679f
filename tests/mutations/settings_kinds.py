"""Mutations of config.json: its settings, and what it says about a compression."""

from __future__ import annotations

import random
from typing import Any

from mutations.files import Files, Unreadable
from mutations.kinds import ODD, kind, mutate_inside, near, shown, some

KNOWN = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size", "head_dim",
    "intermediate_size", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "mlp_bias", "attention_dropout",
    "torch_dtype", "dtype", "architectures", "model_type", "eos_token_id", "bos_token_id", "pad_token_id",
    "rms_norm_eps", "hidden_act", "max_position_embeddings", "initializer_range", "use_cache", "pretraining_tp",
    "transformers_version", "auto_map", "partial_rotary_factor", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "num_experts", "num_local_experts", "n_embd", "n_layer", "n_head", "n_positions",
    "layer_norm_epsilon", "activation_function", "scale_attn_weights", "quantization_config", "text_config",
    "attn_implementation", "is_decoder", "is_encoder_decoder", "add_cross_attention", "problem_type", "id2label",
    "num_labels", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "tokenizer_class",
)  # fmt: skip
ROPES: tuple[Any, ...] = (
    {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "2"},
    {"rope_type": "linear", "factor": -1.0}, {"rope_type": "linear", "factor": 0.5}, {"type": "su", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, {"type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0}, {"rope_type": "mrope", "mrope_section": [1, 1, 2]},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4,
     "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "proportional"}, {"rope_type": "nonsense"},
    {"rope_type": None}, {"rope_type": 3}, {"factor": 2.0}, {"rope_type": "default", "rope_theta": 1e6}, {}, [],
    "linear",
    {"rope_type": "default", "rope_theta": 0}, {"rope_type": "default", "rope_theta": "10000"},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, {"type": "default"}, {"type": "mrope"}, None,
    {"rope_type": "linear", "factor": 2.0, "type": "dynamic"}, {"rope_type": "ntk", "factor": 2.0},
)  # fmt: skip
ARCHITECTURES: tuple[Any, ...] = (
    ["LlamaForCausalLM"], ["MistralForCausalLM"], ["Qwen2ForCausalLM"], ["LlamaModel"], ["Qwen2Model"],
    ["LlamaForSequenceClassification"], ["NonsenseForCausalLM"], [], None, "LlamaForCausalLM", [None], [3],
    ["LlamaForCausalLM", "LlamaModel"], ["AutoModelForCausalLM"], ["PreTrainedModel"], ["LlamaConfig"], ["Trainer"],
    ["GPT2LMHeadModel"], ["BertModel"], ["__name__"], ["pipeline"], ["logging"], ["LlamaForQuestionAnswering"],
    ["GPT2Model"], ["Qwen3ForCausalLM"], ["Gemma2ForCausalLM"], ["LLaMAForCausalLM"],
)  # fmt: skip
TYPES: tuple[Any, ...] = (
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "gemma2", "qwen3_moe", "Llama", "LLAMA", "llama4", "phi3",
    "mixtral", "nonsense", "", None, 3, [], ["llama"], "t5", "granite", "olmo2", "llava", "clip", "whisper", "qwen2_vl",
)  # fmt: skip
DTYPES: tuple[Any, ...] = (
    "float16", "bfloat16", "float32", "torch.bfloat16", "float64", "half", "int8", "bf16", "auto", "", None, 3, [],
    "bool",
    "float8_e4m3fn", "complex64", "torch.nonsense", {"": "float16"}, "nn", "float",
)  # fmt: skip
ACTIVATIONS: tuple[Any, ...] = (
    "silu", "swish", "gelu", "relu", "gelu_pytorch_tanh", "SiLU", "", None, 3, ["silu"], "nonsense", "sigmoid",
    "linear",
)  # fmt: skip
FOREIGN: tuple[Any, ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True}, {"quant_method": None}, {}, [],
    "int8",
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, {"bits": 4}, None, 4,
    {"quant_method": "mxfp4"}, {"quant_method": "nonsense"}, {"quant_method": "featherweight"}, {"quant_method": 7},
    {"quant_method": "featherweight", "format_version": 1, "codes": []}, {"quant_method": "hqq"},
    {"quant_method": "torchao"},
    {"quant_method": "quanto", "weights": "int8"}, {"quant_method": "eetq"}, {"quant_method": "fbgemm_fp8"},
)  # fmt: skip


def _put(files: Files, config: dict[str, Any], words: str) -> str:
    files.put_json("config.json", config)
    return words


@kind("config: a setting removed")
def removed(chance: random.Random, files: Files) -> str:
    config = files.config()
    name = some(chance, sorted(config))
    del config[name]
    return _put(files, config, name)


@kind("config: a setting of an odd value")
def odd(chance: random.Random, files: Files) -> str:
    config = files.config()
    name = some(chance, sorted(config) if chance.random() < 0.7 else KNOWN)
    value = chance.choice(ODD)
    return _put(files, {**config, name: value}, f"{name} = {shown(value)}")


@kind("config: a setting near its value")
def nearby(chance: random.Random, files: Files) -> str:
    config = files.config()
    name = some(chance, sorted(set(config) - {"quantization_config"}))
    value = near(chance, config[name])
    return _put(files, {**config, name: value}, f"{name} = {shown(value)}")


@kind("config: sizes that contradict the weights")
def sizes(chance: random.Random, files: Files) -> str:
    config = files.config()
    whole = [name for name, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]
    name = some(chance, sorted(name for name in whole if not name.endswith("token_id")))
    value = chance.choice([1, 2, 3, 4, 5, 8, 16, 24, 31, 32, 33, 48, 64, 96, 128, 256, 259, 261, 1024])
    return _put(files, {**config, name: value}, f"{name} = {value}")


@kind("config: rotary positions")
def rope(chance: random.Random, files: Files) -> str:
    config = files.config()
    name = chance.choice(["rope_scaling", "rope_parameters", "both", "inside", "rope_theta"])
    if name == "inside":
        value, where = mutate_inside(chance, config.get("rope_parameters") or {"rope_type": "default"})
        return _put(files, {**config, "rope_parameters": value}, f"rope_parameters{where}")
    if name == "rope_theta":
        value = chance.choice([1e4, 10000, 1e6, 5e5, 0, -1.0, 1, "10000", None, [1e4], 1e-3, float("inf")])
    else:
        value = chance.choice(ROPES)
    old = config.pop("rope_parameters", None)
    if isinstance(value, dict) and isinstance(old, dict) and chance.random() < 0.5:
        value = {"rope_theta": old.get("rope_theta", 1e4), **value}
    if name != "rope_parameters" and chance.random() < 0.5:
        config["rope_theta"] = 5e5
    if name == "both":
        return _put(files, {**config, "rope_scaling": value, "rope_parameters": old}, f"both {shown(value)}")
    return _put(files, {**config, name: value}, f"{name} = {shown(value)}")


@kind("config: a choice of another kind")
def choices(chance: random.Random, files: Files) -> str:
    config = files.config()
    name, values = chance.choice(
        [("architectures", ARCHITECTURES), ("model_type", TYPES), ("dtype", DTYPES), ("torch_dtype", DTYPES),
         ("hidden_act", ACTIVATIONS), ("activation_function", ACTIVATIONS)]
    )  # fmt: skip
    value = chance.choice(values)
    if name == "torch_dtype":
        config.pop("dtype", None)
    return _put(files, {**config, name: value}, f"{name} = {shown(value)}")


@kind("config: a switch")
def switches(chance: random.Random, files: Files) -> str:
    config = files.config()
    name = chance.choice(
        ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "is_decoder", "use_cache",
         "add_cross_attention", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "norm_topk_prob",
         "is_encoder_decoder", "output_attentions", "use_bidirectional_attention", "reorder_and_upcast_attn"]
    )  # fmt: skip
    value = not config.get(name, name == "scale_attn_weights")
    return _put(files, {**config, name: value}, f"{name} = {value}")


@kind("config: windows of attention")
def windows(chance: random.Random, files: Files) -> str:
    config = files.config()
    kinds = ["full_attention", "sliding_attention", "chunked_attention", "nonsense", 3]
    words = []
    for _ in range(chance.choice([1, 2, 3])):
        name = chance.choice(["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"])
        config[name] = chance.choice(
            {
                "sliding_window": [None, 0, 1, 4, 8, -1, 8.0, "8", 4096, True],
                "use_sliding_window": [True, False, None, "yes"],
                "max_window_layers": [0, 1, 2, 28, -1, None, 1.0],
                "layer_types": [
                    None,
                    [],
                    [chance.choice(kinds) for _ in range(2)],
                    ["sliding_attention"] * 3,
                    ["sliding_attention"] * 2,
                    "full_attention",
                ],
            }[name]  # fmt: skip
        )
        words.append(f"{name} = {shown(config[name])}")
    return _put(files, config, ", ".join(words))


@kind("config: special tokens")
def special_tokens(chance: random.Random, files: Files) -> str:
    config = files.config()
    name = chance.choice(["eos_token_id", "bos_token_id", "pad_token_id"])
    value = chance.choice([None, -1, 0, 259, 260, 10**9, [257], [257, 258], [], ["</s>"], "257", 257.0, True, {}])
    return _put(files, {**config, name: value}, f"{name} = {shown(value)}")


@kind("config: something it does not have")
def additions(chance: random.Random, files: Files) -> str:
    config = files.config()
    name, value = chance.choice(
        [("auto_map", {"AutoModelForCausalLM": "modeling_strange.Strange"}), ("auto_map", "strange"),
         ("auto_map", {"AutoConfig": "configuration_strange.Strange"}), ("text_config", {"hidden_size": 32}),
         ("vision_config", {}), ("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0), ("num_experts", 4),
         ("attention_multiplier", 0.1), ("logits_scaling", 8.0), ("embedding_multiplier", 12.0), ("_name_or_path", 3),
         ("partial_rotary_factor", 0.5), ("qkv_bias", True), ("no_bias", True), ("_attn_implementation", "nonsense"),
         ("_attn_implementation", "flash_attention_2"), ("pruned_heads", {"0": [1]}), ("torchscript", True),
         ("use_qk_norm", True), ("base_model_tp_plan", {"a": 1}), ("id2label", {"0": "a", "1": "b"}),
         ("num_labels", -1),
         ("compression_config", {"quant_method": "compressed-tensors"}), ("max_length", 20), ("temperature", "hot"),
         ("length_penalty", 2.0), ("do_sample", True), ("top_k", -3), ("sliding_window", 2), ("name_or_path", None)]
    )  # fmt: skip
    return _put(files, {**config, name: value}, f"{name} = {shown(value)}")


@kind("config: within another object")
def nested(chance: random.Random, files: Files) -> str:
    config = files.config()
    if chance.random() < 0.5:
        kept = {key: config.pop(key) for key in list(config) if key not in ("architectures", "model_type")}
        return _put(files, {**config, "text_config": kept}, "all in text_config")
    return _put(files, {"model": config}, "all in model")


@kind("compression: a foreign one")
def foreign(chance: random.Random, files: Files) -> str:
    config = files.config()
    value = chance.choice(FOREIGN)
    return _put(files, {**config, "quantization_config": value}, shown(value))


@kind("compression: an entry changed")
def entry(chance: random.Random, files: Files) -> str:
    config = files.config()
    value, where = mutate_inside(chance, _compression(config))
    return _put(files, {**config, "quantization_config": value}, where)


@kind("compression: a code changed")
def code(chance: random.Random, files: Files) -> str:
    config = files.config()
    found = _compression(config)
    codes = found.get("codes")
    if not isinstance(codes, list) or not codes:
        raise Unreadable("codes")
    place = chance.randrange(len(codes))
    if not isinstance(codes[place], dict):
        raise Unreadable("codes")
    part = chance.choice(["code", "code", "modules"])
    codes[place][part], where = mutate_inside(chance, codes[place].get(part))
    return _put(files, config, f"codes[{place}].{part}{where}")


@kind("compression: a module more, less, or of another name")
def modules(chance: random.Random, files: Files) -> str:
    config = files.config()
    entries = [e for e in _compression(config).get("codes") or [] if isinstance(e, dict) and e.get("modules")]
    found = some(chance, entries)["modules"]
    if not isinstance(found, dict):
        raise Unreadable("modules")
    name = some(chance, sorted(found))
    way = chance.choice(["removed", "added", "renamed", "all removed", "another shape"])
    new = chance.choice([f"{name}x", "lm_head", "model.embed_tokens", "model.norm", "model", "", "model.layers.9.a"])
    if way == "all removed":
        found.clear()
    elif way == "another shape":
        found[name] = chance.choice(
            [[32, 32], [32], [], [0, 32], [-1, -1], [32, 32, 1], "x", None, [10**9, 10**9], [1.5]]
        )
        new = str(found[name])
    else:
        shape = found[name] if way == "added" else found.pop(name)
        if way != "removed":
            found[new] = shape
    return _put(files, config, f"{name} {way} {new if way != 'removed' else ''}")


@kind("compression: no word of it")
def unsaid(chance: random.Random, files: Files) -> str:
    config = files.config()
    found = _compression(config)
    if chance.random() < 0.3:
        config["compression_config"] = found
    del config["quantization_config"]
    return _put(files, config, "said in compression_config" if "compression_config" in config else "nowhere")


def _compression(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    if not isinstance(found, dict) or "codes" not in found:
        raise Unreadable("quantization_config")
    return found
