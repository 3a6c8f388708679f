"""Is a checkpoint the model that its config.json describes? What is missing is refused by name, before and at loading;
and nothing is refused that transformers loads rightly."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight
from featherweight.errors import CheckpointError, FeatherWarning
from featherweight.methods.recipe import load_recipe
from featherweight.model.network.accounting import check_complete
from featherweight.storage.checkpoint.accounting import is_whole
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.plan import make_plan
from models import FAMILIES, VOCABULARY, make_tiny

Tensors = dict[str, Tensor]
Make = Callable[..., Path]
KNOWN_TYPES = [family for family in FAMILIES if family != "qwen3-moe"]  # 4.x does not store its num_experts
V4 = int(transformers.__version__.split(".")[0]) < 5
IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            made[family] = make_tiny(family, folder, **({"num_local_experts": 4} if family == "qwen3-moe" else {}))
        return made[family]

    return get


@pytest.fixture
def make(originals: Callable[[str], Path], tmp_path: Path) -> Make:
    """A changed copy of a tiny model."""

    def changed(family: str, change: Callable[[Tensors], Any] | None = None, **config: Any) -> Path:
        folder = Path(shutil.copytree(originals(family), tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            tensors = change(tensors) or tensors
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        stored = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not ...}))
        return folder

    return changed


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def refused(folder: Path, words: str) -> None:
    """By all that reads a model: plan (and so compress), load (and so eval and generate), verify."""
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=words) as planning:
        make_plan(checkpoint, load_recipe("rtn-8"))
    assert "\n" not in str(planning.value)
    with pytest.raises(CheckpointError, match=words):
        featherweight.load(folder)
    assert any(str(planning.value) == problem for problem in verify(folder).problems)


def accepted(folder: Path, words: str = "") -> Any:
    """The same, with a note if `words` are given and without one if not; the loaded model."""
    with Checkpoint.open(folder) as checkpoint:
        notes = make_plan(checkpoint, load_recipe("rtn-8")).notes
    assert words in " ".join(notes)
    assert bool(words) == bool(notes), notes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FeatherWarning)
        model, _ = featherweight.load(folder)
    said = [str(w.message) for w in caught if issubclass(w.category, FeatherWarning)]
    assert words in " ".join(said)
    assert verify(folder).whole
    return model


@pytest.mark.parametrize("family", KNOWN_TYPES)
def test_every_family_is_accounted_for(originals: Callable[[str], Path], family: str) -> None:
    with Checkpoint.open(originals(family)) as checkpoint:
        verdict = check_complete(checkpoint)
        assert (verdict.notes, verdict.unexpected) == ((), ())
        assert is_whole(checkpoint) == (family in ("llama", "mistral", "qwen2", "qwen3", "gpt2"))


@pytest.mark.parametrize("family", KNOWN_TYPES)
def test_a_missing_tensor_of_every_family_is_named(make: Make, family: str) -> None:
    folder = make(family)
    names = [name for name in load_file(folder / "model.safetensors") if ".1." in name and "norm" not in name.lower()]
    for name in (names[0], names[-1]):
        lost = make(family, without(name))
        with Checkpoint.open(lost) as checkpoint, pytest.raises(CheckpointError, match="lacks .* config.json asks for"):
            check_complete(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_whatever_is_missing_is_refused_everywhere(make: Make, name: str) -> None:
    refused(make("llama", without(name)), f"lacks {name}, which config.json asks for: download it again")


def test_many_missing_tensors_are_counted(make: Make) -> None:
    refused(make("llama", without("layers.1.")), "lacks .*input_layernorm.weight, .* and 6 more")
    refused(make("llama", attention_bias=True), "lacks model.layers.0.self_attn.k_proj.bias, .* and 5 more")


@pytest.mark.parametrize("lost", ["experts.3.", "experts.1.", "experts.1.gate_proj", "experts.2.down_proj"])
def test_a_missing_expert_is_named(make: Make, lost: str) -> None:
    folder = make("qwen2-moe", without(f"layers.1.mlp.{lost}"))
    refused(folder, rf"lacks model\.layers\.1\.mlp\.{lost.replace('.', chr(92) + '.')}")


def test_a_missing_expert_of_an_unknown_class_is_named(make: Make) -> None:
    folder = make(
        "qwen2-moe", without("layers.1.mlp.experts.1."), model_type="novel", architectures=["NovelForCausalLM"]
    )
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=r"lacks .*experts\.1\."):
        make_plan(checkpoint, load_recipe("rtn-8"))


def test_shapes_that_contradict_the_config_are_refused(make: Make) -> None:
    refused(make("llama", num_key_value_heads=4), r"holds .*k_proj.weight as \[32, 64\], but .* has it as \[64, 64\]")
    refused(make("gpt2", n_inner=128), r"holds .*mlp.c_fc.* as ")
    refused(make("bert", vocab_size=300), r"holds .* as \[256.*as \[300")


def as_fp8(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".scale")] = torch.ones(1, 1)


def as_int8(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].mul(50).to(torch.int8)
        tensors[f"{name}_scale"] = torch.ones(1)


def as_gptq(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{module}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.ones(1, rows)


@pytest.mark.parametrize("change", [as_fp8, as_int8, as_gptq])
def test_codes_without_a_quantization_config_are_refused(make: Make, change: Callable[[Tensors], None]) -> None:
    from featherweight.model.decoder.model import NativeModel

    folder = make("llama", change)
    refused(folder, "holds the codes of a quantised model .* config.json names no quantization_config")
    with pytest.raises(CheckpointError, match="codes of a quantised model"):
        NativeModel.open(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "novel"}, "'novel', which the installed transformers does not know"),
        ({"bits": 4}, "names no quant_method"),
    ],
)
def test_other_tools_models_load_or_say_why_not(make: Make, settings: dict[str, Any], words: str) -> None:
    folder = make("llama", as_gptq, quantization_config=settings)
    with pytest.raises(CheckpointError, match=words):
        featherweight.load(folder)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="is quantised already"):
        make_plan(checkpoint, load_recipe("rtn-8"))


def test_a_gptq_folder_is_read_or_said_why_not(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    with pytest.raises(CheckpointError, match=r"has scales of 1 groups, where 128 inputs in groups of 64 have 2"):
        featherweight.load(make("llama", as_gptq, quantization_config=settings))
    model, _ = featherweight.load(make("llama", as_gptq, quantization_config=settings | {"group_size": -1}))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight.float(), -torch.ones(64, 128))  # q is 0, z is 1
    assert model(IDS).logits.isfinite().all()


def test_a_method_nobody_knows_over_plain_weights_is_skipped_as_in_transformers(make: Make, tmp_path: Path) -> None:
    """In loading, compressing and the native decoder alike, with a word about it; missing tensors still count."""
    from featherweight.model.decoder.model import NativeModel

    plain, named = make("llama"), make("llama", quantization_config={"quant_method": "novel", "bits": 4})
    expected = transformers.AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)(IDS).logits
    with pytest.warns(FeatherWarning, match="names the quant_method 'novel'.*read as the model's weights"):
        model, _ = featherweight.load(named, dtype="float32")
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(NativeModel.open(named).forward([3, 4]), NativeModel.open(plain).forward([3, 4]))
    featherweight.compress(named, "rtn-8", tmp_path / "coded")
    assert json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]["recipe"]
    lacking = make("llama", without("layers.0.self_attn.q_proj"), quantization_config={"quant_method": "novel"})
    refused(lacking, "lacks model.layers.0.self_attn.q_proj.weight")


def test_a_quantization_config_that_says_nothing(make: Make) -> None:
    for empty in ({}, None):
        accepted(make("llama", quantization_config=empty))


def test_a_class_of_another_type_is_the_one_asked(make: Make) -> None:
    """As in loading, where the class that is named reads config.json."""
    folder = make("qwen3", without("layers.0.self_attn.q_proj"), architectures=["LlamaForCausalLM"])
    refused(folder, "lacks model.layers.0.self_attn.q_proj.weight")


def test_integer_biases_are_codes_too(make: Make) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    refused(make("qwen2", lambda t: t.update({name: t[name].to(torch.uint8)})), rf"codes of a quantised model \({name}")


def test_an_unmerged_adapter_is_refused(make: Make) -> None:
    def wrap(tensors: Tensors) -> None:
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        tensors[f"{name}.lora_A.default.weight"] = torch.zeros(4, 64)
        tensors[f"{name}.lora_B.default.weight"] = torch.zeros(64, 4)

    refused(make("llama", wrap), "holds an adapter that is not merged into its model")
    refused(
        make("llama", lambda t: {f"base_model.model.{k}": v for k, v in (wrap(t), t)[1].items()}), "adapter that is not"
    )


def test_a_declared_family_under_other_names_is_not_taken_for_another(make: Make) -> None:
    from featherweight.storage.checkpoint.anatomy import read_anatomy

    folder = make("llama", renamed(lambda name: name.replace("model.layers", "decoder.stack")))
    refused(folder, "lacks model.layers.0")
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match="blocks begin with model.layers.0"),
    ):
        read_anatomy(checkpoint)


# What transformers loads rightly -------------------------------------------------------------------------------------


def test_a_base_prefix_more_or_less(make: Make, originals: Callable[[str], Path]) -> None:
    with_head = [] if V4 else [("llama", "model.")]  # 4.x calls a head beside a base model without prefix corrupted
    for family, prefix in [("gpt2", "transformer."), ("opt", "model."), *with_head]:
        whole = featherweight.load(originals(family))[0](IDS).logits
        fewer = make(family, renamed(lambda name, prefix=prefix: name.removeprefix(prefix)))
        assert torch.equal(accepted(fewer)(IDS).logits, whole)
    base = make("llama", lambda t: renamed(lambda n: n.removeprefix("model."))(without("lm_head")(t)))
    stored = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (base / "config.json").write_text(json.dumps(stored))
    assert accepted(base)(IDS).last_hidden_state.shape == (1, 4, 64)


def test_encoders_without_head_or_pooler(make: Make) -> None:
    def encoder(tensors: Tensors) -> Tensors:
        return renamed(lambda name: name.removeprefix("bert."))(without("cls.")(tensors))

    accepted(make("bert", encoder, architectures=["BertModel"]), "lacks pooler.dense.bias, pooler.dense.weight")
    with Checkpoint.open(make("bert", encoder, architectures=...)) as checkpoint:
        check_complete(checkpoint)
    refused(make("bert", without("cls.")), "lacks cls.predictions")


def test_old_names_buffers_and_surplus(make: Make) -> None:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def gammas(name: str) -> str:
        return next((name.replace(a, b) for a, b in old.items() if name.endswith(a)), name)

    accepted(make("bert", renamed(gammas)))
    accepted(make("llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool)}
    accepted(make("gpt2", lambda t: t.update(mask | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})))
    more = {"model.layers.2.mlp.up_proj.weight": torch.ones(8, 8)}  # a block for multi-token prediction
    accepted(make("llama", lambda t: t.update(more)), "holds model.layers.2.mlp.up_proj.weight, which LlamaForCausalLM")
    other = {"cls.seq_relationship.weight": torch.ones(2, 64)}
    accepted(make("bert", lambda t: t.update(other)), "holds cls.seq_relationship.weight")


def test_tied_heads(make: Make) -> None:
    accepted(make("llama", without("lm_head"), tie_word_embeddings=True))
    copied = {"lm_head.weight": "model.embed_tokens.weight"}
    accepted(make("llama", lambda t: t.update({a: t[b].clone() for a, b in copied.items()}), tie_word_embeddings=True))


@pytest.mark.skipif(V4, reason="transformers 4 ties the other way only")
def test_a_tied_embedding_stored_as_the_head(make: Make) -> None:
    folder = make("llama", without("embed_tokens"), tie_word_embeddings=True)
    model = accepted(folder)
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.get_input_embeddings().weight, stored)


def test_families_known_to_transformers_alone(tmp_path: Path) -> None:
    settings = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
    kinds: dict[str, Any] = {
        "MambaForCausalLM": transformers.MambaConfig(**settings, state_size=8),
        "BloomForCausalLM": transformers.BloomConfig(**settings, n_head=4),
        "DistilBertModel": transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4),
    }
    for name, config in kinds.items():
        folder = tmp_path / name
        getattr(transformers, name)(config).save_pretrained(folder)
        accepted(folder)
        tensors = load_file(folder / "model.safetensors")
        lost = next(key for key in tensors if ".1." in key)
        save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
        refused(folder, f"lacks .*{lost.rpartition('.')[0]}")


def test_an_unknown_class_is_said_not_to_be_checked(make: Make) -> None:
    folder = make("llama", model_type="novel", architectures=["NovelForCausalLM"])
    with Checkpoint.open(folder) as checkpoint:
        (note,) = check_complete(checkpoint).notes
    assert "does not know the model" in note
    assert "nobody checked whether tensors are missing" in note


def test_a_config_that_transformers_cannot_read(make: Make) -> None:
    """What is missing is told all the same, as far as the family's list goes."""
    odd = {"rope_scaling": {"rope_type": "novel", "factor": 2.0}, "hidden_act": 7}
    folder = make("llama", without("layers.1.mlp.up_proj"), **odd)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.mlp\.up_proj"),
    ):
        make_plan(checkpoint, load_recipe("rtn-8"))


def test_only_headers_are_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    for name in ("tensor", "rows", "raw_windows"):
        monkeypatch.setattr(SafetensorsFile, name, read)
    for family in ("llama", "qwen2-moe"):
        with Checkpoint.open(make(family)) as checkpoint:
            check_complete(checkpoint)


def test_without_accelerate(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from featherweight.model.network import accounting

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else find(name, *a))
    seen = []
    monkeypatch.setattr(accounting, "is_whole", lambda checkpoint: seen.append(1))
    with Checkpoint.open(make("llama")) as checkpoint:
        assert check_complete(checkpoint).notes == ()
    assert seen
