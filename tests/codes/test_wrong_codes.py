"""Specs and tensors that are no code are refused with what is wrong in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from code_samples import KINDS, sparse

from featherweight.storage.codes import Code, code_from, code_layout
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.permuted import Permuted
from featherweight.storage.codes.sum import Sum

DENSE = {"kind": "dense", "dtype": "float32"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "hadamard", "block": 7, "seed": 0, "inner": DENSE}, "block is 7.*nearest is"),
        ({"kind": "hadamard", "block": 16, "seed": 0, "inner": DENSE}, "block is 16"),
        ({"kind": "hadamard", "block": 4, "seed": -1, "inner": DENSE}, "seed"),
        ({"kind": "hadamard", "block": 4, "seed": 0}, "inner is None"),
        (
            {"kind": "hadamard", "block": 4, "seed": 0, "inner": {**DENSE, "shape": [4, 12]}},
            r"inner has shape \[4, 12\]",
        ),
        ({"kind": "permuted", "inner": [DENSE]}, "inner is"),
        ({"kind": "column-scaled", "inner": DENSE, "scale_dtype": "int8"}, "scale_dtype"),
        ({"kind": "sum", "terms": [DENSE]}, "terms is"),
        ({"kind": "sum", "terms": [DENSE, {"dtype": "float32"}]}, "terms_1 is"),
        ({"kind": "sparse", "entries": 97}, "entries"),
        ({"kind": "sparse"}, "entries"),
        ({"kind": "masked", "entries": 97}, "entries"),
        ({"kind": "masked", "entries": 9, "bits": 1}, "bits is 1"),
        ({"kind": "masked", "entries": 9, "value_dtype": "int8"}, "value_dtype"),
        ({"kind": "low-rank", "rank": 9}, "rank"),
        ({"kind": "low-rank", "rank": 2, "factor_dtype": "int4"}, "factor_dtype"),
        ({"kind": "codebook", "bits": 9}, "bits"),
        ({"kind": "codebook", "bits": 2, "group_size": 0}, "group_size"),
        ({"kind": "binary-planes", "planes": 0, "group_size": 8}, "planes"),
        ({"kind": "binary-planes", "planes": 2, "group_size": 8, "rows_per_scale": 0}, "rows_per_scale"),
        ({"kind": "binary-planes", "planes": 2, "group_size": 8, "shift_terms": 0}, "shift_terms"),
        ({"kind": "binary-planes", "planes": 2, "group_size": 8, "shift_terms": 3, "exponent_bias": 200}, "exponent"),
        ({"kind": "offset-trits", "group_size": 8, "packing": "base4"}, "packing"),
        ({"kind": "uniform", "bits": 3, "group_size": 8, "axis": "rows"}, "axis"),
        ({"kind": "uniform", "bits": 3, "group_size": 8, "offsets": 1}, "offsets is 1, expected true or false"),
        ({"kind": "uniform", "bits": 3, "group_size": 8, "offsets": True, "symmetric": True}, "offsets is true"),
        ({"kind": "uniform", "bits": 3, "group_size": 8, "offsets": True, "axis": "output"}, "offsets is true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_spec_is_a_value_error(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_layout({"shape": [8, 12], **spec})


def test_specs_nested_without_end_are_refused() -> None:
    spec: dict[str, Any] = DENSE
    for depth in range(400):
        spec = {"kind": "permuted", "inner": spec}
        if depth < 7:
            code_layout({"shape": [8, 12], **spec})
    with pytest.raises(ValueError, match="deep"):
        code_layout({"shape": [8, 12], **spec})
    with pytest.raises(ValueError, match="inner has shape 7"):
        code_layout({"shape": [8, 12], "kind": "permuted", "inner": {**DENSE, "shape": 7}})


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("order", lambda t: torch.zeros_like(t), "permutation"),
        ("row_pointers", lambda t: t.flip(0), "row_pointers"),
        ("columns", lambda t: t + 100, "columns"),
        ("columns", lambda t: t.flip(0), "ascending"),
        ("shifts", lambda t: torch.full_like(t, -128), "-128"),
    ],
)
def test_damaged_tensors_are_refused(tensor: str, change: Any, message: str) -> None:
    code: Code = {
        "order": KINDS["permuted"](6, 16),
        "shifts": KINDS["binary-planes-shifts"](6, 16),
    }.get(tensor, sparse(6, 16))
    with pytest.raises(ValueError, match=message):
        code_from(code.spec, code.tensors() | {tensor: change(code.tensors()[tensor])})


def test_terms_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        Sum.of(Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="column_scales"):
        ColumnScaled(Dense(torch.zeros(2, 3)), torch.zeros(2))
    with pytest.raises(ValueError, match="order has 2"):
        Permuted.encode(Dense(torch.zeros(2, 3)), torch.arange(2))
    with pytest.raises(ValueError, match="-1 or 1"):
        BinaryPlanes.encode(torch.zeros(1, 2, 3), torch.zeros(2, 1, 1), 8)
    with pytest.raises(ValueError, match="codebooks"):
        Codebook.encode(torch.zeros(2, 3), torch.zeros(2, 3))
