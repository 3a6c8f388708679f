"""Codes as integers with scales: what is taken over is the matrix that the code decodes to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from featherweight.interop.gguf_writing.block_types import TYPES, decode_blocks, pack_blocks
from featherweight.interop.gguf_writing.integers import forms_of, window_rows
from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.sherry import Sherry, quartet_codes, to_quartets
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

ROWS, COLUMNS = 81, 256


def halves(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) + 0.5).half()


def signs() -> Code:
    return BinaryPlanes.encode(torch.randint(0, 2, (1, ROWS, COLUMNS)) * 2 - 1, halves(ROWS, 2, 1), 128)


def sherry() -> Code:
    trits = torch.randint(0, 2, (ROWS, COLUMNS), dtype=torch.int8) * 2 - 1
    trits[:, ::4] = 0
    return Sherry.encode(quartet_codes(to_quartets(trits, 1)), halves(ROWS, 2), (ROWS, COLUMNS), 128)


def planes(weights: tuple[int, ...] | None, scale_dtype: torch.dtype | str = torch.float16) -> Callable[[], Code]:
    def make() -> Code:
        trits = torch.randint(-1, 2, (2, ROWS, COLUMNS), dtype=torch.int8)
        return TritPlanes.encode(trits, halves(ROWS, 4), 64, tied=True, weights=weights, scale_dtype=scale_dtype)

    return make


def uniform(bits: int, *, symmetric: bool) -> Callable[[], Code]:
    def make() -> Code:
        zeros = None if symmetric else torch.randint(0, 1 << bits, (ROWS, 2))
        return Uniform.encode(torch.randint(0, 1 << bits, (ROWS, COLUMNS)), halves(ROWS, 2), zeros, bits, 128)

    return make


CODES: dict[str, Callable[[], Code]] = {
    "signs": signs,
    "sherry": sherry,
    "tied 3:1": planes(None),
    "tied 3:2": planes((3, 2)),
    "tied with scales of a byte": planes((3, 2), "log8"),
    **{f"{bits} bits": uniform(bits, symmetric=True) for bits in range(1, 9)},
    **{f"{bits} bits with zero points": uniform(bits, symmetric=False) for bits in range(1, 8)},
}


@pytest.mark.parametrize("name", CODES)
def test_integers_are_the_matrix(name: str) -> None:
    code = CODES[name]()
    step = min(40, window_rows(COLUMNS))
    forms = forms_of(code)
    assert forms
    for form in forms:
        parts = [form.rows(first, min(ROWS, first + step)) for first in range(0, ROWS, step)]
        integers = torch.cat(parts).view(torch.uint8 if form.high > 127 else torch.int8).long()
        assert form.low <= int(integers.min())
        assert int(integers.max()) <= form.high
        spread = torch.arange(COLUMNS) // form.group_size
        values = integers * form.scales.double()[:, spread]
        if form.offsets is not None:
            values = values + form.offsets.double()[:, spread]
        if form.scales.dtype == torch.float32:  # 24 bits times a plane's weight: the decoder rounds on the way
            torch.testing.assert_close(values.float(), code.decode(), rtol=2e-7, atol=0)
        else:
            assert torch.equal(values.float(), code.decode())


def test_signs_are_q1_0() -> None:
    code = signs()
    (form,) = forms_of(code)
    assert form.signs
    integers = form.rows(0, ROWS).reshape(-1, 128).numpy()
    scales = form.scales.reshape(-1).half().numpy()
    decoded = decode_blocks(TYPES["Q1_0"], pack_blocks(TYPES["Q1_0"], integers, scales, scales))
    assert torch.equal(torch.from_numpy(decoded).view(ROWS, COLUMNS), code.decode())
