"""Mutants that the campaign found to be wrongly treated, each by itself and under all rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from mutations.bases import NAMED, Base
from mutations.campaign import bases_in
from mutations.files import INDEX, SINGLE, Files, Shard, renamed, split
from mutations.judge import Verdict, judge
from mutations.kinds import Case
from mutations.tensors_kinds import stored, value_of

Change = Callable[[Files], object]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    names = ("llama-untied", "qwen2-tied", "llama-rtn-8", "qwen3-rtn-4-head", "mistral", "gpt2", "qwen3-moe-rtn-4")
    return {base.name: files for base, files in bases_in(tmp_path_factory.mktemp("bases"), names)}


@pytest.fixture
def judged(bases: dict[str, Files], tmp_path: Path) -> Callable[[str, Change], Verdict]:
    def judged(name: str, change: Change) -> Verdict:
        files = bases[name].copy()
        change(files)
        files.write(tmp_path / "case")
        base: Base = NAMED[name]
        return judge(Case(0, base, (("text: found", ""),)), tmp_path / "case")

    return judged


def config(**changes: Any) -> Change:
    return lambda files: files.put_json("config.json", files.config() | changes)


def rename(change: Callable[[str], str], every: int = 1) -> Change:
    def run(files: Files) -> None:
        shard = files.shard(SINGLE)
        names = {tensor.name: change(tensor.name) for tensor in shard.tensors[::every]}
        files.put(SINGLE, Shard(renamed(shard.tensors, names), shard.metadata))

    return run


def dotted_index(files: Files) -> None:
    files.content = split(files, 2).content
    index = files.object(INDEX)
    index["weight_map"] = {name: f"./{shard}" for name, shard in index["weight_map"].items()}
    files.put_json(INDEX, index)


def compressed(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def run(files: Files) -> None:
        found = files.config()
        files.put_json("config.json", change(found))

    return run


def first_size(found: dict[str, Any], size: object) -> dict[str, Any]:
    modules = found["quantization_config"]["codes"][0]["modules"]
    modules[next(iter(modules))][0] = size
    return found


def generation(**changes: Any) -> Change:
    return lambda files: files.put_json("generation_config.json", files.object("generation_config.json") | changes)


def bare_index(files: Files) -> None:
    files.content = split(files, 2).content
    files.put_json(INDEX, {"weight_map": files.object(INDEX)["weight_map"]})


def strange_attention(files: Files) -> None:
    """Tensors that only transformers' loader can place, and a way to compute attention that it does not know."""
    config(_attn_implementation="nonsense")(files)
    rename(lambda name: name.removeprefix("model."), 2)(files)


def one_value(name: str, value: float) -> Change:
    """Put in the place of a tensor's first number."""

    def run(files: Files) -> None:
        shard = files.shard(SINGLE)
        for place, tensor in enumerate(shard.tensors):
            if tensor.name == name:
                values = value_of(tensor).clone()
                values.view(-1)[0] = value
                shard.tensors[place] = stored(name, values)
        files.put(SINGLE, shard)

    return run


def truth(name: str) -> Change:
    """Booleans in the place of a tensor's numbers."""

    def run(files: Files) -> None:
        shard = files.shard(SINGLE)
        shard.tensors = [
            stored(name, torch.ones(one.shape, dtype=torch.bool)) if one.name == name else one for one in shard.tensors
        ]
        files.put(SINGLE, shard)

    return run


def without_a_block(files: Files) -> None:
    """A block's tensors are gone, and a method is named of which the others show nothing."""
    config(compression_config={"quant_method": "compressed-tensors"})(files)
    shard = files.shard(SINGLE)
    kept = [tensor for tensor in shard.tensors if ".layers.1." not in tensor.name]
    files.put(SINGLE, Shard(kept, shard.metadata))


LOADED: Sequence[tuple[str, str, Change]] = (
    ("an attention nobody knows", "qwen2-tied", strange_attention),
    ("an index with ./", "llama-untied", dotted_index),
    ("an index without metadata", "qwen2-tied", bare_index),
    ("an empty template", "llama-untied", lambda files: files.content.update({"chat_template.jinja": b""})),
    ("a window in a family without", "llama-untied", config(sliding_window=4)),
    ("a window of nothing", "mistral", config(sliding_window=0)),
    ("a watermark by default", "llama-rtn-8", generation(watermarking_config={})),
    ("names without their prefix", "llama-untied", rename(lambda name: name.removeprefix("model."))),
    ("half of the names without", "qwen2-tied", rename(lambda name: name.removeprefix("model."), 2)),
    ("names with their prefix twice", "qwen2-tied", rename(lambda name: f"model.{name}")),
    ("architectures that are a mapping", "llama-rtn-8", config(architectures={"0": "LlamaForCausalLM"})),
    ("a context that the prompt fills", "llama-rtn-8", config(max_position_embeddings=31)),
    ("a key beyond the cache's numbers", "llama-untied", one_value("model.layers.1.self_attn.k_proj.weight", 60000.0)),
    ("a rotary base that is true", "llama-untied", config(rope_parameters={"rope_theta": True})),
)


def relabel(name: str, dtype: str) -> Change:
    def run(files: Files) -> None:
        place = files.place(name)
        shard = files.shard(place)
        shard.tensors = [replace(one, dtype=dtype) if one.name == name else one for one in shard.tensors]
        files.put(place, shard)

    return run


def typeless(files: Files) -> None:
    """The class alone says what it is."""
    config(model_type="")(files)
    shard = files.shard(SINGLE)
    shard.tensors = [tensor for tensor in shard.tensors if tensor.name != "model.layers.1.mlp.up_proj.weight"]
    files.put(SINGLE, shard)


def bit(name: str) -> Change:
    """The lowest bit of a tensor's last byte."""

    def run(files: Files) -> None:
        shard = files.shard(SINGLE)
        for place, tensor in enumerate(shard.tensors):
            if tensor.name == name:
                shard.tensors[place] = replace(tensor, data=tensor.data[:-1] + bytes([tensor.data[-1] ^ 1]))
        files.put(SINGLE, shard)

    return run


REFUSED: Sequence[tuple[str, str, Change, str]] = (
    ("blocks without end", "llama-untied", config(num_hidden_layers=2**63), "asks for 9.22337e\\+18 blocks"),
    ("blocks without end, by lists", "qwen2-tied", config(num_hidden_layers=2**31 - 1), "blocks"),
    ("a type nobody knows", "llama-untied", typeless, "lacks model.layers.1.mlp.up_proj.weight"),
    ("a null for a number", "llama-untied", config(intermediate_size={}), "intermediate_size"),
    (
        "our codes under an older name",
        "llama-rtn-8",
        compressed(lambda found: {"compression_config": found.pop("quantization_config"), **found}),
        "codes|lacks",
    ),
    ("a norm of whole numbers beside codes", "llama-rtn-8", relabel("model.norm.weight", "U16"), "U16"),
    ("a tied head with a code", "qwen3-rtn-4-head", config(tie_word_embeddings=True), "compresses 'lm_head'"),
    ("a wrapper around codes", "llama-rtn-8", rename(lambda name: f"module.{name}"), "lack"),
    ("a bit of a code", "llama-rtn-8", bit("model.layers.1.mlp.up_proj.codes"), "model.layers.1.mlp.up_proj.codes"),
    (
        "another tool's name for our codes",
        "llama-rtn-8",
        compressed(lambda found: found | {"quantization_config": {"quant_method": "featherweightx"}}),
        "quantised by 'featherweightx'",
    ),
    (
        "a code of no module",
        "llama-rtn-8",
        compressed(lambda found: found["quantization_config"]["codes"][0]["modules"].update({"": [32, 32]}) or found),
        "compresses the module ''",
    ),
    (
        "a method that is a list",
        "llama-rtn-8",
        compressed(lambda found: found | {"quantization_config": {"quant_method": ["featherweight"]}}),
        "featherweight",
    ),
    (
        "codes that are a number",
        "llama-rtn-8",
        compressed(lambda found: found | {"quantization_config": found["quantization_config"] | {"codes": 2}}),
        "'codes' of quantization_config is malformed \\(it is not a list\\)",
    ),
    (
        "a size that is pages of text",
        "llama-rtn-8",
        compressed(lambda found: first_size(found, "x" * 5000)),
        "the shape of 'model.layers.0.*' is \\[.*expected whole numbers",
    ),
    ("a block that is gone, a method in vain", "qwen2-tied", without_a_block, "lacks model.layers.1"),
    ("an activation that is no word", "llama-rtn-8", config(hidden_act="\x1b[31m\n"), "KeyError"),
    ("a bias of booleans", "qwen2-tied", truth("model.layers.1.self_attn.q_proj.bias"), "q_proj.bias, BOOL"),
    ("more positions than there are numbers", "gpt2", config(max_position_embeddings=10**30), "Overflow"),
)


@pytest.mark.parametrize(("name", "change"), [one[1:] for one in LOADED], ids=[one[0] for one in LOADED])
def test_loaded(judged: Callable[[str, Change], Verdict], name: str, change: Change) -> None:
    verdict = judged(name, change)
    assert not verdict.faults
    assert verdict.loaded, verdict.outcomes["load"].text


@pytest.mark.parametrize(("name", "change", "words"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_refused(judged: Callable[[str, Change], Verdict], name: str, change: Change, words: str) -> None:
    import re

    verdict = judged(name, change)
    assert not verdict.faults
    assert verdict.outcomes["load"].refused
    assert re.search(words, verdict.outcomes["load"].text), verdict.outcomes["load"].text


def test_a_tokenizer_that_wants_more_than_text_is_no_useless_one(tmp_path: Path) -> None:
    from featherweight.errors import CheckpointError
    from featherweight.model.text.tokenizer import refuse_useless

    def wants_boxes(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        raise ValueError("Words must be of type `List[str]`, with a box for each")

    refuse_useless(wants_boxes, tmp_path)
    refuse_useless(lambda text, add_special_tokens: {"input_ids": [1]}, tmp_path)
    with pytest.raises(CheckpointError, match="turns text into nothing"):
        refuse_useless(lambda text, add_special_tokens: {"input_ids": []}, tmp_path)


def test_experts_keep_their_places() -> None:
    from featherweight.errors import CheckpointError
    from featherweight.storage.checkpoint.prefixes import unwrapped

    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(3)]
    assert list(unwrapped(f"_orig_mod.{name}" for name in names).values()) == names
    assert list(unwrapped(name.replace("mlp", "mlp._orig_mod") for name in names).values()) == names
    for prefix in ("_orig_mod.", "model."):
        with pytest.raises(CheckpointError, match="different prefixes"):
            unwrapped([names[0], prefix + names[1], names[2]])


def test_a_folder_in_the_place_of_a_file(judged: Callable[[str, Change], Verdict]) -> None:
    def change(files: Files) -> None:
        del files.content["tokenizer_config.json"]
        files.folders.append("tokenizer_config.json")

    assert not judged("qwen2-tied", change).faults


def test_what_transformers_says_is_for_people() -> None:
    from featherweight.system.transformers_calls import one_line

    text = one_line(TypeError(f"expected {int}, got {dict}\n of \x1b[31mred torch.Size([2, 3])"))
    assert text == "TypeError expected int, got dict of ?[31mred [2, 3]"


def test_a_context_of_one_token_predicts_nothing(bases: dict[str, Files], tmp_path: Path) -> None:
    """It has no windows, and whoever counts them would not end."""
    from featherweight import evaluate
    from featherweight.errors import EvaluationError

    files = bases["qwen2-tied"].copy()
    config(max_position_embeddings=1)(files)
    files.write(tmp_path / "case")
    (tmp_path / "text.txt").write_text("some words to score, and a few more of them")
    with pytest.raises(EvaluationError, match="takes 1 token at a time"):
        evaluate(tmp_path / "case", text=tmp_path / "text.txt", dtype="float32", threads=1)


def test_architectures_that_are_a_mapping_can_be_compressed(bases: dict[str, Files], tmp_path: Path) -> None:
    """No class is named then, so the card names what transformers takes instead."""
    import featherweight

    files = bases["qwen2-tied"].copy()
    config(architectures={"0": ["Qwen2ForCausalLM"]})(files)
    files.write(tmp_path / "case")
    featherweight.compress(tmp_path / "case", "rtn-8", tmp_path / "out", threads=1)
    assert "AutoModelForCausalLM from" in (tmp_path / "out/README.md").read_text()


def test_windows_that_no_class_can_compute_end_calibration_in_a_sentence(
    bases: dict[str, Files], tmp_path: Path
) -> None:
    import featherweight
    from featherweight.errors import CalibrationError

    files = bases["qwen2-tied"].copy()
    config(layer_types=["sliding_attention", "full_attention"], sliding_window=None)(files)
    files.write(tmp_path / "case")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some words to calibrate with, and a few more of them" * 4)
    changes = ("grid.bits=8", "calibration.sequences=3", "calibration.length=24")
    with pytest.raises(CalibrationError, match="cannot run the network on the calibration text: .*sliding_window"):
        featherweight.compress(tmp_path / "case", "gptq", out, changes=changes, calibration=text, threads=1)


def test_codes_of_one_expert_that_nobody_claims(bases: dict[str, Files], tmp_path: Path) -> None:
    """They stand in the file, and the matrix is missing all the same."""
    from featherweight.tasks.analyse.verify import verify

    expert = "model.layers.0.mlp.experts.3.down_proj"
    files = bases["qwen3-moe-rtn-4"].copy()
    settings = files.config()
    claims = [group["modules"] for group in settings["quantization_config"]["codes"]]
    assert sum(expert in modules for modules in claims) == 1
    for modules in claims:
        if expert in modules:
            modules.pop(expert) if isinstance(modules, dict) else modules.remove(expert)
    files.put_json("config.json", settings)
    files.write(tmp_path / "case")
    assert [
        f"lacks {expert}.weight, which config.json asks for" in text for text in verify(tmp_path / "case").problems
    ] == [True]


def test_a_template_without_the_text_is_found_without_transformers(bases: dict[str, Files], tmp_path: Path) -> None:
    from featherweight.errors import CheckpointError
    from featherweight.model.text.tokenizer import Tokenizer

    files = bases["llama-untied"].copy()
    content = files.object("tokenizer.json")
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [first], "pair": [first],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    files.put_json("tokenizer.json", content)
    files.write(tmp_path / "case")
    with pytest.raises(CheckpointError, match="turns text into nothing"):
        Tokenizer.open(tmp_path / "case")
