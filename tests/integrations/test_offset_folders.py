"""Folders with blocks W = scale q + offset, as other tools' formats have them, wherever they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_folders import (
    KEEP,
    Folder,
    assert_same_logits,
    auto_class,
    build,
    from_pretrained,
    layers,
    load_all,
    logits,
)
from torch import Tensor

from featherweight.model.decoder.model import NativeModel
from featherweight.model.layers.modules import set_precision
from featherweight.model.products import pack_code, ready
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import Code
from featherweight.storage.codes.uniform import Uniform
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.analyse.verify import verify

CODED_TOO = tuple(part for part in KEEP if part not in ("embed", "lm_head"))


def blocks(weight: Tensor, bits: int, size: int, dtype: torch.dtype) -> Code:
    """Steps from the least of a group, which is the offset, to its largest."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % size), mode="replicate").view(rows, -1, size)
    low, high = padded.amin(-1), padded.amax(-1)
    scales = ((high - low) / ((1 << bits) - 1)).to(dtype)
    offsets = low.to(dtype)
    q = ((padded - offsets.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)).round().clamp(0, (1 << bits) - 1)
    codes = q.reshape(rows, -1)[:, :columns].to(torch.uint8)
    return Uniform.encode(codes, scales, None, bits, size, scale_dtype=dtype, offsets=offsets)


def four(weight: Tensor) -> Code:
    return blocks(weight, 4, 32, torch.float16)


def five(weight: Tensor) -> Code:
    return blocks(weight, 5, 32, torch.float16)


def two(weight: Tensor) -> Code:
    return blocks(weight, 2, 16, torch.float32)


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    settings: dict[str, Any] = {"codes": (four, five, two), "keep": CODED_TOO}
    return build(request.param, tmp_path_factory.mktemp(request.param), **settings)


def test_the_loaded_model_computes_with_the_decoded_matrices(folder: Folder) -> None:
    model = from_pretrained(auto_class("llama"), folder.path)
    expected = logits(from_pretrained(auto_class("llama"), folder.decoded))
    assert len(layers(model)) >= len(folder.codes)
    found = logits(model)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    set_precision(model, "exact")
    assert_same_logits(logits(model), expected)


def test_the_decoder_runs_them_as_single_operands(folder: Folder) -> None:
    """Prompts and single tokens, the embedding too, whose rows are decoded from the operand."""
    if not ready():
        pytest.skip("the native library is not built")
    packed = [pack_code(code) for code in folder.codes.values()]
    assert all(one.layouts == ("fields",) and not one.note for one in packed)
    tokens = torch.arange(24)
    model = from_pretrained(auto_class("llama"), folder.decoded)
    with torch.no_grad():
        expected = model(tokens.unsqueeze(0)).logits[0]
    for precision, tolerance in (("float", 5e-4), ("int8", 0.06)):
        native = NativeModel.open(folder.path, threads=1, precision=precision)
        found = native.forward(tokens.tolist())
        assert float((found - expected).norm() / expected.norm()) < tolerance, precision
        native.reset()
        for token in tokens.tolist():
            last = native.feed([token])
        assert float((last - expected[-1]).norm() / expected[-1].norm()) < tolerance, precision


def test_folders_are_inspected_and_verified(folder: Folder, tmp_path: Path) -> None:
    """With hashes as a run writes them."""
    (tmp_path / "config.json").write_text((folder.path / "config.json").read_text())
    tensors = load_all(folder.path)
    write_safetensors(tmp_path / "model.safetensors", [blob_of(name, tensor) for name, tensor in tensors.items()], {})
    assert verify(tmp_path).problems == []
    rows = {row["name"]: row for row in inspect_folder(tmp_path)["layers"]}
    for name, code in folder.codes.items():
        assert rows[name]["nbytes"] == code.nbytes == sum(tensors[f"{name}.{n}"].nbytes for n in code.tensors())
        assert "bit with offsets g" in rows[name]["code"]


def test_saving_keeps_every_byte(folder: Folder, tmp_path: Path) -> None:
    model = from_pretrained(auto_class("llama"), folder.path)
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(auto_class("llama"), tmp_path / "saved")
    before, after = layers(model), layers(again)
    for name, layer in before.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(after[name].state_dict()[key], tensor), (name, key)
