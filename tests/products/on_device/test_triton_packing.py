"""Layouts: bytes, bits, what cannot be packed. Needs no Triton."""

from __future__ import annotations

import subprocess
import sys

import cases
import pytest
import torch

from featherweight.model.products import triton as gpu
from featherweight.model.products.triton.operand import ROW_TILE
from featherweight.model.products.triton.repack import _fraction
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.uniform import Uniform


def test_importing_the_package_does_not_import_triton() -> None:
    program = """
import sys
import featherweight.model.products.triton as gpu
assert gpu.available() in (True, False)
assert "triton" not in sys.modules, "imported Triton"
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = gpu.nothing


@pytest.mark.parametrize(("base", "width"), [(3, 8), (9, 16)])
def test_every_fraction_gives_its_digits_back(base: int, width: int) -> None:
    digits = torch.cartesian_prod(*[torch.arange(base)] * 5).t()  # [5, base^5]
    fraction = _fraction(digits, base)
    assert int(fraction.max()) < 1 << width
    for digit in digits:
        fraction = fraction * base
        assert torch.equal(fraction >> width, digit)
        fraction = fraction & ((1 << width) - 1)


@pytest.mark.parametrize(
    ("code", "packing", "bits"),
    [
        (cases.trit_planes((256, 1024), 1, 128), "base3", 1.625 + 16 / 128),
        (cases.trit_planes((256, 1024), 2, 128), "base3", 3.25 + 32 / 128),
        (cases.trit_planes((256, 1024), 2, 128, tied=True), "base3", 3.25 + 16 / 128),
        (cases.trit_planes((256, 1024), 2, 128), "2bit", 4 + 32 / 128),
        (cases.trit_planes((256, 1024), 3, 128, tied=True), "2bit", 5 + 16 / 128),
        (cases.trit_planes((256, 1024), 1, 32, scale_dtype="log8"), "2bit", 2 + 8 / 32),
        (cases.uniform((256, 1024), 3, 128), "base3", 3 + 24 / 128),
        (cases.codebook((256, 1024), 4), "base3", 4 + 16 * 16 / 1024),
        (cases.sherry((256, 1024), 128), "base3", 1.25 + 16 / 128),
        (cases.dense((256, 1024)), "base3", 16),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bits_per_weight(code: object, packing: str, bits: float) -> None:
    operand = gpu.pack_for_gpu(code.spec, code.tensors(), packing)  # type: ignore[attr-defined, arg-type]
    assert operand.bits_per_weight == bits
    assert operand.describe()["bits_per_weight"] == bits


def test_rows_are_padded_and_neighbours_in_memory() -> None:
    code = cases.uniform((3, 64), 4, 64)
    operand = gpu.pack_for_gpu(code.spec, code.tensors())
    words = operand.tensors["codes"]
    assert words.shape == (1, 8, 1, ROW_TILE)
    assert words.is_contiguous()
    stored, _ = code.unpack()
    for position in range(8):  # position 2 b + j of element e is column 4 (j E + e) + b
        first = 32 * (position % 2) + position // 2
        assert torch.equal(words[0, :, 0, :3].t() >> 4 * position & 15, stored[:, first : first + 32 : 4])


def test_what_cannot_be_packed_is_refused() -> None:
    code = cases.trit_planes((4, 8), 1, 8)
    with pytest.raises(ValueError, match="packing"):
        gpu.pack_for_gpu(code.spec, code.tensors(), "base4")  # type: ignore[arg-type]
    two = Sum((code, cases.low_rank((4, 8), 2)))
    with pytest.raises(ValueError, match="2 terms; use pack_terms"):
        gpu.pack_for_gpu(two.spec, two.tensors())
    assert [operand.kind for operand in gpu.pack_terms(two.spec, two.tensors())] == ["trit-planes", "low-rank"]
    output = {"kind": "uniform", "shape": [4, 8], "bits": 4, "symmetric": True, "group_size": 2, "axis": "output"}
    stored = {"codes": torch.zeros(16, dtype=torch.uint8), "scales": torch.ones(2, 8, dtype=torch.float16)}
    with pytest.raises(ValueError, match="along the output"):
        gpu.pack_for_gpu(output, stored)
    offsets = Uniform.encode(torch.zeros(4, 8), torch.ones(4, 2), None, 4, 4, offsets=torch.ones(4, 2))
    with pytest.raises(ValueError, match="no GPU operator for uniform codes with offsets"):
        gpu.pack_for_gpu(offsets.spec, offsets.tensors())
    planes = {"kind": "offset-trits", "shape": [1, 5], "group_size": 5}
    stored = {name: torch.ones(1, 1, dtype=torch.float16) for name in ("scales", "offsets")}
    with pytest.raises(ValueError, match="no GPU operator for codes of kind 'offset-trits'"):
        gpu.pack_for_gpu(planes, stored | {"trits": torch.zeros(1, dtype=torch.uint8)})
