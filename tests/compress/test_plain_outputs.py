"""Outputs in which nothing is coded are checkpoints like any other: for every reader, and as a source again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featherweight.errors import OutputError
from featherweight.methods.recipe import load_recipe, recipe_from
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_specs, quantization_config
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import Compression, compress
from featherweight.tasks.compress.plain import with_true_dtype
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.evaluate.evaluation import evaluate
from outputs import Stop, assert_only_output, contents, stopping

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied, sharded": ("llama", {"tie_word_embeddings": True, "shard_size": "60KB"}),
    "gpt2 transposed": ("gpt2", {}),
    "gpt-oss stacked and transposed": ("gpt-oss", {}),
    "qwen3-moe": ("qwen3-moe", {}),
    "bert": ("bert", {}),
}


def plainly(model: Path, out: Path, dtype: str, recipe: str = "rtn-8", **options: Any) -> Compression:
    grid = f"grid={{kind: dense, dtype: {dtype}}}"
    return compress(model, recipe, out, changes=[grid, *options.pop("changes", ())], threads=1, **options)


def read_all(folder: Path) -> dict[str, Tensor]:
    """All tensors, by the library of the format itself."""
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t)
        for n, t in expected.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_there_in_its_own_layout(tiny: Any, tmp_path: Path, family: str) -> None:
    name, settings = FAMILIES[family]
    model, out = tiny(name, dtype=torch.float32, **settings), tmp_path / "out"
    result = plainly(model, out, "float32", shard_bytes=100_000)
    source = read_all(model)
    assert same(read_all(out), source)
    assert config_of(out) == config_of(model)
    assert len(list(out.glob("*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == source.keys()
    assert sum(result.fates.values()) == len(source) == result.tensors["source"]
    assert result.fates["changed"] == len(result.tensors["changed"]) > 0
    assert result.fates["replaced"] == result.fates["dropped"] == 0
    assert set(result.tensors["changed"]) <= source.keys()
    found = verify(out)
    assert found.whole
    assert found.hashed == found.tensors == len(source)


def test_the_type_is_that_of_the_grid_and_said_truly(tiny: Any, tmp_path: Path) -> None:
    half, single = tiny("llama"), tiny("llama", dtype=torch.float32)
    plainly(single, tmp_path / "mixed", "bfloat16")
    with Checkpoint.open(single) as checkpoint:
        changed = {job.layer.tensor for job in make_plan(checkpoint, load_recipe("rtn-4")).jobs}
    expected = {n: t.to(torch.bfloat16) if n in changed else t for n, t in read_all(single).items()}
    assert same(read_all(tmp_path / "mixed"), expected)
    assert config_of(tmp_path / "mixed") == config_of(single), "float32 holds all of them"
    plainly(half, tmp_path / "wider", "float32")
    field = "dtype" if "dtype" in config_of(half) else "torch_dtype"
    assert config_of(half)[field] == "bfloat16"
    assert config_of(tmp_path / "wider") == config_of(half) | {field: "float32"}
    plainly(half, tmp_path / "same", "bfloat16")
    assert config_of(tmp_path / "same") == config_of(half)
    assert same(read_all(tmp_path / "same"), read_all(half))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([torch.float16, torch.bfloat16], "float32"),
        ([torch.float16, torch.int64], "float16"),
        ([torch.bfloat16, torch.float64], "float64"),
        ([torch.int8], None),
    ],
)
def test_the_type_that_holds_every_value(stored: list[torch.dtype], expected: str | None) -> None:
    config = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "n": 1}, "rope": {"dtype": "bfloat16"}}
    found = with_true_dtype(config, stored)
    wanted = expected or "bfloat16"
    assert found == {"torch_dtype": wanted, "text_config": {"dtype": wanted, "n": 1}, "rope": {"dtype": "bfloat16"}}
    assert with_true_dtype({"text_config": {}, "dtype": None}, stored) == {"text_config": {}, "dtype": None}


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    plainly(llama, out, "bfloat16")
    return out


def test_every_reader_takes_it_for_the_original(llama: Path, plain: Path) -> None:
    import transformers

    ids = torch.arange(3, 40)[None]
    read = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        logits = [read(folder, dtype="auto")(ids).logits for folder in (llama, plain)]
    assert logits[0].dtype == torch.bfloat16
    assert torch.equal(*logits)
    for path in plain.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            assert "featherweight.format_version" not in file.metadata()
            assert file.metadata()["format"] == "pt"
    card = (plain / "README.md").read_text()
    assert "21: 0 replaced, 7 copied, 14 changed, 0 dropped" in card
    assert "import featherweight" not in card
    manifest = json.loads((plain / "featherweight.json").read_text())
    assert manifest["recipe"]["grid"].items() >= {"kind": "dense", "dtype": "bfloat16"}.items()


def test_it_can_be_compressed(llama: Path, plain: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-4", tmp_path / "one", threads=1)
    result = compress(plain, "rtn-4", tmp_path / "two", threads=1)
    assert same(read_all(tmp_path / "two"), read_all(tmp_path / "one"))
    found, expected = contents(tmp_path / "two"), contents(tmp_path / "one")
    differing = [name for name in expected if found[name] != expected[name]]
    assert differing == ["featherweight.json"], "which says what it was made from"
    assert found.keys() == expected.keys()
    manifest = json.loads((tmp_path / "two" / "featherweight.json").read_text())
    assert manifest["recipe"]["name"] == result.recipe["name"] == "rtn-4"


def test_commands_read_it(llama: Path, plain: Path) -> None:
    report = inspect_folder(plain)
    assert report["recipe"]["name"] == "rtn-8"
    assert {layer["code"] for layer in report["layers"]} == {"dense bfloat16"}
    assert {layer["relative_error"] for layer in report["layers"][:14]} == {0.0}
    first, second = (evaluate(folder, limit=48, context=16, threads=1) for folder in (llama, plain))
    assert first.perplexity == second.perplexity
    with Checkpoint.open(plain) as checkpoint:
        fates = make_plan(checkpoint, load_recipe("rtn-4")).fates
        assert sorted(fate.name for fate in fates) == sorted(checkpoint.names)


def test_only_outputs_are_replaced(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plainly(llama, out, "float32")
    with pytest.raises(OutputError, match="the output of another command"):
        plainly(llama, out, "bfloat16")
    plainly(llama, out, "bfloat16", overwrite=True)
    assert plainly(llama, out, "bfloat16").already_complete
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="which featherweight did not write"):
        plainly(llama, out, "float32", overwrite=True)
    (out / "notes.txt").unlink()
    (out / "featherweight.json").unlink()
    with pytest.raises(OutputError, match="which featherweight did not write"):
        plainly(llama, out, "float32", overwrite=True)


def test_a_run_that_was_stopped_goes_on(tiny: Any, tmp_path: Path) -> None:
    """Stacked tensors are made of several artifacts, which go when their shard is written."""
    model = tiny("gpt-oss", dtype=torch.float32)
    plainly(model, tmp_path / "expected" / "out", "float16", shard_bytes=60_000)
    out = tmp_path / "made" / "out"
    for kind, number in (("layer", 5), ("shard", 2)):
        with pytest.raises(Stop):
            plainly(model, out, "float16", shard_bytes=60_000, observer=stopping(kind, number))
    assert plainly(model, out, "float16", shard_bytes=60_000).resumed > 5
    assert_only_output(out, contents(tmp_path / "expected" / "out"))


def test_what_has_a_code_among_it_stays_coded(llama: Path, tmp_path: Path) -> None:
    override = "overrides=[{match: down_proj, grid: {kind: uniform, bits: 8}}]"
    result = plainly(llama, tmp_path / "out", "bfloat16", changes=[override])
    config = config_of(tmp_path / "out")
    kinds = [spec["kind"] for spec in module_specs(config["quantization_config"]).values()]
    assert sorted(kinds) == ["dense"] * 12 + ["uniform"] * 2
    assert result.fates == {"replaced": 14, "copied": 7, "dropped": 0}
    told: list[Any] = []
    compress(tmp_path / "out", "rtn-4", tmp_path / "again", observer=told.append)
    assert any("is compressed already (recipe rtn-8," in event.get("text", "") for event in told)


def test_plain_values_that_were_stored_as_codes(llama: Path, plain: Path, tmp_path: Path) -> None:
    """As earlier versions did it."""
    old = Path(shutil.copytree(plain, tmp_path / "old"))
    manifest = json.loads((old / "featherweight.json").read_text())
    specs = {record["name"]: record["spec"] for record in manifest["layers"]}
    config = config_of(old) | {"quantization_config": quantization_config(specs, manifest["recipe"])}
    (old / "config.json").write_text(json.dumps(config))
    told: list[Any] = []
    compress(old, "rtn-4", tmp_path / "out", observer=told.append)
    compress(plain, "rtn-4", tmp_path / "expected")
    assert not any("compressed already" in event.get("text", "") for event in told), "nothing was lost"
    made, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def with_prefix(model: Path, out: Path) -> Path:
    """A wrapper's prefix on all tensors, and a bias that no class asks for."""
    folder = Path(shutil.copytree(model, out))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file({f"module.{n}": t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_fates_of_every_kind(llama: Path, tmp_path: Path) -> None:
    model = with_prefix(llama, tmp_path / "model")
    with Checkpoint.open(model) as checkpoint:
        plan = make_plan(checkpoint, load_recipe("rtn-4"))
        fates = {fate.name: fate for fate in plan.fates}
    assert fates.keys() == {f"module.{n}" for n in (*read_all(llama), "model.layers.0.self_attn.q_proj.bias")}
    assert len(plan.fates) == len(fates)
    head, norm = fates["module.lm_head.weight"], fates["module.model.norm.weight"]
    assert (head.kind, norm.kind, norm.becomes) == ("renamed", "renamed", ("model.norm.weight",))
    bias = fates["module.model.layers.0.self_attn.q_proj.bias"]
    assert (bias.kind, bias.becomes) == ("dropped", ())
    assert "does not ask for it" in bias.reason
    layer = fates["module.model.layers.1.mlp.up_proj.weight"]
    assert (layer.kind, layer.becomes) == ("replaced", ("model.layers.1.mlp.up_proj",))
    assert "4 bit" in layer.reason
    counts = {"replaced": 14, "copied": 0, "renamed": 7, "dropped": 1}
    assert plan.summary()["tensors"] == counts
    result = compress(model, "rtn-4", tmp_path / "out", threads=1)
    assert result.fates == counts
    assert result.tensors["renamed"] == {n: f"module.{n}" for n in read_all(llama) if "proj" not in n}
    assert compress(model, "rtn-4", tmp_path / "out").fates == counts


def test_a_rotated_model_is_a_checkpoint_too(tiny: Any, tmp_path: Path) -> None:
    """Norms are folded, the residual stream is rotated, and nobody can tell it by what the model computes."""
    import transformers

    model = tiny("llama", dtype=torch.float32, tokenizer=True)
    recipe = recipe_from(
        {
            "name": "rotated",
            "transforms": [{"kind": "rotation"}],
            "grid": {"kind": "dense", "dtype": "float32"},
            "calibration": {"sequences": 4, "length": 32},
        },
        "rotated",
    )
    result = compress(model, recipe, tmp_path / "out", threads=1)
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert sum(result.fates.values()) == 21
    assert result.fates["changed"] == 21, "embedding, norms, head and layers"
    ids = torch.arange(3, 40)[None]
    read = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        before, after = (read(folder, dtype="auto")(ids).logits for folder in (model, tmp_path / "out"))
    assert not torch.equal(read_all(model)["lm_head.weight"], read_all(tmp_path / "out")["lm_head.weight"])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert compress(tmp_path / "out", "rtn-4", tmp_path / "coded", threads=1).fates["replaced"] == 14


def test_kernels_of_convolutions_keep_their_sizes(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], num_labels=4)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    result = plainly(tmp_path / "model", tmp_path / "out", "float32")
    source = read_all(tmp_path / "model")
    assert same(read_all(tmp_path / "out"), source)
    assert any(source[name].ndim == 4 for name in result.tensors["changed"])
