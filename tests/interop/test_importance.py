"""Importance matrices in both forms of llama.cpp and from our statistics; ggml's own encoder, where it is installed."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import dequantised, tensors_of

import featherweight
from featherweight.errors import OutputError, RecipeError
from featherweight.interop.gguf_writing.block_types import TYPES
from featherweight.interop.gguf_writing.ggml_library import NEED_IMPORTANCE, VARIABLE, encode_rows, library_path
from featherweight.interop.gguf_writing.importance import Importance, read_importance, write_importance
from featherweight.methods.calibrate.statistics_file import load_statistics
from featherweight.tasks.compress.gather import gather_statistics
from models import make_tiny

MEANS = {
    "blk.0.attn_q.weight": np.linspace(0.1, 3, 64, dtype=np.float32),
    "blk.1.ffn_down.weight": np.linspace(2, 0, 128, dtype=np.float32),
}
LIBRARY = pytest.mark.skipif(library_path() is None, reason="needs llama-cpp-python, or FEATHERWEIGHT_GGML")


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_written_and_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"imatrix.{form}"
    write_importance(Importance(MEANS, 4096, ("texts",)), path, form)
    found = read_importance(path)
    assert found.tokens == 4096
    assert found.sources == ("texts",)
    assert found.means.keys() == MEANS.keys()
    for name, values in MEANS.items():
        np.testing.assert_allclose(found.means[name], values, rtol=1e-6)


def test_the_bare_form_is_the_documented_one(tmp_path: Path) -> None:
    """Number of entries; each: name, calls, values times calls; then chunks and the text's name."""
    path = tmp_path / "imatrix.dat"
    values = struct.pack("<4f", 2, 4, 6, 8)
    entry = struct.pack("<i", 5) + b"a.b.c" + struct.pack("<ii", 2, 4) + values
    path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 3) + b"txt")
    found = read_importance(path)
    assert found.means["a.b.c"].tolist() == [1, 2, 3, 4]
    assert found.sources == ("txt",)
    write_importance(Importance(found.means, 1024, found.sources), tmp_path / "again.dat", "dat")
    assert (tmp_path / "again.dat").read_bytes() == path.read_bytes()


def test_the_form_in_gguf_has_sums_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_importance(Importance(MEANS, 1024), path, "gguf")
    found = tensors_of(path)
    name = "blk.0.attn_q.weight"
    assert found[f"{name}.counts"].data.reshape(-1).tolist() == [1024]
    np.testing.assert_allclose(found[f"{name}.in_sum2"].data.reshape(-1), MEANS[name] * 1024, rtol=1e-6)
    fields = gguf.GGUFReader(path).fields
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.chunk_count"].contents() == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no importance matrix"),
        (struct.pack("<i", 0), "holds 0 matrices"),
        (struct.pack("<ii", 1, 1 << 20), "a name of 1048576 bytes"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 100) + b"1234", "ends within the values of a"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, -1.0), "are no mean squares"),
        (b"GGUF" + b"\0" * 20, "is no importance matrix"),
    ],
)
def test_files_that_are_none(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=said) as caught:
        read_importance(path)
    assert str(path) in str(caught.value)


def test_from_our_statistics(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", tokenizer=True)
    settings = {"sequences": 8, "length": 64}
    statistics = gather_statistics(model, tmp_path / "statistics.safetensors", None, ["gram"], settings)
    out = tmp_path / "imatrix.gguf"
    featherweight.export(model, "imatrix", out, settings={"statistics": statistics})
    found = read_importance(out)
    grams = load_statistics(statistics)
    for part, name in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        wanted = grams[f"model.layers.1.{part}"]["gram"].diagonal()
        np.testing.assert_allclose(found.means[f"blk.1.{name}.weight"], wanted.numpy(), rtol=1e-5)
    assert found.tokens == int(grams["model.layers.1.mlp.down_proj"]["tokens"])
    with pytest.raises(RecipeError, match="--set statistics=FILE"):
        featherweight.export(model, "imatrix", tmp_path / "other.gguf")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the work; a file that is no library too."""
    model = make_tiny("llama", tmp_path / "model", tokenizer=True, hidden_size=256)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing.so"))
    with pytest.raises(OutputError, match=r"nothing.so cannot be used to encode Q\d_K"):
        featherweight.export(model, "gguf", tmp_path / "out.gguf", settings={"type": "q4_k_m"})
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'featherweight\[gguf\]'"):
        featherweight.export(model, "gguf", tmp_path / "out.gguf", settings={"type": "q4_k_m"})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


ROWS = 4
SEARCHED = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
LARGEST = {"Q2_K": 0.35, "Q3_K": 0.17, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.03, "IQ4_NL": 0.09, "IQ4_XS": 0.09}


@LIBRARY
@pytest.mark.parametrize("name", SEARCHED)
def test_encoded_by_ggml(name: str) -> None:
    """Near the values, by the package's decoder; columns of weight are nearer than others."""
    torch.manual_seed(1)
    values = torch.randn(ROWS, 256)
    importance = np.ones(256, np.float32)
    importance[::2] = 100
    kind = TYPES[name]
    made = encode_rows(kind, values.numpy(), importance)
    assert made.shape == (ROWS, 256 // kind.weights * kind.nbytes)
    decoded = gguf.dequantize(made, gguf.GGMLQuantizationType[name]).reshape(ROWS, 256)
    lost = (torch.from_numpy(decoded.copy()) - values).square()
    assert float(lost.sum() / values.square().sum()) ** 0.5 < LARGEST.get(name, 0.6) * 1.5
    assert float(lost[:, ::2].sum()) < float(lost[:, 1::2].sum())
    plain = encode_rows(kind, values.numpy(), None)
    decoded = gguf.dequantize(plain, gguf.GGMLQuantizationType[name]).reshape(ROWS, 256)
    assert float((torch.from_numpy(decoded.copy()) - values).norm() / values.norm()) < LARGEST.get(name, 0.6)


@LIBRARY
def test_arguments_are_checked() -> None:
    with pytest.raises(OutputError, match="not finite"):
        encode_rows(TYPES["Q4_K"], np.full((1, 256), np.nan, np.float32), None)
    with pytest.raises(ValueError, match="100 columns"):
        encode_rows(TYPES["Q4_K"], np.ones((1, 100), np.float32), None)
    with pytest.raises(ValueError, match="256 columns"):
        encode_rows(TYPES["Q4_K"], np.ones((1, 256), np.float32), np.ones(255, np.float32))
    assert "IQ2_XXS" in NEED_IMPORTANCE


@LIBRARY
def test_a_mixture(tmp_path: Path) -> None:
    """Types of its tensors, errors as they are measured by the package's decoder, and less error by an importance
    matrix where it says so."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    model = make_tiny("llama", tmp_path / "model", tokenizer=True, **shape)
    made = featherweight.export(model, "gguf", tmp_path / "out.gguf", settings={"type": "q4_k_m"})
    becomes = {verdict.tensor: verdict for verdict in made.verdicts}
    assert becomes["lm_head.weight"].becomes == "Q6_K"
    assert becomes["model.layers.0.mlp.down_proj.weight"].becomes == "Q6_K"
    assert becomes["model.layers.1.mlp.down_proj.weight"].becomes == "Q4_K"
    assert becomes["model.layers.1.self_attn.o_proj.weight"].becomes == "Q5_0"  # 64 columns
    assert "64 columns are no whole blocks of Q4_K" in becomes["model.layers.1.self_attn.o_proj.weight"].why
    found = dequantised(tensors_of(tmp_path / "out.gguf")["blk.1.ffn_up.weight"])
    from safetensors.torch import load_file

    wanted = load_file(model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float()
    lost = float((torch.from_numpy(found.copy()) - wanted).norm() / wanted.norm())
    assert lost == pytest.approx(becomes["model.layers.1.mlp.up_proj.weight"].error, rel=1e-3)
