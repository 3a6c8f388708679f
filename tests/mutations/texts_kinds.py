"""Mutations of what belongs to texts: tokenizer, chat template, settings of generation."""

from __future__ import annotations

import random
from typing import Any

from mutations.files import Files, Unreadable
from mutations.kinds import ODD, kind, mutate_inside, shown, some

TEMPLATES: tuple[str, ...] = (
    "", "{{", "{% for m in messages %}", "{{ messages[0]['content'] }}", "{{ nothing.here.at.all }}",
    "{{ raise_exception('no system role, please') }}", "{{ messages | nonsense }}", "{{ 1 / 0 }}",
    "{% for i in range(10) %}{{ messages[i]['content'] }}{% endfor %}", "{{ messages[0].role + 3 }}",
    "{{ strftime_now('%Y') }}{{ messages | tojson }}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}",
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}"
    "{{ messages[0]['content'] }}",
    "{%- set ns = namespace(found=false) -%}{%- for m in messages -%}{%- set ns.found = true -%}{{ m.content }}"
    "{%- endfor -%}{{ ns.found }}", "{{ bos_token * 2 }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}", "{{ tools }}{{ documents }}{{ date_string }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}{% break %}",
    "{{ messages[0]['content'].strip() }}",
    "{{ raise_exception() }}", "{{ raise_exception('a', 'b') }}", "{% set x = messages.append(1) %}{{ messages }}",
    "{{ '%s' % messages }}", "{{ messages[5].content }}", "{{ add_generation_prompt }}{{ messages|length }}\n\nx",
    "{{ messages | map(attribute='content') | join(' ') | upper }}", "{{ range(3) | list }}", "{{ cycler }}",
    "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
    "{% for x in range(999999999) %}{{ x }}{% endfor %}",
)  # fmt: skip
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("add_bos_token", True), ("add_bos_token", False), ("add_eos_token", True), ("add_prefix_space", True),
    ("add_bos_token", "yes"), ("add_bos_token", None), ("bos_token", None), ("bos_token", "<nowhere>"),
    ("bos_token", 3),
    ("bos_token", {"content": "</s>"}), ("bos_token", {"__type": "AddedToken", "content": "<s>"}), ("eos_token", None),
    ("eos_token", ["</s>"]), ("eos_token", "<s>"), ("pad_token", None), ("unk_token", "<none>"), ("bos_token", "a"),
    ("model_max_length", 4), ("model_max_length", "x"), ("model_max_length", 1e30), ("model_max_length", None),
    ("tokenizer_class", "LlamaTokenizer"), ("tokenizer_class", "LlamaTokenizerFast"), ("tokenizer_class", "Nonsense"),
    ("tokenizer_class", "GPT2Tokenizer"), ("tokenizer_class", "BertTokenizer"), ("tokenizer_class", None),
    ("tokenizer_class", "PreTrainedTokenizerFast"), ("tokenizer_class", "Qwen2Tokenizer"), ("tokenizer_class", 3),
    ("tokenizer_class", "TokenizersBackend"), ("tokenizer_class", "T5Tokenizer"),
    ("auto_map", {"AutoTokenizer": "a.B"}),
    ("added_tokens_decoder", {"260": {"content": "<more>", "special": True}}), ("added_tokens_decoder", {"x": {}}),
    ("added_tokens_decoder", []), ("additional_special_tokens", ["<a>", "<b>"]), ("additional_special_tokens", "a"),
    ("extra_special_tokens", ["<x>"]), ("extra_special_tokens", {"image_token": "<image>"}),
    ("clean_up_tokenization_spaces", True),
    ("padding_side", "nowhere"), ("truncation_side", 3), ("split_special_tokens", True), ("legacy", False),
    ("do_lower_case", True), ("use_fast", False), ("chat_template", 3), ("sp_model_kwargs", {}), ("is_local", True),
    ("chat_template", [{"name": "default", "template": "{{ messages[0].content }}"}]), ("backend", "nonsense"),
    ("chat_template", [{"name": "rag", "template": "x"}]), ("chat_template", {"default": "{{ messages[0].content }}"}),
    ("model_input_names", None), ("model_specific_special_tokens", {"a": "b"}), ("backend_tokenizer", 3),
)  # fmt: skip
GENERATION: tuple[tuple[str, Any], ...] = (
    ("repetition_penalty", 1.3), ("repetition_penalty", 0), ("repetition_penalty", -1.0), ("repetition_penalty", "1.2"),
    ("temperature", 0), ("temperature", 0.6), ("temperature", None), ("temperature", "warm"), ("top_k", 5),
    ("top_k", 0),
    ("top_k", -1), ("top_p", 0.9), ("top_p", 2.0), ("top_p", 0), ("min_p", 0.1), ("min_p", 7), ("do_sample", True),
    ("do_sample", "yes"), ("num_beams", 4), ("eos_token_id", None), ("eos_token_id", [257, 97, 98]),
    ("eos_token_id", 97),
    ("eos_token_id", "257"), ("eos_token_id", [None]), ("eos_token_id", 10**9), ("eos_token_id", -1),
    ("eos_token_id", 5.0),
    ("bos_token_id", 10**9), ("pad_token_id", None), ("pad_token_id", -7), ("max_length", 3), ("max_new_tokens", 2),
    ("max_new_tokens", 0), ("min_length", 100), ("min_new_tokens", 3), ("no_repeat_ngram_size", 2),
    ("max_length", None),
    ("bad_words_ids", [[97]]), ("bad_words_ids", 3), ("suppress_tokens", [97, 98]), ("begin_suppress_tokens", [99]),
    ("forced_bos_token_id", 97), ("forced_eos_token_id", 98), ("length_penalty", "x"), ("penalty_alpha", 0.6),
    ("num_return_sequences", 3), ("cache_implementation", "nonsense"), ("cache_implementation", "static"),
    ("use_cache", False),
    ("stop_strings", ["a"]), ("guidance_scale", 1.5), ("watermarking_config", {}), ("typical_p", 0.5),
    ("epsilon_cutoff", 3),
    ("renormalize_logits", True), ("encoder_repetition_penalty", 1.5), ("sequence_bias", [[[97], 5.0]]),
    ("num_beam_groups", 2),
    ("transformers_version", None), ("assistant_confidence_threshold", 3), ("remove_invalid_values", True),
    ("return_dict_in_generate", True), ("output_scores", True), ("exponential_decay_length_penalty", [2, 1.5]),
    ("dola_layers", "high"), ("prompt_lookup_num_tokens", 3), ("compile_config", {}), ("custom", {"a": []}),
    ("eos_token_id", []),
    ("output_attentions", True), ("low_memory", True), ("constraints", [1]), ("force_words_ids", [[97]]),
    ("max_time", 1e-9),
)  # fmt: skip


@kind("text: within tokenizer.json")
def tokenizer(chance: random.Random, files: Files) -> str:
    found = files.object("tokenizer.json")
    if chance.random() < 0.6:  # the vocabulary is most of the file
        key = some(chance, sorted(set(found) - {"model"}))
        found[key], where = mutate_inside(chance, found[key])
        files.put_json("tokenizer.json", found)
        return f".{key}{where}"
    new, where = mutate_inside(chance, found)
    files.put_json("tokenizer.json", new)
    return where


@kind("text: a vocabulary that is not the model's")
def vocabulary(chance: random.Random, files: Files) -> str:
    found = files.object("tokenizer.json")
    model = found.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise Unreadable("vocab")
    vocabulary = model["vocab"]
    token = some(chance, sorted(vocabulary))
    way = chance.choice(["removed", "beyond the rows", "twice", "all later", "negative", "a word", "merge"])
    if way == "removed":
        del vocabulary[token]
    elif way == "all later":
        model["vocab"] = {name: number + 300 for name, number in vocabulary.items() if isinstance(number, int)}
    elif way == "merge":
        model["merges"] = [["a", "b"]]
        vocabulary["ab"] = 999
    else:
        number = {"beyond the rows": 5000, "twice": 1, "negative": -1, "a word": "one"}[way]
        vocabulary[chance.choice([token, "h", "e"])] = number
    files.put_json("tokenizer.json", found)
    return f"{token} {way}"


@kind("text: tokenizer_config.json")
def tokenizer_config(chance: random.Random, files: Files) -> str:
    found = files.object("tokenizer_config.json")
    if chance.random() < 0.2:
        new, words = mutate_inside(chance, found)
        files.put_json("tokenizer_config.json", new)
        return words
    name, value = chance.choice(SETTINGS)
    if name == "chat_template":
        files.content.pop("chat_template.jinja", None)
    files.put_json("tokenizer_config.json", {**found, name: value})
    return f"{name} = {shown(value)}"


@kind("text: a chat template")
def template(chance: random.Random, files: Files) -> str:
    source = chance.choice(TEMPLATES)
    if chance.random() < 0.5:
        files.content["chat_template.jinja"] = source.encode()
        return f"in its file: {shown(source)}"
    found = files.object("tokenizer_config.json")
    files.content.pop("chat_template.jinja", None)
    files.put_json("tokenizer_config.json", {**found, "chat_template": source})
    return f"in tokenizer_config.json: {shown(source)}"


@kind("text: generation_config.json")
def generation(chance: random.Random, files: Files) -> str:
    found = files.object("generation_config.json")
    if chance.random() < 0.15:
        name, value = chance.choice(sorted(found) or ["top_k"]), chance.choice(ODD)
    else:
        name, value = chance.choice(GENERATION)
    files.put_json("generation_config.json", {**found, name: value})
    return f"{name} = {shown(value)}"
