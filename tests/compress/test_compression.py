"""Every tensor accounted for, in every layout; figures that say what the files hold; options that change no byte."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

import featherweight
from featherweight.errors import FeatherError, NonFiniteError, RecipeError
from featherweight.methods.recipe import load_recipe, presets, recipe_from
from featherweight.storage.checkpoint.anatomy import LinearLayer, read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.checkpoint.size import measure_size
from featherweight.storage.codes import code_from, code_layout
from featherweight.system.units import parse_size
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress import plan as plan_module
from featherweight.tasks.compress.compression import Compression, compress
from featherweight.tasks.compress.plan import make_plan
from outputs import contents

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tokenizer": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama sharded": ("llama", {"shard_size": "60KB"}),
    "llama float32": ("llama", {"dtype": torch.float32}),
    "llama float16": ("llama", {"dtype": torch.float16}),
    "gpt2 transposed": ("gpt2", {}),
    "bert": ("bert", {}),
    "mixtral": ("mixtral", {}),
    "qwen3-moe": ("qwen3-moe", {}),
    "gpt-oss stacked": ("gpt-oss", {"dtype": torch.float32}),
    "phi3 fused": ("phi3", {}),
    "opt": ("opt", {}),
    "gpt-neox": ("gpt-neox", {}),
    "t5 by structure": ("t5", {}),
    "odd widths": ("llama", {"hidden_size": 60, "intermediate_size": 100}),
}


def read_all(folder: Path) -> dict[str, Tensor]:
    """All tensors, by the library of the format itself."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def original_weight(tensors: dict[str, Tensor], layer: LinearLayer) -> Tensor:
    weight = tensors[layer.tensor]
    if layer.fused_slice:
        assert layer.expert is not None
        weight = weight[layer.expert]
    return (weight.T if layer.transposed else weight).float()


def check(model: Path, result: Compression) -> dict[str, Any]:
    """What must hold for any output; returns its config.json."""
    out = result.out
    source, stored = read_all(model), read_all(out)
    config = json.loads((out / "config.json").read_text())
    specs = module_specs(config["quantization_config"])
    with Checkpoint.open(model) as checkpoint:
        anatomy = read_anatomy(checkpoint)
    layers = {layer.name: layer for layer in (*anatomy.layers, *([anatomy.head] if anatomy.head else []))}
    replaced = {layers[name].tensor for name in specs}
    # nothing is lost: every source tensor is there unchanged, or its whole place is taken by codes
    for name, tensor in source.items():
        if name not in replaced:
            assert stored[name].dtype == tensor.dtype
            assert stored[name].shape == tensor.shape
            assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8))
    for tensor in replaced:
        parts = [layer.parameters for layer in layers.values() if layer.tensor == tensor and layer.name in specs]
        assert sum(parts) == source[tensor].numel()
        assert tensor not in stored or f"{tensor}".removesuffix(".weight") in specs
    codes = {f"{module}.{name}" for module, spec in specs.items() for name in code_layout(spec)}
    assert stored.keys() == codes | (source.keys() - replaced)
    # the account in the manifest
    manifest = json.loads((out / "featherweight.json").read_text())
    counts = manifest["tensors"]
    assert counts == result.tensors
    assert counts["source"] == len(source) == counts["replaced"] + counts["copied"] + len(counts["dropped"])
    assert counts["replaced"] == len(replaced)
    nbytes = {name: tensor.numel() * tensor.element_size() for name, tensor in stored.items()}
    assert manifest["bytes"] == result.bytes == sum(nbytes.values())
    assert manifest["parameters"] == sum(tensor.numel() for tensor in source.values())
    assert math.isclose(result.bits_per_weight_model, 8 * sum(nbytes.values()) / manifest["parameters"])
    assert [record["name"] for record in result.layers] == [name for name in layers if name in specs]
    # every figure of a layer, from the files
    for record in result.layers:
        name, spec = record["name"], record["spec"]
        assert specs[name] == spec
        tensors = {part: stored[f"{name}.{part}"] for part in code_layout(spec)}
        weight = original_weight(source, layers[name]).double()
        missed = torch.linalg.norm(code_from(spec, tensors).decode().double() - weight) / torch.linalg.norm(weight)
        assert math.isclose(record["relative_error"], float(missed), rel_tol=1e-9)
        assert record["nbytes"] == sum(nbytes[f"{name}.{part}"] for part in tensors)
        assert math.isclose(record["bits_per_weight"], 8 * record["nbytes"] / weight.numel())
    check_files(out, set(stored))
    return dict(config)


def check_files(out: Path, names: set[str]) -> None:
    """Aligned, complete, indexed, hashed."""
    index = out / "model.safetensors.index.json"
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert index.exists() == (len(files) > 1)
    with Checkpoint.open(out) as checkpoint:
        for file in checkpoint.files:
            for entry in file.entries.values():
                assert entry.start % entry.torch_dtype.itemsize == 0
        if index.exists():
            listed = json.loads(index.read_text())
            assert listed["metadata"]["total_size"] == checkpoint.total_bytes
            assert listed["weight_map"] == {n: checkpoint.file_of(n).path.name for n in checkpoint.names}
            assert sorted(set(listed["weight_map"].values())) == files
    verification = verify(out)
    assert verification.problems == []
    assert verification.hashed == verification.tensors == len(names)


@pytest.mark.parametrize("recipe", ["ptqtp", "rtn-4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_accounted_for(tiny: Any, tmp_path: Path, name: str, recipe: str) -> None:
    family, settings = MODELS[name]
    model = tiny(family, **settings)
    options: dict[str, Any] = {"shard_bytes": 50_000} if recipe == "ptqtp" else {}
    result = compress(model, recipe, tmp_path / "out", changes=["grid.group_size=48"], threads=1, **options)
    config = check(model, result)
    original = json.loads((model / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == original
    others = {p.name for p in model.iterdir() if p.suffix != ".safetensors" and not p.name.endswith(".index.json")}
    assert others <= {p.name for p in (tmp_path / "out").iterdir()}
    for path in others - {"config.json"}:
        assert (tmp_path / "out" / path).read_bytes() == (model / path).read_bytes()


@pytest.mark.parametrize("name", ["llama", "llama tied", "mixtral", "gpt-oss stacked"])
def test_plan_inspection_and_measured_size_agree_with_the_result(tiny: Any, tmp_path: Path, name: str) -> None:
    family, settings = MODELS[name]
    model = tiny(family, **settings)
    with Checkpoint.open(model) as checkpoint:
        summary = make_plan(checkpoint, load_recipe("ptqtp")).summary()
    result = compress(model, "ptqtp", tmp_path / "out", threads=1)
    assert summary["output_bytes"] == result.bytes
    assert summary["weights"] == result.weights
    assert math.isclose(summary["bits_per_weight"], result.bits_per_weight)
    inspected, size = inspect_folder(result.out), measure_size(result.out)
    assert inspected["bytes"] == result.bytes
    assert [row["relative_error"] for row in inspected["layers"]] == [row["relative_error"] for row in result.layers]
    assert math.isclose(inspected["bits_per_weight"]["model"], result.bits_per_weight_model)
    assert size.linear_bits is not None
    assert math.isclose(size.linear_bits, result.bits_per_weight_linear)


# Selections.


def test_head_of_an_untied_model(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=True)
    result = compress(model, "rtn-4", tmp_path / "out", changes=["layers.head=true"])
    check(model, result)
    assert result.layers[-1]["name"] == "lm_head"
    size = measure_size(result.out)
    assert size.linear_bits is not None
    assert math.isclose(size.linear_bits, result.bits_per_weight_linear)  # the head is not among the blocks' layers
    loaded, _ = featherweight.load(result.out, dtype="float32")
    assert loaded(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_head_of_a_model_without_one_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="layers.head is set, but this model has no output layer"):
        compress(tiny("llama", model_class="LlamaModel"), "rtn-4", tmp_path / "out", changes=["layers.head=true"])


def test_skipped_layers_are_copied(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=True)
    changes = ["layers.skip=[q_proj, model.layers.1.*, mlp]"]
    result = compress(model, "rtn-4", tmp_path / "out", changes=changes)
    check(model, result)
    assert [r["name"].removeprefix("model.layers.0.self_attn.") for r in result.layers] == [
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert result.bits_per_weight < 8 < result.bits_per_weight_linear < 16


def test_included_layers_alone(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=True)
    result = compress(model, "rtn-4", tmp_path / "out", changes=["layers.include=['*.1.mlp.down_proj']"])
    check(model, result)
    assert [r["name"] for r in result.layers] == ["model.layers.1.mlp.down_proj"]


def test_overrides_give_roles_their_own_grids(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=True)
    overrides = [
        {"match": "down_proj", "grid": {"planes": 3}},
        {"match": "*.0.self_attn.*", "grid": {"kind": "uniform", "bits": 8, "symmetric": True, "group_size": 32}},
        {"match": "gate_proj", "grid": {"kind": "dense"}},
    ]
    recipe = recipe_from({"name": "mixed", "grid": {"kind": "trit-planes"}, "overrides": overrides}, "mixed")
    result = compress(model, recipe, tmp_path / "out")
    check(model, result)
    codes = {r["name"]: r["code"] for r in result.layers}
    assert codes["model.layers.1.mlp.down_proj"] == "3 trit-planes g128"
    assert codes["model.layers.0.self_attn.q_proj"] == "8 bit symmetric g32"
    assert codes["model.layers.1.self_attn.q_proj"] == "2 trit-planes g128"
    assert codes["model.layers.0.mlp.gate_proj"] == "dense bfloat16"
    dense = [r for r in result.layers if r["code"] == "dense bfloat16"]
    assert [r["relative_error"] for r in dense] == [0.0, 0.0]


def test_stacked_experts_skipped_in_part(tiny: Any, tmp_path: Path) -> None:
    """A 3-D tensor of which some slices are compressed cannot be copied: the others stay dense, slice by slice."""
    model = tiny("gpt-oss", dtype=torch.float32)
    skip = "model.layers.0.mlp.experts.down_proj[1]"
    result = compress(model, "rtn-4", tmp_path / "out", changes=[f"layers.skip=['{skip}', '*gate_up_proj[[]2]']"])
    check(model, result)
    codes = {r["name"]: (r["code"], r["relative_error"]) for r in result.layers}
    assert codes[skip] == ("dense float32", 0.0)
    assert codes["model.layers.1.mlp.experts.gate_up_proj[2]"] == ("dense float32", 0.0)
    assert codes["model.layers.0.mlp.experts.down_proj[0]"][0].startswith("4 bit")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["layers.skip=[q_prj]"], r"'q_prj' in layers.skip matches no layer .*did you mean 'q_proj'\?"),
        (["layers.include=[nothing]"], "'nothing' in layers.include matches no layer"),
        (["layers.skip=['*']"], "leave no layer to compress"),
        (["overrides=[{match: upp_proj, grid: {}}]"], "'upp_proj' in overrides.match matches no layer"),
        (["overrides=[{match: up_proj, grid: {bitts: 3}}]"], r"overrides\[0\].grid.bitts \(did you mean 'bits'\?\)"),
        (["overrides=[{match: up_proj, grid: {kind: unform}}]"], "did you mean 'uniform'"),
        (["overrides=[{match: up_proj, grid: {1: 2}}]"], "overrides"),
    ],
)
def test_selections_that_match_nothing(tiny: Any, tmp_path: Path, changes: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        compress(tiny("llama", tokenizer=True), "rtn-4", tmp_path / "out", changes=changes)
    assert list(tmp_path.iterdir()) == []


# Options that must not change a byte.


@pytest.fixture(scope="module")
def wide(tiny: Any) -> Path:
    """One block with matrices of several windows, and large enough for torch to use threads."""
    return tiny("llama", num_hidden_layers=1, hidden_size=512, intermediate_size=768, vocab_size=64)


@pytest.mark.parametrize(
    ("recipe", "changes"), [("ptqtp", []), ("rtn-4", []), ("rtn-3", ["grid.clip=mse", "grid.clip_steps=4"])]
)
def test_threads_and_windows_change_no_byte(
    wide: Path, tmp_path: Path, recipe: str, changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(wide, recipe, tmp_path / "one", threads=1, changes=changes)
    compress(wide, recipe, tmp_path / "two", threads=2, changes=changes)
    monkeypatch.setattr(plan_module, "WINDOWS", (1 << 17,))
    compress(wide, recipe, tmp_path / "windows", threads=1, changes=changes, max_memory="64GB")
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == expected
    assert contents(tmp_path / "windows") == expected


def test_max_memory_chooses_windows(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "resident_bytes", lambda: 0)
    monkeypatch.setattr(plan_module, "COPY_WINDOW", 0)
    with Checkpoint.open(wide) as checkpoint:
        free = make_plan(checkpoint, load_recipe("rtn-4"))
        narrow = dataclasses.replace(free, options=free.options.model_copy(update={"window_bytes": 1 << 18}))
        limit = (narrow.memory_bytes() + free.memory_bytes()) // 2
        chosen = make_plan(checkpoint, load_recipe("rtn-4"), None, limit)
        assert chosen.options.window_bytes < free.options.window_bytes
        assert chosen.memory_bytes() <= limit
        with pytest.raises(FeatherError, match=r"--max-memory 1 kB is too little: layer model\.layers\.0\..* needs"):
            make_plan(checkpoint, load_recipe("rtn-4"), None, 1000)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("800 MB", 8 * 10**8), ("1.5GiB", 3 << 29), ("1024", 1024), ("3k", 3000), ("1TB", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1XB", "1e9", "nan", "2 GB 3", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(FeatherError, match="is not a size"):
        parse_size(text)


# Recipes.


@pytest.mark.parametrize("name", presets())
def test_dumped_recipes_read_back(name: str) -> None:
    recipe = load_recipe(name)
    again = recipe_from(json.loads(json.dumps(recipe.dump())), "dump")
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_a_changed_recipe_reads_back() -> None:
    changes = [
        "layers.skip=[q_proj]",
        "layers.head=true",
        "overrides=[{match: down_proj, grid: {planes: 3}}]",
        "grid.tolerance=1e-5",
        "grid.packing=2bit",
    ]
    recipe = load_recipe("ptqtp", changes)
    assert recipe.grid.settings()["tolerance"] == 1e-5
    assert load_recipe(recipe) is recipe
    assert recipe_from(json.loads(json.dumps(recipe.dump())), "dump") == recipe
    assert load_recipe(recipe, ["grid.planes=1"]).grid.settings()["planes"] == 1


# Weights that cannot be compressed.


def with_tensor(model: Path, folder: Path, name: str, change: Any) -> Path:
    """A copy of a one-shard model with a changed tensor."""
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = read_all(model)
    tensors[name] = change(tensors[name].clone())
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "name", "index"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", [3, 5]),
        ("llama", "model.embed_tokens.weight", [200, 7]),
        ("llama", "model.norm.weight", [9]),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", [2, 100]),
        ("gpt-oss", "model.layers.0.mlp.experts.down_proj", [3, 1, 2]),
        ("gpt-oss", "model.layers.1.mlp.experts.gate_up_proj_bias", [3, 1]),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_not_finite_weights_are_named_as_they_are_stored(
    tiny: Any, tmp_path: Path, family: str, name: str, index: list[int], value: str
) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        tensor[tuple(index)] = float(value)
        return tensor

    model = with_tensor(tiny(family), tmp_path / "model", name, spoil)
    with pytest.raises(NonFiniteError) as raised:
        compress(model, "rtn-4", tmp_path / "out")
    assert f"tensor {name} holds {value} at index {index}:" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_repaired_tensor_lets_the_run_go_on(tiny: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    original = tiny("llama")

    def spoil(tensor: Tensor) -> Tensor:
        tensor[3, 5] = math.nan
        return tensor

    model = with_tensor(original, tmp_path / "model", name, spoil)
    with pytest.raises(NonFiniteError):
        compress(model, "rtn-4", tmp_path / "out")
    repaired = with_tensor(original, tmp_path / "repaired", name, lambda tensor: tensor)
    (model / "model.safetensors").write_bytes((repaired / "model.safetensors").read_bytes())
    assert compress(model, "rtn-4", tmp_path / "out").resumed > 0
    check(model, compress(model, "rtn-4", tmp_path / "out"))


@pytest.mark.parametrize("grid", ["uniform", "trit-planes", "dense"])
def test_weights_beyond_the_stored_type(tiny: Any, tmp_path: Path, grid: str) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model = with_tensor(tiny("llama"), tmp_path / "model", name, lambda tensor: tensor * 1e9)
    setting = {"dtype": "float16"} if grid == "dense" else {"scale_dtype": "float16"}
    recipe = recipe_from({"name": "narrow", "grid": {"kind": grid, **setting}}, "narrow")
    with pytest.raises(RecipeError, match=r"layer model\.layers\.0\.self_attn\.q_proj"):
        compress(model, recipe, tmp_path / "out")
    if grid != "dense":
        check(model, compress(model, "rtn-4" if grid == "uniform" else "ptqtp", tmp_path / "out"))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, -7e4])
@pytest.mark.parametrize("recipe", ["ptqtp", "rtn-4", "rtn-3-mse"])
def test_constant_layers(tiny: Any, tmp_path: Path, value: float, recipe: str) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    model = with_tensor(tiny("llama"), tmp_path / "model", name, lambda tensor: torch.full_like(tensor, value))
    result = compress(model, recipe, tmp_path / "out")
    if value == 0:
        assert result.layers[0]["relative_error"] == 0
    assert result.layers[0]["relative_error"] < 1e-3


def test_the_python_interface_works_more_than_once(tiny: Any, tmp_path: Path) -> None:
    """Importing the package `featherweight.tasks.compress` must not hide the function of that name."""
    for _ in range(2):
        assert featherweight.compress(tiny("llama"), "rtn-4", tmp_path / "out").out == tmp_path / "out"
