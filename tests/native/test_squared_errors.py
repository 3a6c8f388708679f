"""Sums of squares by row: native against PyTorch and against exact arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from featherweight.native import library
from featherweight.native.squared_errors import squared_errors, squared_errors_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (5, 16), (7, 33), (40, 300), (0, 8)], ids=str)
def test_native_is_the_reference(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    decoded = torch.randn(shape)
    missed, total = squared_errors(weight, decoded)
    expected = squared_errors_reference(weight, decoded)
    assert torch.allclose(missed, expected[0], rtol=1e-13)
    assert torch.allclose(total, expected[1], rtol=1e-13)
    for row in range(shape[0]):
        exact = math.fsum((float(w) - float(d)) ** 2 for w, d in zip(weight[row].float(), decoded[row], strict=True))
        assert float(missed[row]) == pytest.approx(exact, rel=1e-13)


@pytest.mark.skipif(library.get() is None, reason="the native library is not installed")
def test_neither_threads_nor_instruction_sets_nor_strides_change_a_bit() -> None:
    wide = torch.randn(70, 800)
    weight, decoded = wide[:, 37:737], torch.randn(70, 700)
    native = library.get()
    assert native is not None
    first = squared_errors(weight, decoded, threads=1)
    for isa in ("baseline", "avx2", "avx512"):
        try:
            native.select_isa(isa)
        except ValueError:
            continue
        for threads in (1, 2, 5):
            again = squared_errors(weight.clone(), decoded, threads=threads)
            assert torch.equal(torch.stack(first), torch.stack(again))
    native.select_isa("auto")


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(ValueError, match="decoded must be float32"):
        squared_errors(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="decoded must be float32"):
        squared_errors(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))
