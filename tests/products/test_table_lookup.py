"""The card's tests of TeLLMe v2 (arXiv 2510.15926): exactness, packing, rounding, attention, operation counts.

Index order, block sizes, word format and rounding are the paper's (its authors' sources). The cost formulas, and with
them the cycle counts that are checked here, are reconstructed from loop bounds.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.model.products.simulate.attention import decode_attention, prefill_attention
from featherweight.model.products.simulate.cost import ModelShape, linear_cost, model_cost, tokens_per_second
from featherweight.model.products.simulate.table_lookup import (
    POINTS,
    T_MAC,
    TELLME,
    TL1,
    TL2,
    TableLookup,
    dequantise,
    quantise,
)

MACHINES = pytest.mark.parametrize("machine", POINTS.values(), ids=POINTS)
KV260_BANDWIDTH = 17.1e9


def random_digits(machine: TableLookup, rows: int, columns: int) -> torch.Tensor:
    digits = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    return digits if machine.digits == "ternary" else torch.where(digits < 0, -1, 1).to(torch.int8)


# 1. Tables


def test_index_order_is_the_papers() -> None:
    a, b, c = 1, 10, 100
    sums = TELLME.patterns().long() @ torch.tensor([a, b, c])
    expected = [0, a, b, c, a + b, a - b, a + c, a - c, b + c, b - c, a + b + c, a + b - c, a - b + c, -a + b + c]
    assert sums[:14].tolist() == expected
    assert torch.equal(sums[14:], -sums[1:14])


@MACHINES
def test_entries_are_dot_products(machine: TableLookup) -> None:
    x = torch.randint(-127, 128, (5, 3 * machine.block - 1), dtype=torch.int8)
    tables = machine.build_tables(x)
    padded = torch.nn.functional.pad(x.long(), (0, 1)).unflatten(-1, (-1, machine.group))
    assert torch.equal(tables.long(), padded @ machine.patterns().long().T)
    zero = int(machine.digits == "ternary")
    half = (machine.entries - zero) // 2
    assert torch.equal(tables[..., zero + half :], -tables[..., zero : zero + half])


@MACHINES
def test_encoder_is_a_bijection(machine: TableLookup) -> None:
    allowed = (-1, 0, 1) if machine.digits == "ternary" else (-1, 1)
    words = torch.tensor(list(itertools.product(allowed, repeat=machine.group)), dtype=torch.int8)
    indices = machine.encode(words)
    assert sorted(indices[:, 0].tolist()) == list(range(machine.entries))
    assert torch.equal(machine.decode(indices, machine.group), words)


def test_what_is_no_digit_is_refused() -> None:
    with pytest.raises(ValueError, match="digits"):
        TELLME.encode(torch.tensor([[0, 2, 1]], dtype=torch.int8))
    with pytest.raises(ValueError, match="digits"):
        T_MAC.encode(torch.zeros(1, 4, dtype=torch.int8))


# 2. Products


@given(
    st.sampled_from(list(POINTS.values())), st.integers(1, 5), st.integers(1, 40), st.integers(1, 200), st.integers(0)
)
def test_product_is_exact(machine: TableLookup, tokens: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed % (1 << 32))
    x = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8)
    weight = random_digits(machine, rows, columns)
    sums, _ = machine.multiply(x, machine.encode(weight))
    assert torch.equal(sums.long(), x.long() @ weight.long().T)


@MACHINES
@pytest.mark.parametrize("columns", [83, 84, 85, 4096, 66051])
def test_extremes_are_exact(machine: TableLookup, columns: int) -> None:
    x = torch.full((2, columns), 127, dtype=torch.int8)
    x[1, ::2] = -127
    weight = torch.ones(3, columns, dtype=torch.int8)
    weight[1] = -1
    weight[2, ::2] = -1
    sums, _ = machine.multiply(x, machine.encode(weight))
    assert torch.equal(sums.long(), x.long() @ weight.long().T)
    assert int(machine.build_tables(x).amax()) == 127 * machine.group


def test_accumulators_that_could_overflow_are_refused() -> None:
    columns = 66_060  # 127 of it is beyond 2^23
    x = torch.zeros(1, columns, dtype=torch.int8)
    with pytest.raises(ValueError, match="accumulators"):
        TELLME.multiply(x, torch.zeros(1, TELLME.blocks(columns) * 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="-127"):
        TELLME.multiply(torch.full((1, 84), -128, dtype=torch.int8), torch.zeros(1, 28, dtype=torch.uint8))


def test_planes_share_tables() -> None:
    x = torch.randint(-127, 128, (2, 200), dtype=torch.int8)
    planes = torch.stack([random_digits(TELLME, 7, 200) for _ in range(2)])
    sums, counts = TELLME.multiply(x, torch.stack([TELLME.encode(plane) for plane in planes]))
    assert torch.equal(sums.long(), x.long() @ planes.long().transpose(1, 2))
    _, one = TELLME.multiply(x, TELLME.encode(planes[0]))
    assert counts.lookups == 2 * one.lookups
    assert counts.table_additions == one.table_additions


# 3. Memory words


@MACHINES
@pytest.mark.parametrize(("rows", "columns"), [(1536, 1536), (7, 100), (5, 84), (1, 1)])
def test_packing_is_reversible(machine: TableLookup, rows: int, columns: int) -> None:
    indices = machine.encode(random_digits(machine, rows, columns))
    field = torch.randint(0, 1 << machine.field_bits, (machine.blocks(columns), machine.words(rows)), dtype=torch.int32)
    words = machine.pack(indices, field)
    found, found_field = machine.unpack(words, rows)
    assert torch.equal(found, indices)
    assert torch.equal(found_field, field)


def test_words_are_the_papers() -> None:
    indices = TELLME.encode(random_digits(TELLME, 1536, 1536))
    field = torch.full((19, 308), 0xABCD, dtype=torch.int32)
    words = TELLME.pack(indices, field)
    assert words.shape == (19, 308, 96)  # 768 bits
    number = int.from_bytes(words[3, 17].numpy().tobytes(), "little")
    assert number >> 700 & 0xFFFF == 0xABCD
    assert number >> 716 == 0
    assert number >> 140 & 31 == int(
        indices[17 * 5 + 1, 3 * 28]
    )  # the second output begins behind the first 28 indices
    assert TELLME.bits_per_weight == pytest.approx(5 / 3)
    assert TELLME.bus_bits_per_weight == pytest.approx(1.829, abs=5e-4)


def test_words_too_narrow_are_refused() -> None:
    with pytest.raises(ValueError, match="word of 128 bits"):
        TableLookup(word_bits=128)


# 4. Rounding


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantise(x).values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    # the same ties at a scale that is no power of two: 127 x / m = k + 1/2
    assert quantise(torch.tensor([[254.0, 1.0, 3.0, 5.0]])).values.tolist() == [[127, 0, 2, 2]]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_the_largest_reaches_the_end(values: list[float]) -> None:
    found = quantise(torch.tensor([values]))
    largest = max(abs(v) for v in values)
    assert int(found.values.abs().amax()) == (127 if largest > 0 else 0)
    assert float(found.largest) == largest


def test_zeros_stay_zero_and_nan_is_refused() -> None:
    values, largest = quantise(torch.zeros(2, 5))
    assert not values.any()
    assert not largest.any()
    sums, _ = TELLME.multiply(values, TELLME.encode(torch.ones(3, 5, dtype=torch.int8)))
    assert torch.equal(dequantise(sums, largest, 0.5), torch.zeros(2, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="finite"):
        quantise(torch.tensor([[math.nan]]))


def test_layer_is_close_to_the_float_product() -> None:
    x, weight = torch.randn(4, 1536), random_digits(TELLME, 64, 1536)
    values, largest = quantise(x)
    sums, _ = TELLME.multiply(values, TELLME.encode(weight))
    expected = 0.02 * x @ weight.float().T
    # a step of the activations is at most m / 127; its error adds up over 1536 columns
    assert float((dequantise(sums, largest, 0.02) - expected).abs().amax()) < 0.02 * float(largest.amax()) / 127 * 40


# 5. Attention


@pytest.mark.parametrize("length", [1, 5, 8, 9, 40, 64])
def test_fused_attention_is_the_dense_one(length: int) -> None:
    query, key, value = torch.randn(3, 2, length, 16, dtype=torch.float64)
    out, rows_read = prefill_attention(query, key, value)
    scores = (query @ key.mT / 4).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ value, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:, 0], value[:, 0], rtol=0, atol=0)  # the first token sees itself alone
    whole = -(-length // 8) * 8
    assert rows_read <= whole * (whole + 8) / 16
    torch.testing.assert_close(decode_attention(query[:, -1], key, value), out[:, -1], rtol=0, atol=1e-12)


def test_attention_survives_large_scores_and_short_queues() -> None:
    query, key, value = 60 * torch.randn(3, 1, 24, 8, dtype=torch.float64)
    out, _ = prefill_attention(query, key, value)
    assert bool(torch.isfinite(out).all())
    with pytest.raises(ValueError, match="queue"):
        decode_attention(query[:, 0], key, value, context=23)


# 6. Counts and costs


@MACHINES
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 300))
def test_counters_equal_the_formulas(machine: TableLookup, tokens: int, rows: int, columns: int) -> None:
    x = torch.zeros(tokens, columns, dtype=torch.int8)
    _, counts = machine.multiply(x, machine.encode(torch.ones(rows, columns, dtype=torch.int8)))
    groups = -(-columns // machine.group)
    additions = {3: 10, 2: 2, 4: 10}[machine.group]  # 6 pairs and 4 triples; 2 pairs; 3 for the first of 8 and 7 more
    assert len(machine.chain()) == additions
    assert counts.lookups == tokens * rows * groups
    assert counts.padded_lookups == tokens * rows * machine.blocks(columns) * machine.tables
    assert counts.table_additions == tokens * groups * additions
    assert counts.accumulations == tokens * rows * machine.blocks(columns)


def test_costs_are_those_of_the_card() -> None:
    """Its check for 0.73B: 0.85 M cycles of products, 1.67 M of loading, at most 110 tokens/s by bandwidth."""
    cost = model_cost(ModelShape(), 1)
    assert cost.compute_cycles == 850_080
    assert cost.load_cycles == cost.cycles == 1_671_840
    assert cost.weight_bytes == 96 * cost.load_cycles
    assert tokens_per_second(ModelShape()) == pytest.approx(149.5, abs=0.1)
    assert 100 < tokens_per_second(ModelShape(), bandwidth=KV260_BANDWIDTH) < 111


@MACHINES
def test_cost_grows_with_tokens_and_outputs(machine: TableLookup) -> None:
    by_tokens = [model_cost(ModelShape(), tokens, machine) for tokens in (1, 2, 3, 8, 64, 512)]
    assert [c.cycles for c in by_tokens] == sorted({c.cycles for c in by_tokens})
    assert len({c.weight_bytes for c in by_tokens}) == 1
    by_outputs = [linear_cost(outputs, 1536, 4, machine).cycles for outputs in range(1, 400)]
    assert by_outputs == sorted(by_outputs)
    assert by_outputs[-1] > by_outputs[0]


def test_a_second_plane_costs_less_than_twice() -> None:
    one, two = (model_cost(ModelShape(), 64, planes=planes) for planes in (1, 2))
    assert one.cycles < two.cycles < 2 * one.cycles


def test_points_are_known_layouts() -> None:
    assert (TL1.entries, TL1.index_bits, TL1.bits_per_weight) == (9, 4, 2)
    assert (TL2.entries, TL2.index_bits) == (27, 5)
    assert (T_MAC.entries, T_MAC.index_bits, T_MAC.bits_per_weight) == (16, 4, 1)
