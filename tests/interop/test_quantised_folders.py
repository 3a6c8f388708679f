"""Folders of other tools, in and out: what is written is read as the same codes, and decodes as the layouts say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import featherweight
from featherweight.errors import OutputError
from featherweight.interop.exporting import export
from featherweight.interop.integers import grid_of, integers_of
from featherweight.interop.stored import StoredModel, StoredTensor
from featherweight.storage.checkpoint.resolve import resolve
from featherweight.system.places import ASSETS
from models import make_tiny

GRIDS = {
    "rtn-4": ("grid.group_size=32",),
    "rtn-2": ("grid.group_size=32",),
    "rtn-3": ("grid.group_size=32",),
    "rtn-8": ("grid.group_size=64",),
    "ptqtp-tied": ("grid.group_size=32",),
    "twn": (),
    "gptq-3": ("grid.group_size=32", "rounding.order=activation", "calibration.sequences=4", "calibration.length=32"),
}
"""Recipes and what is changed; the last puts columns into another order."""
FORMATS = [
    ("compressed-tensors", {}),
    ("compressed-tensors", {"packing": "dense"}),
    ("gptq", {}),
    ("gptq", {"version": "v1"}),
    ("awq", {}),
]
HELD = {"awq": ("rtn-4", "ptqtp-tied")}
"""Recipes whose codes a format has a place for, where these are not all."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny llama, and what recipes make of it."""
    place = tmp_path_factory.mktemp("folders")
    make_tiny("llama", place / "model", tokenizer=True)
    for recipe, changes in GRIDS.items():
        featherweight.compress(place / "model", recipe, place / recipe, changes=changes)
    return {name: place / name for name in ("model", *GRIDS)}


def same(one: StoredTensor, other: StoredTensor) -> None:
    """Equal integers, scales and orders, bit for bit, whatever kind of code holds them; else equal values."""
    assert one.shape == other.shape, one.name
    first, second = (tensor.spec and grid_of(tensor.spec) for tensor in (one, other))
    if first and second:
        left, right = integers_of(one.code()), integers_of(other.code())
        assert torch.equal(left.codes, right.codes)
        assert torch.equal(left.scales, right.scales)
        default = torch.full_like(left.scales, 1 << (first.bits - 1), dtype=torch.uint8)
        points = [default if part.zero_points is None else part.zero_points for part in (left, right)]
        assert torch.equal(*points)
        assert first.bits == second.bits
    assert torch.equal(one.values().float(), other.values().float()), one.name


def same_models(one: Path, other: Path) -> None:
    with StoredModel(one) as first, StoredModel(other) as second:
        assert set(first.tensors) == set(second.tensors)
        for name in first.tensors:
            same(first.tensors[name], second.tensors[name])


@pytest.mark.parametrize(
    ("to", "settings"), FORMATS, ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value
)
@pytest.mark.parametrize("recipe", GRIDS)
def test_what_is_written_is_read_as_the_same_codes(
    recipe: str, to: str, settings: dict[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if recipe not in HELD.get(to, GRIDS):
        with pytest.raises(OutputError, match=r"cannot be written as .*decode=true"):
            export(folders[recipe], to, out, settings=settings)
        assert not out.exists()
        assert not list(tmp_path.glob("out*"))
        return
    done = export(folders[recipe], to, out, settings=settings)
    assert {verdict.fate for verdict in done.verdicts} == {"exact"}
    assert done.bytes == sum(path.stat().st_size for path in out.iterdir())
    same_models(folders[recipe], out)
    place = resolve(out)
    assert place.read_from == out
    assert (
        json.loads((place.folder / "config.json").read_text())["quantization_config"]["quant_method"] == "featherweight"
    )
    assert (place.folder / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "qwen2"])
@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq"])
def test_the_logits_of_other_families_stay(family: str, to: str, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "model")
    featherweight.compress(tmp_path / "model", "rtn-4", tmp_path / "small", changes=("grid.group_size=32",))
    export(tmp_path / "small", to, tmp_path / "out")
    same_models(tmp_path / "small", tmp_path / "out")
    tokens = torch.arange(24).view(1, -1)
    with torch.no_grad():
        before, after = (featherweight.load(tmp_path / name)[0](tokens).logits for name in ("small", "out"))
    assert torch.equal(before, after)


def test_the_bundled_model_goes_out_and_in(tmp_path: Path) -> None:
    featherweight.compress(ASSETS / "reference", "rtn-4", tmp_path / "small")
    for to in ("compressed-tensors", "gptq"):
        export(tmp_path / "small", to, tmp_path / to)
        same_models(tmp_path / "small", tmp_path / to)


def layer_of(folder: Path, names: tuple[str, ...], module: str = "model.layers.0.mlp.down_proj") -> list[Any]:
    tensors = load_file(folder / "model.safetensors")
    return [tensors[f"{module}.{name}"].numpy() if f"{module}.{name}" in tensors else None for name in names]


def values_of(folder: Path, name: str = "model.layers.0.mlp.down_proj.weight") -> Any:
    with StoredModel(folder) as model:
        return model.tensors[name].values().numpy()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("recipe", "bits"), [("rtn-4", 4), ("rtn-3", 3), ("rtn-2", 2), ("rtn-8", 8), ("gptq-3", 3)])
def test_gptq_as_its_layout_says(
    recipe: str, bits: int, version: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    export(folders[recipe], "gptq", tmp_path / "out", settings={"version": version})
    qweight, qzeros, scales, index = layer_of(tmp_path / "out", ("qweight", "qzeros", "scales", "g_idx"))
    expected = layouts.gptq(qweight, qzeros, scales, index, bits, 1 if version == "v1" else 0)
    assert np.array_equal(expected, values_of(folders[recipe]))
    if recipe == "gptq-3":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"] is True
        assert len(set(np.diff(index))) > 2


def test_awq_as_its_layout_says(folders: dict[str, Path], tmp_path: Path) -> None:
    export(folders["rtn-4"], "awq", tmp_path / "out")
    expected = layouts.awq(*layer_of(tmp_path / "out", ("qweight", "qzeros", "scales")), 32)
    assert np.array_equal(expected, values_of(folders["rtn-4"]))


@pytest.mark.parametrize("packing", ["padded", "dense"])
@pytest.mark.parametrize(("recipe", "bits"), [("rtn-4", 4), ("rtn-3", 3), ("twn", 2), ("gptq-3", 3)])
def test_compressed_tensors_as_its_layout_says(
    recipe: str, bits: int, packing: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    export(folders[recipe], "compressed-tensors", tmp_path / "out", settings={"packing": packing})
    names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    packed, scale, zeros, index, shape = layer_of(tmp_path / "out", names)
    expected = layouts.compressed_tensors(packed, scale, zeros, index, tuple(shape), bits, packing == "padded")
    assert np.array_equal(expected, values_of(folders[recipe]))


@pytest.mark.parametrize("recipe", [*GRIDS])
def test_compressed_tensors_itself_decodes_the_same(recipe: str, folders: dict[str, Path], tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    version = pytest.importorskip("compressed_tensors").__version__
    older = tuple(map(int, version.split(".")[:2])) < (0, 18)
    packing = "padded" if older else "dense"
    if recipe == "gptq-3" and not older:
        pytest.skip("later versions of it do not read act-order")
    export(folders[recipe], "compressed-tensors", tmp_path / "out", settings={"packing": packing})
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    owner = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    held = {name.removeprefix(f"{module}."): value for name, value in tensors.items() if name.startswith(f"{module}.")}
    held["weight_scale"] = held["weight_scale"].float()  # so that its products are not rounded to 16 bits
    decoded = owner.decompress(held, scheme)["weight"]
    assert np.array_equal(decoded.numpy(), values_of(folders[recipe]))


def test_awq_gemv_is_read(tmp_path: Path) -> None:
    """Written here from its layout: nibbles in order along the input, room for more groups."""
    make_tiny("llama", tmp_path / "model", dtype=torch.float16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    g = torch.Generator().manual_seed(1)
    qweight = torch.randint(-(1 << 31), (1 << 31) - 1, (64, 16), generator=g).int()
    qzeros = torch.randint(-(1 << 31), (1 << 31) - 1, (64, 1), generator=g).int()
    scales = torch.rand(64, 8, generator=g).half()
    del tensors[f"{module}.weight"]
    tensors |= {f"{module}.qweight": qweight, f"{module}.qzeros": qzeros, f"{module}.scales": scales}
    write(tmp_path / "model", tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"})
    expected = layouts.awq_gemv(qweight.numpy(), qzeros.numpy(), scales.numpy(), 32)
    assert np.array_equal(expected, values_of(tmp_path / "model", f"{module}.weight"))


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Replace a folder's weights, and say in config.json how they are quantised."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_a_plain_folder_is_exact_in_float32_and_its_error_stated_in_16_bits(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    done = export(folders["rtn-4"], "dense", tmp_path / "wide", settings={"dtype": "float32"})
    assert {verdict.fate for verdict in done.verdicts} == {"exact"}
    assert np.array_equal(values_of(tmp_path / "wide"), values_of(folders["rtn-4"]))
    done = export(folders["rtn-4"], "dense", tmp_path / "narrow")
    (verdict,) = (v for v in done.verdicts if v.tensor == "model.layers.0.mlp.down_proj.weight")
    before, after = (
        values_of(folders["rtn-4"]),
        torch.from_numpy(values_of(folders["rtn-4"])).bfloat16().float().numpy(),
    )
    assert verdict.fate == "rounded"
    assert verdict.error == pytest.approx(float(np.linalg.norm(after - before) / np.linalg.norm(before)), rel=1e-5)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert "quantization_config" not in config
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    tokens = torch.arange(16).view(1, -1)
    with torch.no_grad():
        expected, found = (
            featherweight.load(folders["rtn-4"], dtype=torch.float32)[0](tokens).logits,
            model(tokens).logits,
        )
    assert torch.allclose(expected, found, atol=1e-5)


def test_codes_that_are_no_integers_are_refused_or_decoded(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "model", tokenizer=True)
    featherweight.compress(
        tmp_path / "model", "trit-2", tmp_path / "small", changes=("calibration.sequences=4", "calibration.length=32")
    )
    with pytest.raises(
        OutputError,
        match=r"model\.layers\.0\S+ \(and \d+ more\) cannot be written as GPTQ: hadamard .*--set decode=true",
    ):
        export(tmp_path / "small", "gptq", tmp_path / "out")
    done = export(tmp_path / "small", "gptq", tmp_path / "out", settings={"decode": True})
    errors = [verdict.error for verdict in done.verdicts if verdict.fate == "rounded"]
    assert errors
    assert all(error is not None and 0 < error < 0.005 for error in errors)


def test_layers_of_several_kinds_go_by_name(tmp_path: Path, folders: dict[str, Path]) -> None:
    rules = [{"match": "down_proj", "grid": {"bits": 8}}]
    recipe = {
        "grid": {"kind": "uniform", "bits": 4, "group_size": 32},
        "overrides": rules,
        "layers": {"skip": ["o_proj"]},
    }
    featherweight.compress(folders["model"], recipe, tmp_path / "small")
    for to in ("compressed-tensors", "gptq"):
        export(tmp_path / "small", to, tmp_path / to)
        same_models(tmp_path / "small", tmp_path / to)
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert settings["dynamic"][r"+:^model\.layers\.0\.mlp\.down_proj$"]["bits"] == 8
    assert settings["dynamic"][r"-:^model\.layers\.0\.self_attn\.o_proj$"] == {}
    settings = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert len(settings["config_groups"]) == 2
    assert "model.layers.1.self_attn.o_proj" in settings["ignore"]
    with pytest.raises(OutputError, match="the format has 4 bits, not 8"):
        export(tmp_path / "small", "awq", tmp_path / "awq")


def test_an_embedding_in_codes_is_decoded(tmp_path: Path, folders: dict[str, Path]) -> None:
    featherweight.compress(
        folders["model"], "rtn-4", tmp_path / "small", changes=("grid.group_size=32", "embedding=6bit")
    )
    done = export(tmp_path / "small", "gptq", tmp_path / "out")
    (verdict,) = (v for v in done.verdicts if v.tensor == "model.embed_tokens.weight")
    assert verdict.becomes == "bf16"
    assert verdict.fate == "rounded"
    assert verdict.error is not None
    assert 0 < verdict.error < 0.003
    assert re.search("embedding", verdict.why)


def test_a_verdict_says_which_layers_a_server_cannot_put_into_one(tmp_path: Path, folders: dict[str, Path]) -> None:
    recipe = {"grid": {"kind": "uniform", "bits": 4, "group_size": 32}, "layers": {"skip": ["k_proj"]}}
    featherweight.compress(folders["model"], recipe, tmp_path / "small")
    done = export(tmp_path / "small", "compressed-tensors", tmp_path / "out")
    said = {verdict.tensor: verdict.why for verdict in done.verdicts}
    assert "k_proj plain" in said["model.layers.0.self_attn.q_proj.weight"]
    assert said["model.layers.0.mlp.up_proj.weight"] == ""


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe", "gemma3"])
def test_a_plain_folder_of_any_family_is_the_model_for_transformers(family: str, tmp_path: Path) -> None:
    """GPT-2 keeps its matrices transposed, experts lie one by one in the file, Gemma ties embedding and head."""
    import transformers

    make_tiny(family, tmp_path / "model")
    featherweight.compress(
        tmp_path / "model", "rtn-4", tmp_path / "small", changes=("grid.group_size=32", "embedding=6bit")
    )
    export(tmp_path / "small", "dense", tmp_path / "out", settings={"dtype": "float32"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(16).view(1, -1)
    with torch.no_grad():
        expected, found = (
            featherweight.load(tmp_path / "small", dtype=torch.float32)[0](tokens).logits,
            model(tokens).logits,
        )
    assert torch.allclose(expected, found, atol=1e-5)


def test_experts_go_out_and_in(tmp_path: Path) -> None:
    make_tiny("qwen3-moe", tmp_path / "model")
    featherweight.compress(tmp_path / "model", "rtn-4", tmp_path / "small", changes=("grid.group_size=32",))
    for to in ("compressed-tensors", "gptq", "awq"):
        export(tmp_path / "small", to, tmp_path / to)
        same_models(tmp_path / "small", tmp_path / to)
    tokens = torch.arange(16).view(1, -1)
    with torch.no_grad():
        before, after = (featherweight.load(tmp_path / name)[0](tokens).logits for name in ("small", "gptq"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("recipe", ["rtn-4", "rtn-3", "ptqtp-tied"])
def test_transformers_loads_an_export_by_compressed_tensors(
    recipe: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    version = pytest.importorskip("compressed_tensors").__version__
    packing = "padded" if tuple(map(int, version.split(".")[:2])) < (0, 18) else "dense"
    export(folders[recipe], "compressed-tensors", tmp_path / "out", settings={"packing": packing})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(16).view(1, -1)
    with torch.no_grad():
        expected, found = featherweight.load(folders[recipe], dtype=torch.float32)[0](tokens), model(tokens)
    assert torch.allclose(expected.logits, found.logits, atol=2e-3)  # their weights are rounded as their scales are
