"""Folders whose layers are products of two codes: loading, generating, the native decoder, inspection, verification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_folders import (
    Folder,
    assert_same_logits,
    auto_class,
    build,
    from_pretrained,
    layers,
    load_all,
    logits,
)
from safetensors.torch import save_file
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.layers.modules import set_precision
from featherweight.model.products import ready
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.masked import Masked
from featherweight.storage.codes.product import Product
from featherweight.storage.codes.sparse import Sparse
from featherweight.storage.codes.uniform import Uniform
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.analyse.verify import verify

KEPT = 24


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:KEPT].sqrt()
    return (u[:, :KEPT] * root).contiguous(), (root.unsqueeze(1) * v[:KEPT]).contiguous()


def sparse_product(weight: Tensor) -> Code:
    left, right = factors(weight)
    return Product(Dense(left.half()), Sparse.encode(right, right.abs() > right.abs().mean()))


def masked_product(weight: Tensor) -> Code:
    left, right = factors(weight)
    return Product(Masked.encode(left, left.abs() > left.abs().mean(), bits=8), Dense(right.half()))


def single_product(weight: Tensor) -> Code:
    left, right = factors(weight)
    scales = left.abs().amax(1, keepdim=True) / 7
    codes = (left / scales).round().clamp(-8, 7) + 8
    return Product(Uniform.encode(codes, scales, None, 4, KEPT), Dense(right.bfloat16()))


@pytest.fixture(scope="module", params=[sparse_product, masked_product, single_product])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return build("llama", tmp_path_factory.mktemp(request.param.__name__), codes=(request.param,))


def test_the_loaded_model_computes_with_the_decoded_matrices(folder: Folder) -> None:
    model = from_pretrained(auto_class("llama"), folder.path)
    expected = logits(from_pretrained(auto_class("llama"), folder.decoded))
    assert len(layers(model)) == len(folder.codes)
    found = logits(model)  # two products a layer
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    set_precision(model, "exact")
    assert_same_logits(logits(model), expected)


def test_the_decoder_runs_single_factors_and_hands_over_others(folder: Folder) -> None:
    if not ready():
        pytest.skip("the native library is not built")
    code = next(iter(folder.codes.values()))
    assert isinstance(code, Product)
    if isinstance(code.right, Sparse) or isinstance(code.left, Masked):
        with pytest.raises(UnsupportedModelError, match=r"only where each is a single matrix .* not sparse, .*q_proj"):
            NativeModel.open(folder.path, threads=1)
        return
    tokens = torch.arange(15)
    model = from_pretrained(auto_class("llama"), folder.decoded)
    with torch.no_grad():
        expected = model(tokens.unsqueeze(0)).logits[0]
    for precision, tolerance in (("float", 5e-4), ("int8", 0.06)):
        found = NativeModel.open(folder.path, threads=1, precision=precision).forward(tokens.tolist())
        assert float((found - expected).norm() / expected.norm()) < tolerance, precision


def test_folders_are_inspected_and_verified(folder: Folder, tmp_path: Path) -> None:
    """With hashes as a run writes them; what is missing or of another shape is named."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text((folder.path / "config.json").read_text())
    tensors = load_all(folder.path)
    write_safetensors(made / "model.safetensors", [blob_of(name, tensor) for name, tensor in tensors.items()], {})
    assert verify(made).problems == []
    report = inspect_folder(made)
    rows = {row["name"]: row for row in report["layers"]}
    for name, code in folder.codes.items():
        assert rows[name]["nbytes"] == code.nbytes == sum(tensors[f"{name}.{n}"].nbytes for n in code.tensors())
        assert rows[name]["code"].startswith(f"product over {KEPT} of ")
        assert rows[name]["shape"] == list(code.shape)
    name = next(iter(folder.codes))
    config = json.loads((made / "config.json").read_text())
    for entry in config["quantization_config"]["codes"]:
        if name in entry["modules"]:
            entry["code"]["left"]["shape"][1] += 1
    (made / "config.json").write_text(json.dumps(config))
    assert any("left is" in problem and name in problem for problem in verify(made).problems)


def test_saving_keeps_every_byte(folder: Folder, tmp_path: Path) -> None:
    model = from_pretrained(auto_class("llama"), folder.path)
    model.save_pretrained(tmp_path / "saved")
    before, after = load_all(folder.path), load_all(tmp_path / "saved")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)
    assert {name for name in before if "left_" in name} <= after.keys()


def test_a_damaged_factor_is_told(folder: Folder, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text((folder.path / "config.json").read_text())
    tensors = load_all(folder.path)
    name = next(n for n in tensors if ".left_" in n)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(FeatherError, match=name.split(".")[-1]):
        logits(from_pretrained(auto_class("llama"), made))
