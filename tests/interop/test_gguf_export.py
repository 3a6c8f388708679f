"""GGUF files of every family and code, read by the `gguf` package: values bit for bit where they are said to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import dequantised, metadata_of, place_of, raw_tensor, tensors_of, unpermuted, values_in

import featherweight
from featherweight.errors import CheckpointError, OutputError, RecipeError
from featherweight.interop.exporters.gguf import Gguf
from featherweight.interop.exports import Exported
from featherweight.interop.stored import StoredModel
from featherweight.system.places import ASSETS
from models import make_tiny

KINDS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
SHAPE = {"hidden_size": 128, "intermediate_size": 256}


def family(name: str, folder: Path, **changes: Any) -> Path:
    scaled = {"query_pre_attn_scalar": 16} if name in ("gemma2", "gemma3") else {}
    return make_tiny(name, folder, tokenizer=True, **(SHAPE | scaled | changes))


def checked(folder: Path, out: Path, kind: gguf.MODEL_ARCH, **settings: Any) -> Exported:
    """Export, and compare every tensor of the file with the folder's."""
    with StoredModel(folder) as model:
        before = {verdict.tensor: verdict for verdict in Gguf(**settings).verdicts(model)}
    made = featherweight.export(folder, "gguf", out, settings=settings)
    assert made.bytes == out.stat().st_size
    with StoredModel(folder) as model:
        stored = set(model.tensors)
        config = model.config
        for verdict in made.verdicts:
            said = before[verdict.tensor]
            assert (said.becomes, said.fate, said.bits) == (verdict.becomes, verdict.fate, verdict.bits)
            found = values_in(out, verdict.tensor, config, kind)
            wanted = model.tensors[verdict.tensor].values().float()
            if verdict.fate == "exact":
                assert torch.equal(found, wanted), verdict
                assert verdict.error == 0
            else:
                lost = float((found.double() - wanted.double()).norm() / wanted.double().norm())
                assert math.isclose(lost, verdict.error or 0.0, rel_tol=1e-3, abs_tol=1e-9), verdict
    assert {verdict.tensor for verdict in made.verdicts} | {"lm_head.weight"} >= stored
    return made


def becoming(made: Exported) -> dict[str, str]:
    return {verdict.tensor: f"{verdict.becomes} {verdict.fate}" for verdict in made.verdicts}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole blocks of 256."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    return make_tiny("llama", tmp_path_factory.mktemp("wide") / "model", tokenizer=True, **shape)


@pytest.mark.parametrize("name", KINDS)
def test_plain_families_are_exact(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path / "model")
    made = checked(folder, tmp_path / "out.gguf", KINDS[name])
    assert {verdict.fate for verdict in made.verdicts} == {"exact"}
    about = metadata_of(tmp_path / "out.gguf")
    architecture = about["general.architecture"]
    assert architecture == gguf.MODEL_ARCH_NAMES[KINDS[name]]
    assert about[f"{architecture}.block_count"] == 2
    assert about[f"{architecture}.attention.head_count_kv"] == 2
    assert about[f"{architecture}.embedding_length"] == 128
    assert len(about["tokenizer.ggml.tokens"]) == 256


@pytest.mark.parametrize("name", KINDS)
def test_tied_planes_are_q4_0(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path / "model")
    featherweight.compress(folder, "ptqtp-tied", tmp_path / "small", changes=["grid.group_size=64"])
    made = checked(tmp_path / "small", tmp_path / "out.gguf", KINDS[name])
    coded = [text for tensor, text in becoming(made).items() if ".mlp." in tensor]
    assert set(coded) == {"Q4_0 exact"}


ONE_PLANE = ("ptqtp", ("grid.planes=1",))
WHOLE_ROWS = ("ptqtp", ("grid.planes=1", "grid.group_size=256"))
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str]] = {
    "free planes": ("ptqtp", (), {}, "Q8_0 rounded"),
    "free planes as bf16": ("ptqtp", (), {"other": "bf16"}, "BF16 rounded"),
    "free planes as f16": ("ptqtp", (), {"other": "f16"}, "F16 rounded"),
    "free planes, lossless": ("ptqtp", (), {"lossless": True}, "F32 exact"),
    "tied planes": ("ptqtp-tied", (), {}, "Q4_0 exact"),
    "three tied planes": ("ptqtp-tied-3", (), {}, "Q5_0 exact"),
    "one plane of 128 as q2_k": (*ONE_PLANE, {"ternary": "q2_k"}, "Q2_K rounded"),
    "one plane of 256": (*WHOLE_ROWS, {}, "TQ1_0 exact"),
    "one plane as tq2_0": (
        *WHOLE_ROWS,
        {"ternary": "tq2_0"},
        "TQ2_0 exact",
    ),
    "one plane as q2_k": (*WHOLE_ROWS, {"ternary": "q2_k"}, "Q2_K exact"),
    "one plane as q4_0": (*ONE_PLANE, {"type": "q4_0"}, "Q4_0 exact"),
    "four bits": ("rtn-4", (), {}, "Q4_1 rounded"),
    "four bits, lossless": ("rtn-4", (), {"lossless": True}, "Q5_0 exact"),
    "four bits, symmetric": ("rtn-4", ("grid.symmetric=true",), {}, "Q4_0 exact"),
    "three bits": ("rtn-3", (), {}, "Q4_0 exact"),
    "five bits": ("rtn-4", ("grid.bits=5",), {}, "Q5_1 rounded"),
    "six bits": ("rtn-4", ("grid.bits=6",), {}, "Q8_0 exact"),
    "eight bits": ("rtn-8", (), {}, "Q8_0 rounded"),
    "eight bits, symmetric": ("rtn-8", ("grid.symmetric=true",), {}, "Q8_0 exact"),
    "trits with offsets": ("pt2-llm-data-free", (), {}, "Q4_1 rounded"),
    "everything q8_0": ("rtn-4", (), {"type": "q8_0"}, "Q8_0 exact"),
    "everything f16": ("rtn-4", (), {"type": "f16"}, "F16 rounded"),
    "groups of 20": ("rtn-4", ("grid.symmetric=true", "grid.group_size=20"), {}, "Q8_0 rounded"),
}


@pytest.mark.parametrize("case", CASES)
def test_codes(case: str, wide: Path, tmp_path: Path) -> None:
    recipe, changes, settings, wanted = CASES[case]
    featherweight.compress(wide, recipe, tmp_path / "small", changes=list(changes))
    made = checked(tmp_path / "small", tmp_path / "out.gguf", gguf.MODEL_ARCH.LLAMA, **settings)
    found = becoming(made)
    assert {text for tensor, text in found.items() if "_proj." in tensor} == {wanted}, found
    assert made.verdicts[0].tensor in found


def test_planes_of_128_are_q2_0(wide: Path, tmp_path: Path) -> None:
    """Releases of the package that do not know the type cannot open the file: it is parsed by hand."""
    featherweight.compress(wide, "ptqtp", tmp_path / "small", changes=["grid.planes=1"])
    made = featherweight.export(tmp_path / "small", "gguf", tmp_path / "out.gguf")
    with StoredModel(tmp_path / "small") as model:
        for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"):
            name = f"model.layers.0.{part}.weight"
            assert becoming(made)[name] == "Q2_0 exact"
            wanted = model.tensors[name].values()
            found = raw_tensor(tmp_path / "out.gguf", place_of(name, gguf.MODEL_ARCH.LLAMA))
            assert (found.kind, found.shape) == (42, tuple(wanted.shape))
            blocks = np.frombuffer(found.data, np.uint8).reshape(-1, 18)
            scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            fields = np.stack([(blocks[:, 2:] >> (2 * k)) & 3 for k in range(4)], -1).reshape(len(blocks), 64)
            values = ((fields.astype(np.float32) - 1) * scales).reshape(wanted.shape)
            if "q_proj" in part:
                values = unpermuted(values, model.config["num_attention_heads"])
            assert torch.equal(torch.from_numpy(values), wanted)


def test_two_bits_symmetric_are_q2_0_with_negative_scales(wide: Path, tmp_path: Path) -> None:
    """Codes -2 to 1 are the type's -1 to 2 with the sign of the scale changed."""
    featherweight.compress(wide, "rtn-2", tmp_path / "small", changes=["grid.symmetric=true"])
    made = featherweight.export(tmp_path / "small", "gguf", tmp_path / "out.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    assert becoming(made)[name] == "Q2_0 exact"
    with StoredModel(tmp_path / "small") as model:
        wanted = model.tensors[name].values()
    blocks = np.frombuffer(raw_tensor(tmp_path / "out.gguf", "blk.0.ffn_up.weight").data, np.uint8).reshape(-1, 18)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    fields = np.stack([(blocks[:, 2:] >> (2 * k)) & 3 for k in range(4)], -1).reshape(len(blocks), 64)
    assert torch.equal(torch.from_numpy((fields.astype(np.float32) - 1) * scales).view(wanted.shape), wanted)


def test_siblings_add_up(wide: Path, tmp_path: Path) -> None:
    featherweight.compress(wide, "ptqtp", tmp_path / "small", changes=["grid.group_size=256"])
    made = featherweight.export(tmp_path / "small", "gguf", tmp_path / "out.gguf", settings={"planes": "siblings"})
    found = tensors_of(tmp_path / "out.gguf")
    with StoredModel(tmp_path / "small") as model:
        for part in ("gate_proj", "down_proj"):
            name = f"model.layers.0.mlp.{part}.weight"
            place = place_of(name, gguf.MODEL_ARCH.LLAMA)
            assert place not in found
            planes = [found[f"{place}.ptqtp{k}"] for k in range(2)]
            assert {plane.tensor_type.name for plane in planes} == {"TQ2_0"}
            total = torch.from_numpy(dequantised(planes[0]) + dequantised(planes[1]))
            assert torch.equal(total, model.tensors[name].values())
    assert becoming(made)["model.layers.0.mlp.gate_proj.weight"] == "2 x TQ2_0 exact"
    about = metadata_of(tmp_path / "out.gguf")
    assert about["fucina.ptqtp.version"] == 1
    assert "fucina.ptqtp.tie_scales" not in about


def test_tied_siblings_say_so(wide: Path, tmp_path: Path) -> None:
    featherweight.compress(wide, "ptqtp-tied", tmp_path / "small", changes=["grid.group_size=256"])
    featherweight.export(tmp_path / "small", "gguf", tmp_path / "out.gguf", settings={"planes": "siblings"})
    assert metadata_of(tmp_path / "out.gguf")["fucina.ptqtp.tie_scales"] == 1


def test_rotated_codes_are_decoded(wide: Path, tmp_path: Path) -> None:
    changes = ["transforms=[{kind: hadamard}]"]
    featherweight.compress(wide, "rtn-4", tmp_path / "small", changes=changes)
    made = checked(tmp_path / "small", tmp_path / "out.gguf", gguf.MODEL_ARCH.LLAMA)
    verdict = next(v for v in made.verdicts if v.tensor.endswith("up_proj.weight"))
    assert (verdict.becomes, verdict.fate) == ("Q8_0", "rounded")
    assert "hadamard" in verdict.why
    assert 0 < (verdict.error or 0) < 0.01


def test_coded_ends(wide: Path, tmp_path: Path) -> None:
    featherweight.compress(wide, "rtn-4", tmp_path / "small", changes=["embedding=6bit", "head=4bit"])
    made = checked(tmp_path / "small", tmp_path / "out.gguf", gguf.MODEL_ARCH.LLAMA)
    assert becoming(made)["model.embed_tokens.weight"].startswith("Q8_0")


def test_columns_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """20 columns a head, 80 in a row: F16, as llama.cpp's quantiser does."""
    folder = make_tiny("llama", tmp_path / "model", tokenizer=True, hidden_size=80, intermediate_size=144, head_dim=20)
    featherweight.compress(folder, "ptqtp", tmp_path / "small")
    made = checked(tmp_path / "small", tmp_path / "out.gguf", gguf.MODEL_ARCH.LLAMA)
    verdict = next(v for v in made.verdicts if v.tensor.endswith("up_proj.weight"))
    assert (verdict.becomes, verdict.fate) == ("F16", "rounded")
    assert "80 columns are no whole blocks of Q8_0" in verdict.why


def test_the_bundled_model(tmp_path: Path) -> None:
    made = checked(ASSETS / "reference", tmp_path / "out.gguf", gguf.MODEL_ARCH.LLAMA)
    assert {v.becomes for v in made.verdicts} == {"BF16", "F32"}
    about = metadata_of(tmp_path / "out.gguf")
    assert about["tokenizer.ggml.model"] == "gpt2"
    assert about["tokenizer.ggml.pre"] == "gpt-2"
    assert about["general.file_type"] == 32
    assert about["llama.rope.freq_base"] == 10000.0


def test_equal_exports_are_equal_bytes(wide: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        featherweight.export(wide, "gguf", tmp_path / name, settings={"name": "same"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_progress_comes_to_its_end(wide: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    featherweight.export(wide, "gguf", tmp_path / "out.gguf", told=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tipe": "q8_0"}, "did you mean 'type'"),
        ({"type": "q4_km"}, "did you mean 'q4_k_m'"),
        ({"other": "q4_0"}, "other is 'q4_0'"),
        ({"imatrix": "nowhere.dat"}, "no file nowhere.dat"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str, wide: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        featherweight.export(wide, "gguf", tmp_path / "out.gguf", settings=settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "said"), [("opt", "'opt'"), ("gpt2", "'gpt2'"), ("mixtral", "'mixtral'")])
def test_families_without_a_place(name: str, said: str, tmp_path: Path) -> None:
    folder = make_tiny(name, tmp_path / "model", tokenizer=True)
    with pytest.raises(CheckpointError, match=f"{said}, for which there is no GGUF here: known are llama"):
        featherweight.export(folder, "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def changed(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99, llama.cpp by that of 16"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic', which GGUF lacks"),
        ("llama", {"max_position_embeddings": None}, "config.json lacks what a GGUF of llama says"),
    ],
)
def test_what_llama_cpp_computes_otherwise(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = changed(family(name, tmp_path / "model"), **changes)
    with pytest.raises(CheckpointError, match=said):
        featherweight.export(folder, "gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = family("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.adapter.weight": torch.ones(4, 4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="adapter.weight cannot be written as GGUF: llama.cpp's llama has no such"):
        featherweight.export(folder, "gguf", tmp_path / "out.gguf")


def test_values_beyond_f16(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = family("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="up_proj.weight has values beyond those of F16"):
        featherweight.export(folder, "gguf", tmp_path / "out.gguf", settings={"type": "f16"})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_bands_of_llama3(tmp_path: Path) -> None:
    """The factors divide the frequencies into those that transformers computes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = family("llama", tmp_path / "model", head_dim=32, rope_parameters=rope)
    featherweight.export(folder, "gguf", tmp_path / "out.gguf")
    factors = dequantised(tensors_of(tmp_path / "out.gguf")["rope_freqs.weight"])
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(folder), torch.device("cpu"))
    plain = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / factors, frequencies.numpy(), rtol=1e-5)
    assert len(set(factors.tolist())) > 2
