"""Models in GGUF: every architecture computes what the original does, every type decodes to the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from written_gguf import write_model

import featherweight
from featherweight.cli.main import main
from featherweight.errors import CheckpointError
from featherweight.interop.gguf.names import FAMILIES as READ
from featherweight.interop.importers.gguf import GGUF
from featherweight.interop.stored import StoredModel
from featherweight.storage.checkpoint.resolve import resolve
from models import FAMILIES

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
PHI: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
TOKENS = torch.tensor([[3, 7, 11, 200, 5, 9, 31, 17, 90, 91, 4, 8]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(family: str, **settings: Any) -> Any:
    """A random model in float32, its norms away from their first values."""
    import transformers

    config, model, common = FAMILIES[family]
    torch.manual_seed(1)
    made = getattr(transformers, model)(getattr(transformers, config)(**(common | settings)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "weight" in name:
                parameter.mul_(3)
    return made.eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def assert_same(path: Path, original: Any, decoded: dict[str, Tensor]) -> dict[str, Any]:
    """The folder that a file becomes has the file's very weights, and computes what the original does with them."""
    folder = resolve(path).folder
    with StoredModel(folder) as stored:
        assert set(stored.tensors) == set(decoded)
        for name, values in decoded.items():
            assert torch.equal(stored.tensors[name].values().float(), values), name
    original.load_state_dict(decoded, strict=False)
    loaded, _ = featherweight.load(path, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(original), rtol=1e-4, atol=1e-4)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 6},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window": 6, "num_hidden_layers": 7, "rope_theta": 1e6},
    "phi3": {"sliding_window": 6},
}


@pytest.mark.parametrize("family", SETTINGS)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    model = make(family, **SETTINGS[family])
    metadata = {"gemma3.rope.freq_base": 1e6} if family == "gemma3" else {}
    decoded = write_model(model, tmp_path / "model.gguf", lambda name: Type.Q8_0, metadata=metadata)
    config = assert_same(tmp_path / "model.gguf", model, decoded)
    assert config["architectures"] == [type(model).__name__]
    assert config["quantization_config"]["recipe"]["name"] == "imported"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
        ("phi3", {"tie_word_embeddings": True}),
    ],
)
def test_biases_and_tied_layers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make(family, **settings)
    config = assert_same(tmp_path / "model.gguf", model, write_model(model, tmp_path / "model.gguf"))
    assert config["tie_word_embeddings"] is settings.get("tie_word_embeddings", False)


def test_names_are_those_of_the_package() -> None:
    """Of every tensor that is read, the package's map from the family's names gives the file's."""
    for architecture, family in READ.items():
        names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 3)
        optional = [part for parts in family.optional.values() for part in parts.items()]
        for name, (target, _) in [*family.block.items(), *optional]:
            found = names.get_name(f"model.layers.2.{target}", try_suffixes=(".weight", ".bias"))
            assert found == f"blk.2.{name}", (architecture, target)


WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_type_that_the_package_writes(kind: str, tmp_path: Path) -> None:
    model = make("llama", **WIDE)
    decoded = write_model(model, tmp_path / "model.gguf", lambda name: Type[kind])
    assert_same(tmp_path / "model.gguf", model, decoded)


@pytest.mark.parametrize(
    ("scaling", "metadata"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        ),
    ],
)
def test_stretched_positions(scaling: dict[str, Any], metadata: dict[str, Any], tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        model = make(family, rope_scaling=dict(scaling))
        path = tmp_path / f"{family}.gguf"
        decoded = write_model(model, path, metadata={f"{family}.{key}": value for key, value in metadata.items()})
        assert assert_same(path, model, decoded)["rope_scaling"].items() >= scaling.items()


def bands(factor: float, low: float, high: float, original: int, head: int, base: float = 10000.0) -> np.ndarray:
    """Llama 3's divisors, one frequency at a time."""
    found = []
    for column in range(0, head, 2):
        wavelength = 2 * math.pi * base ** (column / head)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("settings", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 2.5, 600)])
def test_bands_of_llama_3_are_recovered(settings: tuple[float, float, float, int], tmp_path: Path) -> None:
    factor, low, high, original = settings
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    model = make("llama", rope_scaling=dict(scaling), **WIDE)
    tensors = {"rope_freqs.weight": bands(factor, low, high, original, WIDE["head_dim"])}
    decoded = write_model(model, tmp_path / "model.gguf", tensors=tensors)
    found = assert_same(tmp_path / "model.gguf", model, decoded)["rope_scaling"]
    assert found.pop("rope_type") == scaling.pop("rope_type")
    assert found == pytest.approx(scaling, rel=1e-3)


def test_other_divisors_are_kept_as_they_are(tmp_path: Path) -> None:
    model = make("llama", **WIDE)
    divisors = np.linspace(1, 3, 32, dtype=np.float32)[::-1].copy()
    decoded = write_model(model, tmp_path / "model.gguf", tensors={"rope_freqs.weight": divisors})
    with torch.no_grad():
        model.model.rotary_emb.inv_freq /= torch.from_numpy(divisors)
    assert assert_same(tmp_path / "model.gguf", model, decoded)["rope_scaling"]["rope_type"] == "longrope"


def test_long_contexts_of_phi3(tmp_path: Path) -> None:
    long, short = np.linspace(1, 5, 8, dtype=np.float32), np.linspace(1, 1.5, 8, dtype=np.float32)
    scaling = {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
    model = make("phi3", rope_scaling=scaling, original_max_position_embeddings=32)
    decoded = write_model(
        model,
        tmp_path / "model.gguf",
        metadata={
            "phi3.rope.scaling.original_context_length": 32,
            "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(32)),
        },
        tensors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
    )
    assert_same(tmp_path / "model.gguf", model, decoded)
    loaded, _ = featherweight.load(tmp_path / "model.gguf", dtype=torch.float32)
    many = torch.randint(3, 250, (1, 60), generator=torch.Generator().manual_seed(0))  # the long ones
    torch.testing.assert_close(logits(loaded, many), logits(model, many), rtol=1e-4, atol=1e-4)


def test_part_of_a_head_rotates_in_phi3(tmp_path: Path) -> None:
    model = make("phi3", partial_rotary_factor=0.5)
    decoded = write_model(model, tmp_path / "model.gguf", metadata={"phi3.rope.dimension_count": 8})
    assert assert_same(tmp_path / "model.gguf", model, decoded)["partial_rotary_factor"] == 0.5


def test_gemma3_stretches_only_what_sees_all(tmp_path: Path) -> None:
    model = make(
        "gemma3", **SETTINGS["gemma3"], rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=5000.0
    )
    metadata = {
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 5000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    assert_same(tmp_path / "model.gguf", model, write_model(model, tmp_path / "model.gguf", metadata=metadata))


def test_parts_are_found_by_any_of_them(tmp_path: Path) -> None:
    model = make("llama")
    decoded = write_model(model, tmp_path / "model.gguf", splits=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for part in parts:
        assert_same(part, model, decoded)
    assert_same(tmp_path, model, decoded)  # the folder with nothing else in it
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"one of 3 parts, and model-00002-of-00003.gguf is not there"):
        resolve(parts[2])
    (tmp_path / "elsewhere").rename(parts[1])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 2 of 3, and its name says 3 of 3"):
        resolve(parts[0])
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="part 0 of 3, and its name does not say so"):
        resolve(alone)


def test_several_models_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(make("llama"), tmp_path / f"{name}.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF models \(a.gguf, b.gguf\): name one of the files"):
        resolve(tmp_path)


def test_commands_take_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is read once; a damaged one is an error of one line."""
    path = tmp_path / "model.gguf"
    write_model(make("llama"), path, lambda name: Type.Q4_1)
    for words in (["generate", str(path), "--prompt", "x", "--max-tokens", "3"], ["inspect", str(path)]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code in (0, None), capsys.readouterr().err
    shown = capsys.readouterr()
    assert "4 bit with offsets g32" in shown.out
    assert shown.err.count("reading model.gguf") <= 2  # begun, and done
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.gguf is not a valid GGUF file: it is truncated" in line


def test_a_matrix_is_as_small_as_it_is_exact(tmp_path: Path) -> None:
    """float32 in the file that a smaller type holds is stored in that."""
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())
        model.model.layers[0].mlp.up_proj.weight.copy_(model.model.layers[0].mlp.up_proj.weight.half())
    decoded = write_model(model, tmp_path / "model.gguf")
    assert_same(tmp_path / "model.gguf", model, decoded)
    found = {tensor.name: tensor.dtype for tensor in GGUF.open(tmp_path / "model.gguf").tensors}
    assert found["lm_head.weight"] == torch.bfloat16
    assert found["model.layers.0.mlp.up_proj.weight"] == torch.float16
    assert found["model.layers.1.mlp.up_proj.weight"] == torch.float32
    assert found["model.norm.weight"] == torch.float32


def test_planes_as_tensors_beside_each_other(tmp_path: Path) -> None:
    model = make("llama", **WIDE)
    name, rows = "blk.1.ffn_down.weight", WIDE["hidden_size"]
    generator = np.random.default_rng(0)
    planes = [
        gguf.quantize(generator.integers(-1, 2, (rows, 512)).astype(np.float32) * scale, Type.TQ2_0)
        for scale in (0.75, 0.3125)
    ]
    tensors = {f"{name}.ptqtp{number}": plane for number, plane in enumerate(planes)}
    path = tmp_path / "model.gguf"
    decoded = write_planes(model, path, name, tensors)
    values = [torch.from_numpy(np.array(gguf.dequantize(plane, Type.TQ2_0))) for plane in planes]
    decoded["model.layers.1.mlp.down_proj.weight"] = values[0] + values[1]
    assert_same(path, model, decoded)
    (found,) = (t.spec for t in GGUF.open(path).tensors if t.name == "model.layers.1.mlp.down_proj.weight")
    assert found is not None
    assert (found["kind"], found["planes"], found["group_size"]) == ("trit-planes", 2, 256)


def write_planes(model: Any, path: Path, left_out: str, tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: Any, *args: Any, **options: Any) -> None:
            options |= {"raw_dtype": Type.TQ2_0} if name in tensors else {}
            super().add_tensor(name, tensor, *args, **options)

    before, gguf.GGUFWriter = gguf.GGUFWriter, Writer  # type: ignore[misc]
    try:
        return write_model(model, path, left_out=(left_out,), tensors=tensors)
    finally:
        gguf.GGUFWriter = before  # type: ignore[misc]
