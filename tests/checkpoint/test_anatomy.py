"""What is in a checkpoint of every family, as transformers itself writes it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from invented import NAMES, SHAPES, write_tensors
from safetensors.torch import load_file, save_file

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer, read_anatomy
from featherweight.storage.checkpoint.anatomy.family import declared_families, find_family
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from models import FAMILIES, make_tiny

ATTENTION = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}]
GATED = [{"gate_proj", "up_proj"}, {"down_proj"}]
EXPERTS = [{"gate_proj", "up_proj"}] * 4 + [{"down_proj"}] * 4
INPUT, POST = "input_layernorm", "post_attention_layernorm"
LLAMA_NORMS = {"q_proj": INPUT, "k_proj": INPUT, "v_proj": INPUT, "gate_proj": POST, "up_proj": POST}
SANDWICH_NORMS = LLAMA_NORMS | {"gate_proj": "pre_feedforward_layernorm", "up_proj": "pre_feedforward_layernorm"}
# family: (family file, roles sharing an input in one block, the norm before each role, tied, tensors of no known kind)
EXPECTED: dict[str, tuple[str, list[set[str]], dict[str, str], bool, int]] = {
    "llama": ("llama", ATTENTION + GATED, LLAMA_NORMS, False, 0),
    "mistral": ("mistral", ATTENTION + GATED, LLAMA_NORMS, False, 0),
    "mixtral": (
        "mixtral",
        [*ATTENTION, {"gate"}, *[{"w1", "w3"}] * 4, *[{"w2"}] * 4],
        {"q_proj": INPUT, "k_proj": INPUT, "v_proj": INPUT, "gate": POST, "w1": POST, "w3": POST},
        False,
        0,
    ),
    "qwen2": ("qwen2", ATTENTION + GATED, LLAMA_NORMS, False, 0),
    "qwen2-moe": (
        "qwen3-moe",
        [*ATTENTION, {"gate", "shared_expert_gate", "gate_proj", "up_proj"}, {"down_proj"}, *EXPERTS],
        LLAMA_NORMS | {"gate": POST, "shared_expert_gate": POST},
        False,
        0,
    ),
    "qwen3": ("qwen3", ATTENTION + GATED, LLAMA_NORMS, False, 0),
    "qwen3-moe": ("qwen3-moe", [*ATTENTION, {"gate"}, *EXPERTS], LLAMA_NORMS | {"gate": POST}, False, 0),
    "gemma": ("gemma", ATTENTION + GATED, LLAMA_NORMS, True, 0),
    "gemma2": ("gemma", ATTENTION + GATED, SANDWICH_NORMS, True, 0),
    "gemma3": ("gemma", ATTENTION + GATED, SANDWICH_NORMS, True, 0),
    "phi": (
        "phi",
        [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}],
        dict.fromkeys(("q_proj", "k_proj", "v_proj", "fc1"), INPUT),
        False,
        0,
    ),
    "phi3": (
        "phi3",
        [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
        {"qkv_proj": INPUT, "gate_up_proj": POST},
        False,
        0,
    ),
    "gpt2": ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}], {"c_attn": "ln_1", "c_fc": "ln_2"}, True, 0),
    "opt": (
        "opt",
        [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
        dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn_layer_norm") | {"fc1": "final_layer_norm"},
        True,
        0,
    ),
    "gpt-neox": (
        "gpt-neox",
        [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
        {"query_key_value": INPUT, "dense_h_to_4h": POST},
        False,
        0,
    ),
    "bert": ("bert", [{"query", "key", "value"}, {"attention_output"}, {"intermediate"}, {"output"}], {}, True, 3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint a family, made when first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Made(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = make_tiny(family, root / family)
            return self[family]

    return Made()


def anatomy_of(folder: Path) -> Anatomy:
    with Checkpoint.open(folder) as checkpoint:
        found = read_anatomy(checkpoint)
        assert sorted(found.tensors) == sorted(checkpoint.names)
        check_partition(found, checkpoint)
        return found


def check_partition(found: Anatomy, checkpoint: Checkpoint, sound: bool = True) -> None:
    """Every tensor has one place, every slice appears once; biases and norms fit their layers in a sound model."""
    layers = [*found.layers, *([found.head] if found.head else [])]
    matrices = {layer.tensor for layer in layers}
    biases = {layer.bias for layer in layers if layer.bias}
    parts = [matrices, biases, set(found.embeddings), set(found.norms), set(found.others)]
    assert sum(map(len, parts)) == len(checkpoint.names)
    assert len(found.norms) + len(found.others) == len({*found.norms, *found.others})
    assert len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        stored = checkpoint.entry(layer.tensor).shape[-2:]
        assert layer.shape == (stored[::-1] if layer.transposed else stored)
        if layer.bias and sound:
            assert checkpoint.entry(layer.bias).shape[-1] == layer.shape[0]
        if layer.norm and sound:
            assert checkpoint.entry(layer.norm).shape == (layer.shape[1],)
            assert layer.norm in found.norms
    slices = Counter(layer.tensor for layer in layers if layer.fused_slice)
    assert all(count == checkpoint.entry(name).shape[0] for name, count in slices.items())


def shared_inputs(layers: list[LinearLayer]) -> list[set[str]]:
    groups: dict[str, set[str]] = {}
    for layer in layers:
        groups.setdefault(layer.input_group, set()).add(layer.role)
    return list(groups.values())


def as_counter(groups: list[set[str]]) -> Counter[frozenset[str]]:
    return Counter(map(frozenset, groups))


@pytest.mark.parametrize("family", EXPECTED)
def test_family(family: str, folders: dict[str, Path]) -> None:
    name, groups, norms, tied, others = EXPECTED[family]
    found = anatomy_of(folders[family])
    assert (found.family, found.blocks, len(found.others)) == (name, 2, others)
    assert found.block_prefix.startswith(found.base_prefix)
    assert len({layer.input_group for layer in found.layers}) == 2 * len(groups)
    for block in range(2):
        layers = [layer for layer in found.layers if layer.block == block]
        assert as_counter(shared_inputs(layers)) == as_counter(groups)
        prefix = f"{found.block_prefix}.{block}."
        for layer in layers:
            assert layer.name.startswith(prefix)
            assert layer.norm == (f"{prefix}{norms[layer.role]}.weight" if layer.role in norms else None)
    assert (found.head is None) == tied
    assert found.tied == (((found.tied[0][0], found.embeddings[0]),) if tied else ())


def test_order_within_a_block(folders: dict[str, Path]) -> None:
    found = anatomy_of(folders["llama"])
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [(layer.block, layer.role) for layer in found.layers] == [(b, r) for b in range(2) for r in roles]
    assert [layer.kind for layer in found.layers[:7]] == ["attention"] * 4 + ["mlp"] * 3
    assert found.head is not None
    assert (found.head.kind, found.head.norm, found.head.shape) == ("head", "model.norm.weight", (256, 64))


def test_every_family_file_is_tried(folders: dict[str, Path]) -> None:
    declared = {family.name for family in declared_families()}
    assert declared == {expected[0] for expected in EXPECTED.values()} | {"resnet"}  # see test_convolutions.py
    assert find_family({"architectures": ["GPT2LMHeadModel"]}) == find_family({"model_type": "gpt2"})
    assert find_family({"model_type": "new", "architectures": ["LlamaForCausalLM"]}) is None
    assert find_family({"model_type": ["llama"], "architectures": "LlamaForCausalLM"}) is None


def test_kinds_of_experts(folders: dict[str, Path]) -> None:
    for family, routers in (("mixtral", {"gate"}), ("qwen2-moe", {"gate", "shared_expert_gate"})):
        found = anatomy_of(folders[family])
        assert {layer.role for layer in found.layers if layer.kind == "router"} == routers
        experts = [layer for layer in found.layers if layer.kind == "expert"]
        assert Counter(layer.expert for layer in experts) == dict.fromkeys(range(4), 6)
        assert all(f".{layer.expert}." in layer.name for layer in experts)


def test_gpt2_is_transposed(folders: dict[str, Path]) -> None:
    found = anatomy_of(folders["gpt2"])
    shapes = {layer.name.removeprefix("transformer.h.0."): layer.shape for layer in found.layers if layer.block == 0}
    assert all(layer.transposed for layer in found.layers)
    assert shapes["attn.c_attn"] == (192, 64)
    assert shapes["mlp.c_proj"] == (64, 256)


@pytest.mark.parametrize(
    ("family", "model", "base"),
    [("gpt2", "GPT2Model", ""), ("bert", "BertModel", ""), ("opt", "OPTModel", "decoder"), ("llama", "LlamaModel", "")],
)
def test_without_prefix_and_head(family: str, model: str, base: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    found, whole = anatomy_of(make_tiny(family, tmp_path, model_class=model)), anatomy_of(folders[family])
    assert (found.family, found.base_prefix, found.head, found.tied) == (whole.family, base, None, ())
    assert len(found.layers) == len(whole.layers)


def test_old_gpt2_names_with_a_head(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints have no prefix, but their config names the model with a head."""
    edit_config(make_tiny("gpt2", tmp_path, model_class="GPT2Model"), architectures=["GPT2LMHeadModel"])
    assert anatomy_of(tmp_path).tied == (("lm_head", "wte.weight"),)


def test_head_stored_although_tied(tmp_path: Path) -> None:
    make_tiny("opt", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    found = anatomy_of(tmp_path)
    assert found.head is None
    assert found.others == ("lm_head.weight",)
    edit_config(tmp_path, tie_word_embeddings=False)
    head = anatomy_of(tmp_path).head
    assert head is not None
    assert head.name == "lm_head"


def test_post_norm_opt_has_no_ties(tmp_path: Path) -> None:
    found = anatomy_of(make_tiny("opt", tmp_path, do_layer_norm_before=False, word_embed_proj_dim=32))
    assert all(layer.norm is None for layer in found.layers)
    assert len(found.others) == 2  # project_in and project_out


def test_stacked_mixtral(folders: dict[str, Path], tmp_path: Path) -> None:
    """The layout transformers 5 keeps in memory: [experts, 2 * ffn, hidden], gate before up."""
    tensors = load_file(folders["mixtral"] / "model.safetensors")
    for block in range(2):
        prefix, target = f"model.layers.{block}.block_sparse_moe", f"model.layers.{block}.mlp"
        w1, w2, w3 = (
            torch.stack([tensors.pop(f"{prefix}.experts.{i}.w{n}.weight") for i in range(4)]) for n in (1, 2, 3)
        )
        tensors[f"{target}.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        tensors[f"{target}.experts.down_proj"] = w2.contiguous()
        tensors[f"{target}.gate.weight"] = tensors.pop(f"{prefix}.gate.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["mixtral"] / "config.json").read_bytes())
    found = anatomy_of(tmp_path)
    experts = [layer for layer in found.layers if layer.kind == "expert" and layer.block == 1]
    assert [layer.name for layer in experts[:2]] == [f"model.layers.1.mlp.experts.gate_up_proj[{i}]" for i in (0, 1)]
    assert {(layer.role, layer.shape, layer.transposed) for layer in experts} == {
        ("gate_up_proj", (256, 64), False),
        ("down_proj", (64, 128), False),
    }
    assert experts[0].fused == ("gate_proj", "up_proj")
    declared = {layer.name: (layer.shape, layer.transposed, layer.kind, layer.expert) for layer in found.layers}
    edit_config(tmp_path, model_type="unheard-of")
    inferred = anatomy_of(tmp_path)
    assert inferred.family == "structure"
    assert {n.name: (n.shape, n.transposed, n.kind, n.expert) for n in inferred.layers} == declared


@pytest.mark.parametrize(("family", "parent"), [("gpt-oss", "mlp"), ("llama4", "feed_forward")])
@pytest.mark.parametrize("ffn", [128, 64])  # 64 makes down_proj square: its orientation then follows from gate_up_proj
def test_stacked_experts_by_structure(family: str, parent: str, ffn: int, tmp_path: Path) -> None:
    import transformers

    if not hasattr(transformers, FAMILIES[family][0]):
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    found = anatomy_of(make_tiny(family, tmp_path, intermediate_size=ffn))
    experts = {layer.name: layer for layer in found.layers if layer.kind == "expert"}
    assert found.family == "structure"
    assert len(experts) == 2 * 2 * 4
    assert all(layer.transposed and layer.fused_slice for layer in experts.values())
    assert experts[f"model.layers.1.{parent}.experts.gate_up_proj[3]"].shape == (2 * ffn, 64)
    assert experts[f"model.layers.1.{parent}.experts.down_proj[3]"].shape == (64, ffn)
    assert all((layer.bias is not None) == (family == "gpt-oss") for layer in experts.values())
    assert {layer.role for layer in found.layers if layer.kind == "router"} == {"router"}
    assert found.head is not None


def test_slices_hold_what_the_model_computes_with(tmp_path: Path) -> None:
    """The expert's output, computed from slices as described, is transformers' own."""
    import transformers

    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("needs a transformers with gpt-oss")
    make_tiny("gpt-oss", tmp_path, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    with Checkpoint.open(tmp_path) as checkpoint:
        for layer in read_anatomy(checkpoint).layers:
            if layer.fused_slice and layer.block == 0:
                assert layer.expert is not None
                weight = checkpoint.rows(layer.tensor, layer.expert, layer.expert + 1)[0]
                weight = weight.T if layer.transposed else weight
                module = getattr(experts, layer.role)
                x = torch.randn(3, layer.shape[1])
                torch.testing.assert_close(x @ weight.T, x @ module[layer.expert])


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3-moe", "mixtral", "opt", "gpt2", "bert", "phi3", "gpt-neox"]
)
def test_structure_agrees_with_family_file(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders[family]
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    declared, inferred = anatomy_of(source), anatomy_of(tmp_path)
    assert (inferred.family, inferred.blocks, inferred.block_prefix) == ("structure", 2, declared.block_prefix)
    assert inferred.base_prefix == declared.base_prefix or family == "bert"  # its list is two levels deep
    assert set(inferred.embeddings) == set(declared.embeddings)
    assert inferred.embeddings[0] == declared.embeddings[0]
    assert (inferred.head and inferred.head.tensor) == (declared.head and declared.head.tensor)
    assert [pair[1] for pair in inferred.tied] == [pair[1] for pair in declared.tied]
    assert inferred.tensors == declared.tensors

    def described(found: Anatomy) -> dict[str, Any]:
        return {n.name: (n.shape, n.transposed, n.block, n.kind, n.expert, n.bias, len(n.fused)) for n in found.layers}

    def partners(found: Anatomy) -> set[frozenset[str]]:
        groups: dict[str, set[str]] = {}
        for layer in found.layers:
            if layer.kind != "router":  # a router's input cannot be told from names
                groups.setdefault(layer.input_group, set()).add(layer.name)
        return {frozenset(names) for names in groups.values()}

    assert described(inferred) == described(declared)
    assert partners(inferred) == partners(declared)


def test_encoder_and_decoder(folders: dict[str, Path]) -> None:
    found = anatomy_of(folders["t5"])
    assert found.blocks == 4
    cross = {layer.input_group: 0 for layer in found.layers if "EncDecAttention" in layer.name}
    for layer in found.layers:
        if layer.input_group in cross:
            cross[layer.input_group] += 1
    assert sorted(cross.values()) == [1, 1, 1, 1, 2, 2]  # q reads the decoder, k and v the encoder; o for itself
    assert found.embeddings == ("shared.weight",)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "shapes",
    [
        {"conv.weight": (4, 4, 3, 3), "fc.weight": (10, 4)},
        {"layers.0.norm.weight": (4,), "layers.1.norm.weight": (4,)},
        {"layers.0.conv.weight": (4, 4, 3), "layers.1.conv.weight": (4, 4, 3)},
        {"0.weight": (4, 4), "1.weight": (4, 4)},
        {"": (4, 4), ".": (4, 4), "..1..weight": (4, 4)},
    ],
)
def test_unknown_architecture(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    with Checkpoint.open(write_tensors(tmp_path, shapes)) as checkpoint:
        with pytest.raises(CheckpointError, match="StrangeNet.* is not known.*numbered list of blocks") as caught:
            read_anatomy(checkpoint)
        assert "\n" not in str(caught.value)


def test_vision_tower_is_left_alone(tmp_path: Path) -> None:
    shapes = {f"vision.layers.{i}.attn.q_proj.weight": (64, 64) for i in range(3)}
    shapes |= {f"language.layers.{i}.attn.q_proj.weight": (16, 16) for i in range(2)}
    found = anatomy_of(write_tensors(tmp_path, shapes))
    assert {layer.name for layer in found.layers} == {f"language.layers.{i}.attn.q_proj" for i in range(2)}
    assert len(found.others) == 3


def test_blocks_beyond_the_config_are_left_alone(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    edit_config(tmp_path, num_hidden_layers=1)
    for _ in range(2):
        found = anatomy_of(tmp_path)
        assert (found.blocks, len(found.layers), len(found.others)) == (1, 7, 7)
        edit_config(tmp_path, model_type="unheard-of")


@settings(max_examples=300, deadline=None)
@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=10),
    model_type=st.sampled_from(["llama", "mixtral", "gpt2", "strange"]),
    hidden=st.sampled_from([2, 3, None]),
)
@example(
    shapes={"model.layers.1.mlp.experts.1.up_proj.weight": [], "layers.1.mlp.experts.0.model": []},
    model_type="llama",
    hidden=2,
)
def test_any_names_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], model_type: str, hidden: int | None
) -> None:
    folder = tmp_path_factory.getbasetemp() / "invented"
    folder.mkdir(exist_ok=True)
    write_tensors(folder, {k: tuple(v) for k, v in shapes.items()}, model_type=model_type, hidden_size=hidden)
    try:
        opened = Checkpoint.open(folder)
    except CheckpointError as error:
        if "are stored with different prefixes" in str(error):  # all about names that is refused this early
            return
        raise
    with opened as checkpoint:
        try:
            found = read_anatomy(checkpoint)
        except CheckpointError:
            return
        assert sorted(found.tensors) == sorted(checkpoint.names)
        check_partition(found, checkpoint, sound=False)
        assert found.layers


def test_incomplete_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.1." not in k}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="no weights for model.layers.1"):
        read_anatomy(checkpoint)


def test_packed_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"up_proj.*U8 \[4\]"):
        read_anatomy(checkpoint)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": None, "n_layer": [2]},
        {"architectures": {"a": 1}},
        {"architectures": [1, None]},
        {"tie_word_embeddings": "yes"},
        {"vocab_size": "256"},
        {"text_config": 3},
        {"model_type": None, "text_config": {"vocab_size": {}}},
    ],
)
def test_nonsense_in_config(config: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    """A config.json with values of wrong types neither crashes nor changes the linear layers."""
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    edit_config(tmp_path, **config)
    assert len(anatomy_of(tmp_path).layers) == 14


def test_producers(folders: dict[str, Path]) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        layers = {layer.name: layer for layer in anatomy_of(folders[family]).layers}
        for layer in layers.values():
            role = {"o_proj": "v_proj", "down_proj": "up_proj"}.get(layer.role)
            assert (layer.producer is None) == (role is None)
            if layer.producer:
                producer = layers[layer.producer]
                assert (producer.role, producer.block) == (role, layer.block)
                assert layer.shape[1] % producer.shape[0] == 0
    assert all(layer.producer is None for layer in anatomy_of(folders["opt"]).layers)
