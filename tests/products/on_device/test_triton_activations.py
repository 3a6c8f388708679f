"""Rotation and rounding of inputs: the same bits as PyTorch's."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

from featherweight.storage.codes.hadamard import hadamard_transform, random_signs

pytest.importorskip("triton.language", reason="Triton is not installed")


def rounded(x: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rule, once more, in PyTorch."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % size)).view(len(x), -1, size)
    scales = padded.abs().amax(-1) / 127
    usable = scales.isfinite() & (scales > 0)
    codes = (padded / torch.where(usable, scales, 1.0).unsqueeze(-1)).round().clamp(-127, 127)
    codes = torch.where(usable.unsqueeze(-1), codes, 0).to(torch.int8)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return codes.view(len(x), -1)[:, : x.shape[1]], scales, codes.sum(-1, dtype=torch.int32)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu().nan_to_num(nan=-1.0) if a.is_floating_point() else a.cpu(), b.nan_to_num(nan=-1.0))


@pytest.mark.parametrize(("columns", "size"), [(256, 32), (130, 64), (100, 33), (7, 16), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding(device: torch.device, columns: int, size: int, dtype: torch.dtype) -> None:
    from featherweight.model.products.triton import quantize

    x = torch.randn(3, columns, generator=cases.generator()).to(dtype)
    same(quantize(x.to(device), size), rounded(x, size))


def test_rounding_of_ties_zeros_and_what_is_no_number(device: torch.device) -> None:
    from featherweight.model.products.triton import quantize

    x = torch.zeros(1, 32 * 6)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[0, 64] = float("nan")
    x[0, 97] = float("inf")
    x[0, 98] = 1.0
    x[0, 128:160] = torch.linspace(-1e-40, 1e-40, 32)
    x[0, 160:] = torch.linspace(-3e38, 3e38, 32)
    codes, scales, sums = quantize(x.to(device), 32)
    same((codes, scales, sums), rounded(x, 32))
    assert codes[0, :4].tolist() == [127, 0, 2, -2]
    assert scales[0, 1] == 0
    assert bool(scales[0, 2:4].isnan().all())


@pytest.mark.parametrize(
    ("columns", "block", "size"),
    [
        (64, 64, 32),
        (256, 64, 128),
        (96, 32, 64),
        (128, 2, 64),
        (48, 12, 4),
        (192, 96, 16),
        (40, 40, 4),
        (56, 28, 2),
        (60, 20, 15),
        (24, 24, 24),
        (8, 1, 4),
        (6, 3, 4),
        (20, 10, 4),
        (144, 72, 8),
        (288, 144, 32),
        (126, 63, 16),
    ],
)
def test_rotation_and_rounding(device: torch.device, columns: int, block: int, size: int) -> None:
    """The sums of the transform are made in the order of `codes.hadamard`: equal bits, fused or not."""
    from featherweight.model.products.triton import hadamard, quantize

    x = torch.randn(2, columns, generator=cases.generator(block))
    signs = random_signs(11, columns)
    expected = hadamard_transform(x * signs, block)
    assert torch.equal(hadamard(x.to(device), signs.to(device), block).cpu(), expected)
    same(quantize(x.to(device), size, signs.to(device), block), rounded(expected, size))


def test_rotation_refuses_blocks_that_do_not_fit(device: torch.device) -> None:
    from featherweight.model.products.triton import hadamard

    x, signs = torch.ones(1, 48, device=device), torch.ones(48, dtype=torch.int8, device=device)
    for block in (32, 36, 0, 130):
        with pytest.raises(ValueError, match=f"block is {block}"):
            hadamard(x, signs, block)
