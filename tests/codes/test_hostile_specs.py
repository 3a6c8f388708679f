"""Specs that a damaged or hostile config.json may hold: one sentence each, no crash, nothing large made.

Every field of every kind of code is put through values of every type, and so are those of parts within parts.
"""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from code_samples import KINDS, dictionary

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.format import module_layout
from featherweight.storage.codes import (
    UnknownCodeError,
    code_from,
    code_layout,
    code_prefix,
    describe_code,
    pyramid_enumeration,
)
from featherweight.storage.codes.base import code_class

ANYTHING: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 7, 1 << 20, 1 << 40, 10**30, 0.5, math.nan, -math.inf, "", "uniform", "x" * 5000,
    [], [0], [6, 16], [1, -1], [1 << 40, 1 << 40], [[]], [None] * 3, {}, {"kind": "sum"}, {"kind": None},
    {"kind": "dense"}, [{"kind": "dense"}] * 2,
)  # fmt: skip
SHAPE = (6, 16)
MOST_BYTES = 16 << 20
"""What handling specs may take."""


def places(spec: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all fields and items within a spec."""
    for key in spec if isinstance(spec, dict) else range(len(spec)) if isinstance(spec, list) else ():
        yield (*path, key)
        yield from places(spec[key], (*path, key))


def changed(spec: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of a spec with one value put in, or with REMOVED taken out."""
    made = copy.deepcopy(spec)
    place = made
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return made


REMOVED = object()


def judged(spec: dict[str, Any]) -> None:
    """The layout of a spec, or one sentence; what has a layout has a description, and prefixes, too."""
    try:
        layout = code_layout(spec)
    except (UnknownCodeError, ValueError, KeyError, TypeError):
        with pytest.raises(CheckpointError, match=r"^config.json: the code of the\.module ") as told:
            module_layout("the.module", spec)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 500
        return
    for name, entry in layout.items():
        assert name.isidentifier()
        assert all(type(n) is int and 0 <= n < 1 << 63 for n in entry.shape), (spec, name, entry)
        assert isinstance(entry.dtype, torch.dtype)
    for count in (1, 2, 3):
        try:
            first, cuts = code_prefix(spec, count)
        except ValueError:
            continue
        assert set(cuts) == set(code_layout(first))
        assert {cut.tensor for cut in cuts.values()} <= set(layout)
    try:
        assert describe_code(spec)
    except KeyError:  # fields that have a default; `feather inspect` names the folder
        assert code_class(spec).layout(spec) == layout


@pytest.mark.parametrize("name", KINDS)
def test_any_value_in_any_field(name: str) -> None:
    spec = json.loads(json.dumps(KINDS[name](*SHAPE).spec))
    judged(spec)
    tracemalloc.start()
    try:
        for path in places(spec):
            for value in (*ANYTHING, REMOVED):
                judged(changed(spec, path, value))
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_another_spec_are_refused_before_anything_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tensors of the code as it is, a changed number is one that does not fit, or changes no tensor."""
    code = KINDS[name](*SHAPE)
    spec, stored = json.loads(json.dumps(code.spec)), code.tensors()
    layout = code_layout(spec)
    made: list[str] = []
    for path in places(spec):
        for value in (-1, 0, 1, 5, 1 << 20, 1 << 30):
            other = changed(spec, path, value)
            try:
                if code_layout(other).items() <= layout.items():  # also where a tensor is no longer asked for
                    continue
            except (UnknownCodeError, ValueError, KeyError, TypeError):
                continue
            monkeypatch.setattr(code_class(other), "from_tensors", lambda *_: made.append("a code"))
            with pytest.raises(ValueError, match="is missing|expected"):
                code_from(other, stored)
            monkeypatch.undo()
    assert not made


def test_the_largest_pyramid_takes_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of vectors have thousands of bits: what counts them keeps a row, not the table that decoding needs."""
    monkeypatch.setattr(pyramid_enumeration, "count_table", None)
    spec = {"kind": "pyramid", "shape": [8, 1024], "dimension": 512, "pulses": 1024, "amplitude_bits": 2}
    bits = code_layout(spec)["directions"].shape[0] // 2  # of each of 16 vectors
    most = math.lgamma(512 + 1024) - math.lgamma(512) - math.lgamma(1025) + 512 * math.log(2)
    assert 1024 < bits < most / math.log(2)  # at most the ways to choose sizes and signs


def wrapped(spec: dict[str, Any], way: str) -> dict[str, Any]:
    if way == "inner":
        return {"kind": "permuted", "inner": spec}
    if way == "terms":
        return {"kind": "sum", "terms": [{"kind": "dense", "dtype": "float32"}, spec]}
    other = {"kind": "dense", "dtype": "float32", "shape": [8, 8]}
    return {"kind": "product", "left": spec if way == "left" else other, "right": spec if way == "right" else other}


@pytest.mark.parametrize("ways", [("inner",), ("terms",), ("left",), ("right",), ("left", "inner", "right", "terms")])
def test_parts_within_parts_without_end(ways: tuple[str, ...]) -> None:
    """Eight deep is the most, by whatever fields; a thousand is refused as fast, without exhausting the stack."""
    spec: dict[str, Any] = {"kind": "dense", "dtype": "float32"}
    for depth in range(1, 1000):
        spec = wrapped(spec, ways[depth % len(ways)])
        if depth <= 8:
            code_layout({**spec, "shape": [8, 8]})
        elif depth in (9, 10, 999):
            with pytest.raises(ValueError, match="more than 8 deep"):
                code_layout({**spec, "shape": [8, 8]})


def test_a_spec_as_wide_as_a_file_is_read_once() -> None:
    """Time grows with the file and no faster: thousands of terms, or of unknown values, take a second."""
    term = {"kind": "dense", "dtype": "float32"}
    assert len(code_layout({"kind": "sum", "shape": [2, 2], "terms": [term] * 20_000})) == 20_000
    assert len(code_layout({**term, "shape": [2, 2], "unknown": [[0]] * 20_000})) == 1


@pytest.mark.parametrize("field", ["left", "right"])
def test_unknown_kinds_within_a_product_ask_for_an_update(field: str) -> None:
    spec = dictionary(8, 24).spec
    with pytest.raises(UnknownCodeError, match=r"no code of the kind 'spars' \(did you mean 'sparse'\?\)"):
        code_layout({**spec, field: {**spec[field], "kind": "spars"}})


def test_a_product_is_no_way_to_a_matrix_that_no_file_holds() -> None:
    """Empty sparse factors cost next to nothing to store; their width is bounded by the layer's."""
    empty = {"kind": "sparse", "entries": 0, "value_dtype": "float16"}
    for inner in (385, 1 << 20, 1 << 30, 1 << 62):
        spec = {
            "kind": "product",
            "shape": [8, 24],
            "left": {**empty, "shape": [8, inner]},
            "right": {**empty, "shape": [inner, 24]},
        }
        with pytest.raises(ValueError, match="at most 384|shape is"):
            code_layout(spec)
