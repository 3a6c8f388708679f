"""The first terms of a sum, the first planes of a stack: what they decode to, and what is read of a file for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from code_samples import KINDS, numbers, signs, sparse, trit_planes, uniform, whole
from torch import Tensor

from featherweight.errors import CheckpointError, FeatherError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import quantization_config
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import Code, code_from, code_layout, code_prefix
from featherweight.storage.codes.base import code_class
from featherweight.storage.codes.binary_planes import BinaryPlanes, power_of_two_terms, values_of_shifts
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.trit_planes import TritPlanes

ROWS, COLUMNS = 6, 24


def planes_of(
    scale_dtype: Any = torch.float16, weights: tuple[int, ...] | None = None, tied: bool = True
) -> TritPlanes:
    trits = whole(-1, 2, 3, ROWS, COLUMNS).to(torch.int8)
    scales = numbers(ROWS, 3).abs() if tied else numbers(ROWS, 3, 3).abs()
    return TritPlanes.encode(trits, scales, 8, tied=tied, scale_dtype=scale_dtype, weights=weights)


def spread(scales: Tensor) -> Tensor:
    """Scales [out, groups] of 8 columns to [out, in]."""
    return scales.float().repeat_interleave(8, 1)[:, :COLUMNS]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_terms_of_a_sum(count: int) -> None:
    terms = uniform(ROWS, COLUMNS, 2), trit_planes(ROWS, COLUMNS), sparse(ROWS, COLUMNS)
    found = Sum.of(*terms).prefix(count)
    expected = terms[0].decode()
    for term in terms[1:count]:
        expected = expected + term.decode()
    assert torch.equal(found.decode(), expected)
    assert found.nbytes == sum(term.nbytes for term in terms[:count])
    assert found.kind == ("uniform" if count == 1 else "sum")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "log8"])
def test_the_first_free_planes(dtype: Any, count: int) -> None:
    code = planes_of(dtype, tied=False)
    trits, scales = code.unpack().float(), code.scales.float()
    expected = spread(scales[:, :, 0]) * trits[0]
    for k in range(1, count):
        expected = expected + spread(scales[:, :, k]) * trits[k]
    found = code.prefix(count)
    assert torch.equal(found.decode(), expected)
    assert found.spec["planes"] == count
    plane = -(-ROWS * COLUMNS // 5)
    wide = 1 if dtype == "log8" else dtype.itemsize
    assert found.nbytes == count * plane + ROWS * 3 * count * wide + (dtype == "log8")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("weights", [None, (5, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, "log8"])
def test_the_first_tied_planes_keep_their_weights(dtype: Any, weights: tuple[int, ...] | None, count: int) -> None:
    code = planes_of(dtype, weights)
    trits, own = code.unpack().float(), weights or (9, 3, 1)
    expected = sum(spread(code.scales) * w * plane for w, plane in zip(own[:count], trits, strict=False))
    found = code.prefix(count)
    assert torch.allclose(found.decode(), expected, rtol=1e-6, atol=0)  # type: ignore[arg-type]
    if dtype == torch.float16:  # 11 bits times an integer below 16: nothing is rounded
        assert torch.equal(found.decode(), expected)  # type: ignore[arg-type]
    assert isinstance(found, TritPlanes)
    assert found.plane_weights == own[:count]
    assert torch.equal(found.scales, code.scales)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_first_binary_planes(shifted: bool, count: int) -> None:
    bits, scales = signs(3, ROWS, COLUMNS), numbers(ROWS, 3, 3).half()
    if shifted:
        shifts = power_of_two_terms(scales, 2)
        code, scales = BinaryPlanes.encode_shifts(bits, shifts, 8), values_of_shifts(shifts)
    else:
        code = BinaryPlanes.encode(bits, scales, 8)
    expected = torch.zeros(ROWS, COLUMNS)
    for k in range(count):
        expected = expected + spread(scales[:, :, k]) * bits[k]
    found = code.prefix(count)
    assert torch.equal(found.decode(), expected)
    assert found.nbytes == count * (ROWS * COLUMNS // 8 + ROWS * 3 * 2)


def test_a_changed_basis_has_the_terms_of_what_it_holds() -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))
    inner = Sum.of(uniform(ROWS, COLUMNS, 2), trit_planes(ROWS, COLUMNS), sparse(ROWS, COLUMNS))
    factors = numbers(COLUMNS).abs()
    for count in (1, 2, 3):
        found = Hadamard(ColumnScaled(Permuted.encode(inner, order), factors), 8, 11).prefix(count)
        expected = Hadamard(ColumnScaled(Permuted.encode(inner.prefix(count), order), factors), 8, 11)
        assert found.spec == expected.spec
        assert torch.equal(found.decode(), expected.decode())
    planes = Hadamard(trit_planes(ROWS, COLUMNS), 8, 3)
    assert torch.equal(planes.prefix(1).decode(), Hadamard(trit_planes(ROWS, COLUMNS).prefix(1), 8, 3).decode())


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_its_prefixes(name: str) -> None:
    """Complete codes that a file could hold; the last is the code itself, and others say how many there are."""
    code = KINDS[name](ROWS, COLUMNS)
    most = code_class(code.spec).summands(code.spec)
    several = ("trit-planes", "binary-planes", "sum", "hadamard", "column-scaled", "quantized-input", "nested")
    assert (most > 1) == (code.kind in several)
    for count in range(1, most + 1):
        found = code.prefix(count)
        assert found.shape == code.shape
        layout = code_layout(found.spec)
        assert {n: (tuple(t.shape), t.dtype) for n, t in found.tensors().items()} == dict(layout.items())
        assert all(tensor.is_contiguous() for tensor in found.tensors().values())
        assert code_prefix(json.loads(json.dumps(code.spec)), count)[0] | {"shape": None} == {
            **found.spec,
            "shape": None,
        }
        assert torch.equal(code_from(found.spec, found.tensors()).decode(), found.decode())
    assert found.spec == code.spec
    assert all(torch.equal(found.tensors()[n], tensor) for n, tensor in code.tensors().items())
    for count in (0, -1, most + 1, True, 1.0, None, "2"):
        with pytest.raises(ValueError, match=f"expected a whole number from 1 to {most}, which it has"):
            code.prefix(count)  # type: ignore[arg-type]


# From a folder -------------------------------------------------------------------------------------------------------


def folder_of(code: Code, folder: Path) -> Path:
    """A folder with this module `layer` and another."""
    folder.mkdir()
    tensors = {f"layer.{name}": tensor for name, tensor in code.tensors().items()}
    tensors |= {f"other.{name}": tensor for name, tensor in trit_planes(ROWS, COLUMNS).tensors().items()}
    write_safetensors(folder / "model.safetensors", [blob_of(name, tensor) for name, tensor in tensors.items()], {})
    specs = {"layer": code.spec, "other": trit_planes(ROWS, COLUMNS).spec}
    config = {"model_type": "test", "quantization_config": quantization_config(specs, {"name": "test"})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that were asked of a file, by tensor."""
    found: dict[str, int] = {}
    own = SafetensorsFile._view

    def view(self: SafetensorsFile, entry: Any, shape: tuple[int, ...], start: int) -> Tensor:
        tensor = own(self, entry, shape, start)
        name = next(name for name, known in self.entries.items() if known is entry)
        found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
        return tensor

    monkeypatch.setattr(SafetensorsFile, "_view", view)
    return found


def test_only_the_tensors_of_the_first_terms_are_read(tmp_path: Path, asked: dict[str, int]) -> None:
    terms = uniform(ROWS, COLUMNS, 2), trit_planes(ROWS, COLUMNS), uniform(ROWS, COLUMNS, 3)
    code = Hadamard(Sum.of(*terms), 8, 11)
    with Checkpoint.open(folder_of(code, tmp_path / "model")) as checkpoint:
        for count in (1, 2, 3):
            asked.clear()
            found = load_code(checkpoint, "layer", count)
            assert torch.equal(found.decode(), code.prefix(count).decode())
            assert found.spec == code.prefix(count).spec
            assert sum(asked.values()) == sum(term.nbytes for term in terms[:count]) == found.nbytes
        asked.clear()
        assert torch.equal(load_code(checkpoint, "layer").decode(), code.decode())
        assert sum(asked.values()) == code.nbytes


def test_only_the_digits_of_the_first_planes_are_read(tmp_path: Path, asked: dict[str, int]) -> None:
    for i, code in enumerate((planes_of(tied=False), planes_of(), planes_of("log8"))):
        with Checkpoint.open(folder_of(code, tmp_path / str(i))) as checkpoint:
            asked.clear()
            found = load_code(checkpoint, "layer", 2)
            assert torch.equal(found.decode(), code.prefix(2).decode())
            plane = -(-ROWS * COLUMNS // 5)
            assert asked["layer.trits"] == 2 * plane
            assert asked["layer.scales"] == code.tensors()["scales"].nbytes
            assert sum(asked.values()) == code.nbytes - plane
    bits = BinaryPlanes.encode(signs(3, ROWS, COLUMNS), numbers(ROWS, 3, 3), 8)
    with Checkpoint.open(folder_of(bits, tmp_path / "bits")) as checkpoint:
        asked.clear()
        assert torch.equal(load_code(checkpoint, "layer", 1).decode(), bits.prefix(1).decode())
        assert asked["layer.signs"] == ROWS * COLUMNS // 8


def test_wrong_requests_are_one_sentence(tmp_path: Path) -> None:
    folder = folder_of(Sum.of(uniform(ROWS, COLUMNS), sparse(ROWS, COLUMNS)), tmp_path / "model")
    with Checkpoint.open(folder) as checkpoint:
        with pytest.raises(CheckpointError, match="no compressed module 'layr'.*did you mean 'layer'"):
            load_code(checkpoint, "layr")
        for terms in (0, 3, -1):
            with pytest.raises(FeatherError, match=f"'layer' of .* first {terms} terms .* from 1 to 2, which it has"):
                load_code(checkpoint, "layer", terms)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    code = planes_of(tied=False)
    folder = folder_of(code, tmp_path / "model")
    with SafetensorsFile.open(folder / "model.safetensors") as file:
        stored = {name: file.tensor(name).clone() for name in file.entries}
    for name, change in (
        ("layer.trits", stored["layer.trits"][:1]),
        ("layer.trits", stored["layer.trits"][:, 1:]),
        ("layer.trits", stored["layer.trits"].reshape(-1)),
        ("layer.scales", stored["layer.scales"][:, :, :1]),
        ("layer.scales", stored["layer.scales"].reshape(-1)),
        ("layer.scales", stored["layer.scales"].float()),
    ):
        blobs = [blob_of(n, change.contiguous() if n == name else tensor) for n, tensor in stored.items()]
        write_safetensors(folder / "model.safetensors", blobs, {})
        said = pytest.raises(CheckpointError, match="'layer' of .* is damaged .*" + name.removeprefix("layer."))
        with Checkpoint.open(folder) as checkpoint, said:
            load_code(checkpoint, "layer", 2)
    write_safetensors(folder / "model.safetensors", [blob_of("layer.trits", stored["layer.trits"])], {})
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="has no tensor 'layer.scales'"):
        load_code(checkpoint, "layer", 2)
