"""Every operator against the decoded matrix in float64, and integers against integers."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

from featherweight.storage.codes.base import Code
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.hadamard import Hadamard, rotate
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.storage.codes.sum import Sum
from featherweight.storage.codes.uniform import Uniform

pytest.importorskip("triton.language", reason="Triton is not installed")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double().cpu() - expected).norm() / expected.norm())


def check(
    code: Code,
    device: torch.device,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    packing: str = "base3",
    bias: bool = False,
) -> None:
    """`linear` against float64, with activations as they are."""
    from featherweight.model.products.triton import linear, pack_terms

    x = torch.randn(tokens, code.shape[1], generator=cases.generator(tokens)).to(dtype)
    b = torch.randn(code.shape[0], generator=cases.generator(11)).to(dtype) if bias else None
    operands = [operand.to(device) for operand in pack_terms(code.spec, code.tensors(), packing)]  # type: ignore[arg-type]
    y = linear(x.to(device), operands, None if b is None else b.to(device))
    assert y.dtype == dtype
    assert y.shape == (tokens, code.shape[0])
    expected = x.double() @ code.decode().double().t() + (0 if b is None else b.double())
    assert error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("packing", ["base3", "2bit"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("planes", "group_size", "tokens"), [(1, 32, 1), (2, 128, 1), (2, 33, 16), (3, 64, 3)])
def test_trit_planes(device: torch.device, planes: int, group_size: int, tokens: int, tied: bool, packing: str) -> None:
    check(cases.trit_planes((37, 130), planes, group_size, tied), device, tokens, packing=packing)


@pytest.mark.parametrize("packing", ["base3", "2bit"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_trit_planes_with_own_weights_and_one_byte_scales(device: torch.device, tokens: int, packing: str) -> None:
    code = cases.trit_planes((9, 70), 2, 32, tied=True, weights=(3, 2), scale_dtype="log8")
    check(code, device, tokens, packing=packing, bias=True)


@pytest.mark.parametrize("tokens", [1, 16])
def test_scales_of_zero_in_one_byte_are_zero(device: torch.device, tokens: int) -> None:
    trits = torch.ones(1, 4, 64, dtype=torch.int8)
    code = type(cases.trit_planes((4, 64), 1, 32)).encode(
        trits, torch.tensor([[0.0, 1.0]] * 4).unsqueeze(-1), 32, scale_dtype="log8"
    )
    check(code, device, tokens)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("symmetric", "group_size", "tokens"), [(False, 64, 1), (True, 50, 5)])
def test_uniform(device: torch.device, bits: int, symmetric: bool, group_size: int, tokens: int) -> None:
    check(cases.uniform((21, 150), bits, group_size, symmetric), device, tokens)


@pytest.mark.parametrize(
    ("bits", "group_size", "tokens"), [(2, 32, 1), (3, None, 5), (4, None, 1), (4, 48, 16), (8, None, 2)]
)
def test_codebook(device: torch.device, bits: int, group_size: int | None, tokens: int) -> None:
    check(cases.codebook((19, 101), bits, group_size), device, tokens)


@pytest.mark.parametrize(
    ("group_size", "lane_stride", "tokens"), [(32, 1, 1), (256, 16, 5), (64, 4, 3), (1000, 16, 1), (30, 1, 1)]
)
def test_sherry(device: torch.device, group_size: int, lane_stride: int, tokens: int) -> None:
    """A group of 30 columns cuts quartets, which are then packed trit by trit."""
    check(cases.sherry((18, 138), group_size, lane_stride), device, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16])
def test_half_precision_activations(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    check(cases.trit_planes((40, 96), 2, 32), device, tokens, dtype, bias=True)
    check(cases.uniform((40, 96), 4, 32), device, tokens, dtype)
    check(cases.dense((40, 96), dtype), device, tokens, dtype, bias=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    check(cases.trit_planes((16, 64), 1, 32, scale_dtype=dtype), device, 1)
    check(cases.uniform((16, 64), 4, 32, scale_dtype=dtype), device, 5)


def test_many_tokens_and_more_rows_than_a_block(device: torch.device) -> None:
    check(cases.trit_planes((130, 64), 2, 64, tied=True), device, 64, packing="2bit")
    check(cases.trit_planes((130, 64), 2, 64, tied=True), device, 1)
    check(cases.trit_planes((2, 8), 1, 4), device, 64)


@pytest.mark.parametrize("tokens", [1, 17])
def test_terms_and_steps(device: torch.device, tokens: int) -> None:
    shape = (45, 72)
    terms = cases.trit_planes(shape, 2, 24), cases.low_rank(shape, 5), cases.sparse(shape)
    check(Sum(terms), device, tokens, bias=True)
    check(Sum((*terms, cases.sparse(shape, 0.02), cases.dense(shape, torch.float32))), device, tokens)
    check(Sum((cases.low_rank(shape, 3, torch.int8), cases.sparse(shape, 0.0))), device, tokens)
    order = torch.randperm(72, generator=cases.generator())
    check(Permuted.encode(Hadamard(cases.uniform(shape, 4, 24), 24, 7), order), device, tokens)
    check(Hadamard(cases.trit_planes(shape, 2, 24), 72, 7), device, tokens)
    check(Hadamard(cases.uniform(shape, 4, 8), 36, 7), device, tokens)
    check(ColumnScaled(cases.uniform(shape, 4, 24), cases.scales(72)), device, tokens)


def test_rounded_inputs_follow_the_format(device: torch.device) -> None:
    from featherweight.model.products.triton import matmul, pack_for_gpu

    code = QuantizedInput(cases.uniform((6, 40), 4, 16), bits=6, group_size=16)
    x = torch.randn(3, 40, generator=cases.generator())
    expected = torch.empty_like(x)
    for start in range(0, 40, 16):
        part = x[:, start : start + 16]
        step = (part.abs().amax(1, keepdim=True) / 31).half().float()
        expected[:, start : start + 16] = (part / step).round().clamp(-32, 31) * step
    y = matmul(x.to(device), pack_for_gpu(code.spec, code.tensors()).to(device))
    assert error(y, expected.double() @ code.decode().double().t()) < 3e-6


# --- integers -------------------------------------------------------------------------------------------------------


def int8_product(code: Code, x: Tensor, device: torch.device) -> Tensor:
    """The kernel's sums for activations int8 [tokens, in] whose scales are 1."""
    from featherweight.model.products.triton import pack_for_gpu
    from featherweight.model.products.triton.packed import int8_product as product

    operand = pack_for_gpu(code.spec, code.tensors(), "2bit").to(device)
    assert operand.int8_ready
    assert operand.layout is not None
    size, groups = operand.layout.group_size, operand.layout.groups
    padded = torch.nn.functional.pad(x.int(), (0, size * groups - x.shape[1])).view(len(x), groups, size)
    scales, sums = torch.ones(len(x), groups), padded.sum(-1, dtype=torch.int32)
    partials = product(x.to(device), scales.to(device), sums.to(device), operand, None, None)
    assert partials is not None
    return partials.sum(0).cpu()


@pytest.mark.parametrize(
    "make",
    [
        lambda: cases.trit_planes((33, 150), 2, 64, tied=True),
        lambda: cases.trit_planes((33, 150), 3, 32),
        lambda: cases.uniform((33, 150), 8, 32),
        lambda: cases.uniform((33, 150), 4, 64, symmetric=True),
        lambda: cases.uniform((33, 512), 2, 512),
    ],
)
@pytest.mark.parametrize("value", [127, -128, None])
def test_int8_sums_are_exact(device: torch.device, make: object, value: int | None) -> None:
    code = make()  # type: ignore[operator]
    code = type(code).from_tensors(code.spec, {**code.tensors(), "scales": torch.ones_like(code.scales)})
    shape = (3, code.shape[1])
    x = torch.randint(-128, 128, shape, generator=cases.generator(), dtype=torch.int8)
    x = x if value is None else torch.full(shape, value, dtype=torch.int8)
    expected = x.long() @ code.decode().long().t()
    assert torch.equal(int8_product(code, x, device).long(), expected)


def test_int8_sums_of_the_longest_group_do_not_overflow(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """65536 columns of one scale, all products the largest there is, and zero points besides: sums beyond 2^31.

    The interpreter takes as many chunks side by side as a GPU does, and not two, which is a matter of seconds."""
    from featherweight.model.products.triton import launch

    monkeypatch.setitem(launch.INTERPRETED, "matvec", launch.MATVEC[3])
    size = 1 << 16
    codes = torch.full((1, size), 255, dtype=torch.uint8)
    code = Uniform.encode(codes, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 8, size)
    x = torch.full((1, size), -128, dtype=torch.int8)
    total = float(int8_product(code, x, device)[0, 0])
    assert abs(total - -128 * 255 * size) <= 2**-20 * 128 * 255 * size  # the float32 sum of exact parts


@pytest.mark.parametrize("tokens", [1, 20])
def test_int8_layers(device: torch.device, tokens: int) -> None:
    """Rotation, rounding, product and bias together, against the same rounding in PyTorch."""
    from featherweight.model.products.triton import linear, pack_terms

    code = Hadamard(cases.trit_planes((40, 128), 2, 32, tied=True), 64, 5)
    x = torch.randn(tokens, 128, generator=cases.generator())
    bias = torch.randn(40, generator=cases.generator(1))
    parts = rotate(x, 64, 5).view(tokens, 4, 32)
    step = parts.abs().amax(-1, keepdim=True) / 127
    rounded = ((parts / step).round() * step).view(tokens, 128).double()
    operands = [operand.to(device) for operand in pack_terms(code.spec, code.tensors(), "2bit")]
    y = linear(x.to(device), operands, bias.to(device), "int8")
    assert error(y, rounded @ code.inner.decode().double().t() + bias.double()) < 1e-6


# --- bounds of the interface ----------------------------------------------------------------------------------------


def test_leading_dimensions_strides_and_no_tokens(device: torch.device) -> None:
    from featherweight.model.products.triton import matmul, pack_for_gpu

    code = cases.trit_planes((10, 40), 1, 20)
    operand = pack_for_gpu(code.spec, code.tensors()).to(device)
    wide = torch.randn(2, 3, 80, generator=cases.generator()).to(device)
    x = wide[..., :40]
    expected = x.double().cpu() @ code.decode().double().t()
    assert error(matmul(x, operand), expected) < 3e-6
    assert error(matmul(wide[..., ::2], operand), wide[..., ::2].double().cpu() @ code.decode().double().t()) < 3e-6
    assert matmul(x[:0], operand).shape == (0, 3, 10)


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_wide_offsets_give_the_same_bits(device: torch.device, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 2^31 elements and more are reached by offsets of 64 bits; here small ones are, too."""
    from featherweight.model.products.triton import launch, matmul, pack_for_gpu

    codes = [
        cases.trit_planes((40, 72), 2, 24),
        cases.uniform((40, 64), 4, 32),
        cases.uniform((40, 72), 3, 24),
        cases.codebook((40, 72), 3, 24),
        cases.sherry((40, 64), 32),
    ]
    x = torch.randn(tokens, 72, generator=cases.generator(3)).to(device)
    for code in codes:
        operand = pack_for_gpu(code.spec, code.tensors()).to(device)
        inputs = x[:, : code.shape[1]]
        for precision in ("float", "int8"):
            monkeypatch.setattr(launch, "MOST_NARROW", 1 << 31)
            narrow = matmul(inputs, operand, precision=precision)
            monkeypatch.setattr(launch, "MOST_NARROW", 0)
            assert torch.equal(matmul(inputs, operand, precision=precision), narrow)


def test_equal_bits_on_every_call(device: torch.device) -> None:
    from featherweight.model.products.triton import matmul, pack_for_gpu

    code = cases.trit_planes((10, 256), 2, 32)
    operand = pack_for_gpu(code.spec, code.tensors()).to(device)
    x = torch.randn(1, 256, generator=cases.generator()).to(device)
    assert torch.equal(matmul(x, operand), matmul(x, operand))


def test_nan_and_infinity_reach_the_rows_result(device: torch.device) -> None:
    from featherweight.model.products.triton import matmul, pack_for_gpu

    code = cases.trit_planes((10, 64), 1, 32)
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    for precision in ("float", "int8"):
        y = matmul(x.to(device), pack_for_gpu(code.spec, code.tensors(), "2bit").to(device), precision)  # type: ignore[arg-type]
        assert bool(y[0].isfinite().all())
        assert bool(y[1].isnan().all())


def test_bad_calls_say_what_is_wrong(device: torch.device) -> None:
    from featherweight.model.products.triton import linear, matmul, pack_for_gpu

    code = cases.trit_planes((10, 64), 1, 32)
    operand = pack_for_gpu(code.spec, code.tensors()).to(device)
    x = torch.ones(1, 64, device=device)
    with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32 \[..., 64\]"):
        matmul(x[:, :63], operand)
    with pytest.raises(ValueError, match="float64"):
        matmul(x.double(), operand)
    with pytest.raises(ValueError, match="bias"):
        linear(x, [operand], torch.ones(9, device=device))
    with pytest.raises(ValueError, match="one or more"):
        linear(x, [])
    with pytest.raises(ValueError, match="precision"):
        matmul(x, operand, "int4")  # type: ignore[arg-type]
