"""D2Quant's corrections (arXiv 2602.02546): mean shift behind attention, absorption of column scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_network import TinyBlock, tiny_model
from torch import Tensor

from featherweight.methods.quantize.corrections.absorb import AbsorbColumnScales
from featherweight.methods.quantize.corrections.mean_shift import MeanShift
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.storage.codes import Code
from featherweight.storage.codes.binary_planes import BinaryPlanes
from featherweight.storage.codes.codebook import Codebook
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.codes.dense import Dense
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.low_rank import LowRank
from featherweight.storage.codes.offset_trits import OffsetTrits
from featherweight.storage.codes.sum import Sum

GRID = UniformGrid(bits=2, group_size=32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def session_with(folder: Path, family: str = "llama", **overrides: Any) -> TinyBlock:
    return TinyBlock(*tiny_model(folder, family, **overrides))


# Mean shift -----------------------------------------------------------------------------------------------------------


def norm_outputs(session: TinyBlock, shift: Tensor | None = None) -> Tensor:
    seen: list[Tensor] = []
    norm = session.module.post_attention_layernorm
    handle = norm.register_forward_hook(lambda m, a, output: seen.append(output.flatten(0, -2)))
    with torch.no_grad():
        for i, hidden in enumerate(session.inputs):
            session.run(hidden, i)
    handle.remove()
    return torch.cat(seen).double() + (0 if shift is None else shift.double())


def shifted(folder: Path, **settings: Any) -> tuple[TinyBlock, Tensor, Tensor]:
    """A session with quantised attention and the shift found for it; the norm's outputs before."""
    session = session_with(folder, initializer_range=0.3)
    for name in [n for group in session.groups[:2] for n in group]:
        session.set_weight(name, GRID.quantize(session.weight(name)).decode())
    before = norm_outputs(session)
    correction = MeanShift(**settings)
    assert correction.after_group(session, session.groups[0], {}) == {}
    assert not session.changed
    assert correction.after_group(session, session.groups[1], {}) == {}
    weight = session.weight("model.layers.0.mlp.gate_proj").double()
    bias = session.changed["model.layers.0.mlp.gate_proj.bias"].double()
    return session, before, torch.linalg.lstsq(weight, bias.unsqueeze(1)).solution.squeeze(1)


def test_the_mean_deviation_vanishes(tmp_path: Path) -> None:
    session, before, shift = shifted(tmp_path)
    with session.original():
        teacher = norm_outputs(session)
    error = (teacher - before).square().mean(0)
    corrected = (teacher - before - shift).square().mean(0)
    assert torch.allclose(error - corrected, shift.square(), rtol=1e-3, atol=1e-6)
    assert torch.allclose((teacher - before - shift).mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-5)
    assert float(shift.norm()) > 0.01
    assert set(session.changed) == {f"model.layers.0.mlp.{role}.bias" for role in ("gate_proj", "up_proj")}
    up = session.weight("model.layers.0.mlp.up_proj").double() @ shift
    assert torch.allclose(session.changed["model.layers.0.mlp.up_proj.bias"].double(), up, atol=1e-4)


def test_a_shift_is_clipped_and_first_tokens_can_be_left_out(tmp_path: Path) -> None:
    _, _, shift = shifted(tmp_path / "a", largest=0.01)
    assert float(shift.abs().max()) == pytest.approx(0.01, rel=1e-2)
    session, before, without = shifted(tmp_path / "b", skip_first=1)
    with session.original():
        teacher = norm_outputs(session)
    difference = (teacher - before).view(-1, 16, 64)[:, 1:].reshape(-1, 64)
    assert torch.allclose(without, difference.mean(0), atol=1e-5)


def test_a_norm_changed_by_another_choice_is_left_alone(tmp_path: Path) -> None:
    session = session_with(tmp_path)
    norm = "model.layers.0.post_attention_layernorm.weight"
    session.set_tensor(norm, session.tensor(norm) * 2)
    told: list[dict[str, Any]] = []
    MeanShift().after_group(session, session.groups[1], {}, told.append)
    assert "skipped" in told[0]
    assert set(session.changed) == {norm}


def test_the_unchanged_block_needs_no_shift(tmp_path: Path) -> None:
    session = session_with(tmp_path)
    MeanShift().after_group(session, session.groups[1], {})
    assert all(float(bias.abs().max()) == 0 for bias in session.changed.values())


def final_states(session: TinyBlock) -> Tensor:
    with torch.no_grad():
        states = [session.output_inputs(session.run(hidden, i), i) for i, hidden in enumerate(session.inputs)]
    return torch.cat(states).flatten(0, -2).double()


def quantised_block(folder: Path, **overrides: Any) -> tuple[TinyBlock, dict[str, Tensor]]:
    """A session whose layers are all rounded, and the weights of its MLP before."""
    session = session_with(folder, initializer_range=0.3, **overrides)
    floats = {name: session.weight(name) for name in session.names if ".mlp." in name}
    for name in session.names:
        session.set_weight(name, GRID.quantize(session.weight(name)).decode())
    return session, floats


def test_the_final_norm_is_shifted_against_a_float_mlp(tmp_path: Path) -> None:
    session, floats = quantised_block(tmp_path, num_hidden_layers=1)
    student = final_states(session)
    with session.overridden(floats):  # attention stays rounded
        teacher = final_states(session)
    with session.original():
        original = final_states(session)
    assert MeanShift().correct_block(session, {}) == {}
    assert set(session.changed) == {"lm_head.bias"}
    head, bias = session.output_weight().double(), session.changed["lm_head.bias"].double()
    shift = torch.linalg.lstsq(head, bias.unsqueeze(1)).solution.squeeze(1)
    assert torch.allclose(shift, (teacher - student).mean(0), atol=1e-4)
    assert not torch.allclose(shift, (original - student).mean(0), atol=1e-3)
    assert torch.allclose(session.model.lm_head.bias.double(), head @ shift, atol=1e-4)
    assert float(shift.norm()) > 0.01


def test_only_the_last_block_shifts_the_final_norm_and_only_if_asked_to(tmp_path: Path) -> None:
    session, _ = quantised_block(tmp_path / "first of two")
    assert MeanShift().correct_block(session, {}) == {}
    assert not session.changed
    session, _ = quantised_block(tmp_path / "last", num_hidden_layers=1)
    assert MeanShift(final=False).correct_block(session, {}) == {}
    assert not session.changed


# Absorption -----------------------------------------------------------------------------------------------------------


def by_row_codes() -> dict[str, Code]:
    weight, trits = random(16, 72), random(16, 72, seed=1).round().clamp(-1, 1).to(torch.int8)
    planes = TritPlaneGrid(group_size=32).quantize(weight)
    return {
        "uniform": UniformGrid(bits=3, group_size=32).quantize(weight),
        "planes": planes,
        "offset": OffsetTrits.encode(trits, random(16, 3).abs(), random(16, 3), 32),
        "binary": BinaryPlanes.encode(random(2, 16, 72).sign().to(torch.int8), random(16, 3, 2).abs(), 32),
        "codebook": Codebook.encode(torch.zeros(16, 72, dtype=torch.uint8), random(16, 4)),
        "dense": Dense(weight.half()),
        "hadamard": Hadamard(planes, 8, 1),
        "sum": Sum.of(planes, Dense(weight.half())),
    }


@pytest.mark.parametrize("name", by_row_codes())
def test_rows_are_scaled(name: str) -> None:
    code = by_row_codes()[name]
    factors = 2.0 ** torch.arange(-8, 8)
    scaled = code.rows_scaled(factors)
    assert scaled is not None
    assert scaled.spec == code.spec
    assert torch.allclose(scaled.decode(), code.decode() * factors.unsqueeze(1), rtol=1e-3, atol=1e-5)
    assert code.rows_scaled(torch.full((16,), 1e9)) is None
    assert code.rows_scaled(torch.full((16,), 1e-9)) is None


def test_rows_that_share_scales_are_not_scaled() -> None:
    assert LowRank.encode(random(4, 2), random(2, 8)).rows_scaled(torch.ones(4)) is None
    signs = random(2, 16, 72).sign().to(torch.int8)
    assert BinaryPlanes.encode(signs, random(1, 3, 2), 32, None).rows_scaled(torch.ones(16)) is None


def column_scaled(session: TinyBlock, role: str, spread: float = 1.0) -> dict[str, Code]:
    """float16 codes of a block, and column scales on one layer."""
    codes: dict[str, Code] = {name: Dense(session.weight(name)) for name in session.names}
    name = next(n for n in session.names if n.endswith(role))
    factors = torch.exp(spread * random(session.layers[name].shape[1])).half()
    codes[name] = ColumnScaled(Dense(session.weight(name) / factors.float()), factors)
    return codes


def outputs(session: TinyBlock, codes: dict[str, Code]) -> Tensor:
    with torch.no_grad(), session.overridden({name: code.decode() for name, code in codes.items()}):
        return session.run(session.inputs[0], 0)


@pytest.mark.parametrize(("role", "heads"), [("down_proj", 2), ("o_proj", 4)])
def test_absorbed_scales_leave_the_function(role: str, heads: int, tmp_path: Path) -> None:
    session = session_with(tmp_path, num_key_value_heads=heads)
    codes = column_scaled(session, role)
    found = AbsorbColumnScales().correct_block(session, codes)
    producer = {"down_proj": "up_proj", "o_proj": "v_proj"}[role]
    assert {name.rpartition(".")[2] for name in found} == {role, producer}
    assert not any(isinstance(code, ColumnScaled) for code in found.values())
    before, after = outputs(session, codes), outputs(session, {**codes, **found})
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


def test_a_bias_of_the_producer_is_scaled_too(tmp_path: Path) -> None:
    session = session_with(tmp_path, "qwen2", num_key_value_heads=4)
    bias = "model.layers.0.self_attn.v_proj.bias"
    session.set_tensor(bias, random(64))
    codes = column_scaled(session, "o_proj")
    before = outputs(session, codes)
    found = AbsorbColumnScales().correct_block(session, codes)
    assert torch.allclose(before, outputs(session, {**codes, **found}), rtol=1e-5, atol=1e-5)
    assert not torch.equal(session.tensor(bias), random(64))


@pytest.mark.parametrize(
    ("family", "role", "spread", "reason"),
    [
        ("opt", "fc2", 1.0, "linearly"),
        ("llama", "o_proj", 1.0, "several columns"),
        ("llama", "down_proj", 6.0, "differ too much"),
    ],
)
def test_refusals(family: str, role: str, spread: float, reason: str, tmp_path: Path) -> None:
    if family == "opt":
        session: Any = TinyBlock.__new__(TinyBlock)
        _, anatomy = tiny_model(tmp_path, family)
        session.layers = {layer.name: layer for layer in anatomy.layers if layer.block == 0}
        name = next(n for n in session.layers if n.endswith(role))
        codes: dict[str, Code] = {
            name: ColumnScaled(Dense(random(*session.layers[name].shape)), random(128).abs().half())
        }
    else:
        session = session_with(tmp_path, family)
        codes = column_scaled(session, role, spread)
    told: list[dict[str, Any]] = []
    assert AbsorbColumnScales().correct_block(session, codes, told.append) == {}
    assert reason in told[0]["stored"]
