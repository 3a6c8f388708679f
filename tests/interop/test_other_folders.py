"""bitsandbytes and FP8 folders: written here from their layouts, and by their owners where these are installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import featherweight
from featherweight.errors import CheckpointError
from featherweight.interop.stored import StoredModel
from featherweight.storage.checkpoint.resolve import resolve
from models import make_tiny

MODULE = "model.layers.0.mlp.down_proj"
SHAPE = (64, 128)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))


def model_with(folder: Path, parts: Tensors, settings: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny llama in whose file `parts` stand for the weight of MODULE."""
    make_tiny("llama", folder, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def read(folder: Path) -> torch.Tensor:
    with StoredModel(folder) as model:
        return model.tensors[f"{MODULE}.weight"].values().clone()


def packed_state(**state: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def nf4_parts(nested: bool) -> tuple[Tensors, torch.Tensor]:
    """Random codes and scales as they are stored, and what they stand for: float32."""
    g = np.random.default_rng(3)
    count, block, outer = SHAPE[0] * SHAPE[1], 64, 32
    raw = g.integers(0, 256, count // 2, dtype=np.uint8)
    table = np.sort(g.standard_normal(16)).astype(np.float32)
    parts: Tensors = {"weight": torch.from_numpy(raw).view(-1, 1), "weight.quant_map": torch.from_numpy(table)}
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(SHAPE)}
    absmax = g.random(count // block).astype(np.float32)
    if nested:
        inner, steps = g.random(256).astype(np.float32), g.random(count // block // outer).astype(np.float32)
        coded = g.integers(0, 256, count // block, dtype=np.uint8)
        parts |= {"weight.absmax": torch.from_numpy(coded), "weight.nested_absmax": torch.from_numpy(steps)}
        parts["weight.nested_quant_map"] = torch.from_numpy(inner)
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = inner[coded] * np.repeat(steps, outer) + np.float32(0.25)
    else:
        parts["weight.absmax"] = torch.from_numpy(absmax)
    parts["weight.quant_state.bitsandbytes__nf4"] = packed_state(**state)
    nibbles = np.stack([raw // 16, raw % 16], 1).reshape(-1)
    return parts, torch.from_numpy((table[nibbles] * np.repeat(absmax, block)).reshape(SHAPE))


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_by_its_layout(nested: bool, tmp_path: Path) -> None:
    parts, expected = nf4_parts(nested)
    folder = model_with(tmp_path / "model", parts, BNB)
    found = read(folder)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_itself_decodes_the_same(kind: str, nested: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(SHAPE).bfloat16()
    data, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    stored = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    folder = model_with(tmp_path / "model", {"weight": data} | stored, BNB)
    assert torch.equal(read(folder), functional.dequantize_4bit(data, state))


def test_int8_rows_are_uniform_codes(tmp_path: Path) -> None:
    weight = torch.randint(-128, 128, SHAPE, dtype=torch.int8)
    parts = {"weight": weight, "SCB": torch.rand(SHAPE[0]), "weight_format": torch.zeros((), dtype=torch.uint8)}
    folder = model_with(tmp_path / "model", parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    scales = (parts["SCB"] * torch.tensor(1 / 127)).unsqueeze(1)
    assert torch.equal(read(folder), weight.float() * scales)
    with StoredModel(folder) as model:
        assert model.tensors[f"{MODULE}.weight"].spec == {
            "kind": "uniform", "shape": list(SHAPE), "bits": 8, "symmetric": True, "group_size": 128,
            "scale_dtype": "float32",
        }  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (64, 1), (2, 4)], ids=["whole", "rows", "blocks"])
def test_fp8_by_its_layout(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scales = torch.randn(SHAPE).to(torch.float8_e4m3fn), torch.rand(shape)
    folder = model_with(
        tmp_path / "model",
        {"weight": weight, "weight_scale_inv": scales},
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    )
    wide = scales if shape != (2, 4) else scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(read(folder), (weight.float() * wide).bfloat16())


def test_fp8_loads_as_transformers_loads_it(tmp_path: Path) -> None:
    """transformers decodes the same folder by itself where there is no GPU; the logits are the same, bit for bit."""
    import transformers

    make_tiny("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        blocks = [-(-side // 32) for side in weight.shape]
        tensors[name] = weight.float().mul(8).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(blocks) / 8
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    if torch.cuda.is_available():
        pytest.skip("transformers keeps this format on a GPU, and rounds activations too")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    ours, _ = featherweight.load(tmp_path / "model", dtype=torch.bfloat16)
    tokens = torch.arange(16).view(1, -1)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}


def scheme(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": format}
    return COMPRESSED | {"format": format, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("strategy", "shape", "more"),
    [("channel", (64, 1), {}), ("tensor", (1,), {}), ("group", (64, 4), {"group_size": 32})],
)
def test_integers_of_a_byte_are_uniform_codes(
    strategy: str, shape: tuple[int, ...], more: dict[str, Any], tmp_path: Path
) -> None:
    weight = torch.randint(-128, 128, SHAPE, dtype=torch.int8)
    scales, zeros = torch.rand(shape).bfloat16(), torch.randint(-128, 128, shape, dtype=torch.int8)
    settings = scheme("int-quantized", num_bits=8, type="int", symmetric=False, strategy=strategy, **more)
    parts = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros, "input_scale": torch.ones(1)}
    folder = model_with(tmp_path / "model", parts, settings)
    wide = 32 if strategy == "group" else 128
    points, steps = (t.view(-1, shape[-1]).repeat_interleave(wide, 1) for t in (zeros.float(), scales.float()))
    assert torch.equal(read(folder), (weight.float() - points) * steps)
    notes = json.loads((resolve(folder).folder / "featherweight.json").read_text())["notes"]
    assert any("input_scale" in note for note in notes)


@pytest.mark.parametrize("shape", [(1,), (64, 1)])
def test_floats_of_a_byte_are_decoded_in_the_type_of_their_scales(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scales = torch.randn(SHAPE).to(torch.float8_e4m3fn), torch.rand(shape).bfloat16()
    strategy = "tensor" if shape == (1,) else "channel"
    settings = scheme("float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy)
    folder = model_with(tmp_path / "model", {"weight": weight, "weight_scale": scales}, settings)
    assert torch.equal(read(folder), weight.to(torch.bfloat16) * scales)


CHANGES: list[tuple[str, Any, str]] = [
    ("quantization_config.checkpoint_format", "marlin", "its GPTQ format is 'marlin'"),
    ("quantization_config.bits", 5, "GPTQ with 5 bits is not read"),
    ("quantization_config.bits", "four", "bits in its quantization_config is 'four', expected a whole number"),
    ("qzeros", None, r"down_proj\.qzeros is missing"),
    ("scales", None, r"down_proj\.scales is missing"),
    ("qweight", None, r"\.(qzeros|scales|g_idx) belongs to a quantised layer whose \S+qweight is missing"),
    ("qweight", torch.zeros(15, 64, dtype=torch.int32), "qweight has 15 words for 128 inputs"),
    ("qweight", torch.zeros(16, 64), "qweight is float32, expected int32"),
    ("qweight", torch.zeros(16, 64, 1, dtype=torch.int32), "expected 2 dimensions"),
    ("qzeros", torch.zeros(4, 7, dtype=torch.int32), r"qzeros has the shape \[4, 7\], where its layer needs \[4, 8\]"),
    ("scales", torch.zeros(4, 63).half(), r"scales has the shape \[4, 63\]"),
    ("g_idx", torch.zeros(128, dtype=torch.int32), "only groups of equal size"),
    ("g_idx", torch.full((128,), 9, dtype=torch.int32), "it has groups from 9 to 9, of 4"),
    ("g_idx", torch.zeros(0, dtype=torch.int32), "none of them 0"),
    ("weight", torch.zeros(64, 128), "is there twice, quantised and plain"),
]


def gptq_parts() -> Tensors:
    return {
        "qweight": torch.randint(-9999, 9999, (16, 64), dtype=torch.int32),
        "qzeros": torch.randint(-9999, 9999, (4, 8), dtype=torch.int32),
        "scales": torch.rand(4, 64).half(),
        "g_idx": (torch.arange(128) // 32).int(),
    }


@pytest.mark.parametrize(("what", "becomes", "said"), CHANGES)
def test_a_damaged_gptq_folder_gets_one_sentence(what: str, becomes: Any, said: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    parts = gptq_parts()
    whole = model_with(tmp_path / "whole", gptq_parts(), settings)
    assert read(whole).shape == SHAPE
    if what.startswith("quantization_config."):
        settings[what.partition(".")[2]] = becomes
    elif becomes is None:
        del parts[what]
        # another layer is whole, so that the folder is still one of this kind
        other = {f"../x.{name}": tensor for name, tensor in gptq_parts().items()}
        parts |= {name.replace("../", ""): tensor for name, tensor in other.items()}
    else:
        parts[what] = becomes
    with pytest.raises(CheckpointError, match=said) as refused:
        read(model_with(tmp_path / "model", parts, settings))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache" / "imported").glob("model-*/config.json"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "has a sparsity_config sparse-24-bitmask, which"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "has a transform_config, which is not read"),
        ({"config_groups": None}, "has no config_groups"),
        ({"format": "nvfp4-pack-quantized"}, "is 'nvfp4-pack-quantized', and only pack-quantized, int-quantized"),
        ({"config_groups": {"a": {"targets": ["re:.*q_proj"], "weights": {"num_bits": 8}}}}, "no group of its"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 99}}}}, "the weights of a in"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}, "not of 4 bits"),
    ],
)
def test_what_compressed_tensors_has_and_is_not_read_is_named(settings: Any, said: str, tmp_path: Path) -> None:
    parts = {"weight": torch.full(SHAPE, 100, dtype=torch.int8), "weight_scale": torch.ones(1)}
    whole = scheme("int-quantized", num_bits=8, type="int", strategy="tensor")
    if "format" in settings or "config_groups" in settings:
        del whole["config_groups"]["group_0"]["format"]
    with pytest.raises(CheckpointError, match=said):
        read(model_with(tmp_path / "model", parts, whole | settings))


def test_a_folder_of_plain_weights_under_such_a_method_is_not_taken(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": BNB}))
    assert resolve(tmp_path / "model").read_from is None


@pytest.mark.parametrize("seed", range(40))
def test_mutated_folders_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    """One thing is changed by chance: the folder is read all the same, or one sentence says why not."""
    g = np.random.default_rng(seed)
    kinds: list[tuple[Tensors, dict[str, Any]]] = [
        (gptq_parts(), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        (nf4_parts(True)[0], BNB),
        (
            {"weight": torch.zeros(SHAPE, dtype=torch.int8), "weight_scale": torch.ones(64, 1)},
            scheme("int-quantized", num_bits=8, type="int", strategy="channel"),
        ),
        (
            {"weight": torch.zeros(SHAPE).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(2, 4)},
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
        ),
    ]
    parts, settings = kinds[seed % len(kinds)]
    names = sorted(parts)
    name = names[int(g.integers(len(names)))]
    tensor = parts[name]
    change = int(g.integers(6))
    if change == 0:
        del parts[name]
    elif change == 1:
        parts[name] = tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone()
    elif change == 2:
        parts[name] = tensor.unsqueeze(0).contiguous()
    elif change == 3:
        parts[name] = tensor.float().to([torch.int64, torch.float64, torch.int8][int(g.integers(3))])
    elif change == 4:
        parts[name + "x"] = parts.pop(name)
    else:
        key = sorted(settings)[int(g.integers(len(settings)))]
        settings[key] = [None, -1, "x", [], {}, 10**30][int(g.integers(6))]
    folder = model_with(tmp_path / "model", parts, settings)
    said, place = "", None
    try:
        place = resolve(folder)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    if place is not None and place.read_from is not None:
        assert read(folder).shape == SHAPE or change == 4


@pytest.mark.parametrize("cut", [10, 1000, 100_000])
def test_a_truncated_file_is_said_to_be_so(cut: int, tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", gptq_parts(), {"quant_method": "gptq", "bits": 4, "group_size": 32})
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(folder)


def test_hqq_is_decoded_by_its_owner(tmp_path: Path) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    layer = quantize.HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu")
    layer.encoded_state_dict = True
    parts = {name: value for name, value in layer.state_dict().items() if isinstance(value, torch.Tensor)}
    folder = model_with(tmp_path / "model", parts, {"quant_method": "hqq", "quant_config": {}})
    assert torch.equal(read(folder), layer.dequantize())


def test_torchao_is_decoded_by_its_owner(tmp_path: Path) -> None:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    api = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Sequential(torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)).bfloat16()
    api.quantize_(layer, api.Int8WeightOnlyConfig(version=2))
    data, about = support.flatten_tensor_state_dict({f"{MODULE}.weight": layer[0].weight})
    folder = model_with(tmp_path / "model", {}, {"quant_method": "torchao", "quant_type": "int8_weight_only"})
    tensors = load_file(folder / "model.safetensors") | data
    save_file(tensors, folder / "model.safetensors", {"format": "pt"} | about)
    assert torch.equal(read(folder), layer[0].weight.dequantize())


@pytest.mark.parametrize(("method", "part"), [("hqq", "W_q"), ("torchao", "_weight_qdata")])
def test_without_the_owner_a_sentence_names_it(
    method: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, method, None)
    folder = model_with(tmp_path / "model", {part: torch.zeros(64, 64, dtype=torch.uint8)}, {"quant_method": method})
    with pytest.raises(CheckpointError, match=f"pip install {method}"):
        resolve(folder)
