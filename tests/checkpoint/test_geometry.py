"""Heads, neurons and experts, told from names and shapes, judged by what transformers computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arranged_models import DECLARED, Made, by_owner, logits_of, same, shuffled, under_another_name
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import NAMES, SHAPES, write_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.geometry import read_geometry
from featherweight.storage.checkpoint.anatomy.residual import read_residual
from featherweight.storage.checkpoint.anatomy.units import arrange
from featherweight.storage.checkpoint.checkpoint import Checkpoint

EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe"]
UNROTATED = ["gpt2", "opt", "bert"]


@pytest.mark.parametrize("name", [*DECLARED, "phi-norms", "gpt-oss"])
@pytest.mark.parametrize("kind", ["head", "kv-group"])
def test_a_head_is_what_its_output_depends_on(
    name: str, kind: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """Noise in the rows of a head changes what o reads in the columns of the head, and nowhere else; and with these
    columns at zero, nothing of the head matters."""
    one = made(name)
    attention = one.geometry().attentions[0]
    assert (attention.sinks is not None) == (name == "gpt-oss")
    assert (attention.heads, attention.head_size, attention.value_size) == (4, 16, 16)
    units = one.geometry().units(kind, block=0)
    assert len(units) == (attention.heads if kind == "head" else attention.kv_heads)
    unit = units[1]
    columns = [part for part in unit.parts if part.side == "columns"]
    mine = [i for part in columns for i in range(part.start, part.stop)]
    assert {part.layer for part in columns} == {attention.o.name}
    assert len(mine) == 16 * (1 if kind == "head" else attention.heads // attention.kv_heads)

    def seen(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model, inputs = one.model(tensors, tmp_path), list[Tensor]()
        model.get_submodule(attention.o.name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        logits = logits_of(model)
        return inputs[0].reshape(-1, attention.o.shape[1]), logits

    noisy = {key: value.clone() for key, value in one.tensors.items()}
    for part in unit.parts:
        if part.side != "columns":
            view = part.view(noisy[part.tensor])
            view.add_(torch.randn(view.shape, generator=torch.Generator().manual_seed(part.start)))
    before, after = seen(one.tensors)[0], seen(noisy)[0]
    changed = (before - after).abs().amax(0) > 1e-4
    others = [i for i in range(len(changed)) if i not in mine]
    assert bool(changed[mine].all())
    assert float((before - after).abs()[:, others].max()) < 1e-5
    cut = {}
    for what, tensors in (("plain", one.tensors), ("noisy", noisy)):
        cut[what] = {key: value.clone() for key, value in tensors.items()}
        for part in columns:
            part.view(cut[what][part.tensor]).zero_()
    assert same(seen(cut["noisy"])[1], seen(cut["plain"])[1])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral"])
def test_removed_groups_are_groups_without_outputs(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(name)
    geometry = one.geometry()
    small, cut = dict(one.tensors), {key: value.clone() for key, value in one.tensors.items()}
    for units in by_owner(geometry.units("kv-group")):
        for part in units[0].parts:
            if part.side == "columns":
                part.view(cut[part.tensor]).zero_()
        small |= arrange(one.tensors, units, [1])
    fewer = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    assert same(one.logits(small, tmp_path, **fewer), one.logits(cut, tmp_path))


@pytest.mark.parametrize("name", DECLARED)
def test_value_channels_of_a_head_change_places(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(name)
    moved: dict[str, Tensor] = {}
    for units in by_owner(one.geometry().units("value")):
        order = shuffled(16) + list(range(16, len(units)))
        moved |= arrange(one.tensors | moved, units, order)
    assert same(one.logits(one.tensors | moved, tmp_path), one.logits(one.tensors, tmp_path))


@pytest.mark.parametrize("name", UNROTATED)
def test_query_and_key_channels_change_places(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(name)
    moved: dict[str, Tensor] = {}
    for units in by_owner(one.geometry().units("query-key")):
        moved |= arrange(one.tensors | moved, units, shuffled(16))
    assert same(one.logits(one.tensors | moved, tmp_path), one.logits(one.tensors, tmp_path))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_query_and_key_channels_of_rotated_positions(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """A pair of channels that turn together can be scaled in q and scaled back in k, behind their norms."""
    one = made(name)
    tensors = {key: value.clone() for key, value in one.tensors.items()}
    for unit in one.geometry().units("query-key"):
        for part in unit.parts if unit.index % 8 == 3 else ():
            if part.side == "entries" or name != "qwen3":
                part.view(tensors[part.tensor]).mul_(2.0 if ".q_" in part.tensor else 0.5)
    assert same(one.logits(tensors, tmp_path), one.logits(one.tensors, tmp_path))
    assert sum(not torch.equal(tensors[key], one.tensors[key]) for key in tensors) >= 4


@pytest.mark.parametrize("name", DECLARED)
def test_permuted_neurons_change_nothing(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one, moved = made(name), dict[str, Tensor]()
    geometry = one.geometry()
    for units in by_owner(geometry.units("neuron")):
        moved |= arrange(one.tensors | moved, units, shuffled(len(units)))
    touched = {layer for mlp in geometry.mlps for layer in (mlp.down.tensor, *(up.layer.tensor for up in mlp.ups))}
    assert touched <= set(moved)
    assert all(not torch.equal(moved[key], one.tensors[key]) for key in touched)
    assert same(one.logits(one.tensors | moved, tmp_path), one.logits(one.tensors, tmp_path))


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt-neox", "gpt2"])
def test_removed_neurons_are_neurons_without_outputs(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(name)
    small, cut = dict(one.tensors), {key: value.clone() for key, value in one.tensors.items()}
    kept = 0
    for units in by_owner(one.geometry().units("neuron")):
        order = shuffled(len(units))
        kept = len(units) // 2
        for number in order[kept:]:
            for part in units[number].parts:
                if part.side == "columns":
                    part.view(cut[part.tensor]).zero_()
        small |= arrange(one.tensors, units, order[:kept])
    key = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(name, "intermediate_size")
    assert same(one.logits(small, tmp_path, **{key: kept}), one.logits(cut, tmp_path))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_change_places_and_go(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one, moved = made(name), dict[str, Tensor]()
    mixtures = by_owner(one.geometry().units("expert"))
    assert [len(units) for units in mixtures] == [4, 4]
    for units in mixtures:
        moved |= arrange(one.tensors | moved, units, [2, 0, 3, 1])
    assert len(moved) == 2 * (4 * 3 + 1)
    assert same(one.logits(one.tensors | moved, tmp_path), one.logits(one.tensors, tmp_path))
    small = dict(one.tensors)
    for units in mixtures:
        fewer = arrange(one.tensors, units, [0, 1, 3])
        gone = {part.tensor for unit in units for part in unit.parts} - set(fewer)
        assert len(gone) == 3
        small = {key: value for key, value in (small | fewer).items() if key not in gone}
    config = json.loads((one.folder / "config.json").read_text())
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"
    assert sorted(value.shape[0] for key, value in small.items() if key.endswith(".gate.weight")) == [3, 3]
    assert one.logits(small, tmp_path, **{count: 3}).isfinite().all()


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout that transformers 5 keeps in memory: [experts, 2 * ffn, hidden], gate before up."""
    found = {key: value for key, value in tensors.items() if ".experts." not in key}
    for block in range(2):
        prefix = f"model.layers.{block}.mlp.experts"
        experts = [
            [tensors[f"{prefix}.{e}.{leaf}.weight"] for leaf in ("gate_proj", "up_proj", "down_proj")] for e in range(4)
        ]
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(parts[:2]) for parts in experts])
        found[f"{prefix}.down_proj"] = torch.stack([parts[2] for parts in experts])
    return found


def test_stacked_experts_are_those_apart(made: Callable[[str], Made], tmp_path: Path) -> None:
    one, together = made("qwen3-moe"), Made.__new__(Made)
    save_file(stacked(one.tensors), tmp_path / "model.safetensors")
    shutil.copy(one.folder / "config.json", tmp_path)
    together.folder, together.tensors = tmp_path, load_file(tmp_path / "model.safetensors")
    for kind, order in (("neuron", shuffled(32)), ("expert", [3, 1, 0, 2]), ("expert", [2, 3])):
        found, wanted = dict(together.tensors), dict(one.tensors)
        for into, source in ((found, together), (wanted, one)):
            for units in by_owner(source.geometry().units(kind)):
                into |= arrange(dict(into), units, order)
        if len(order) == 2:
            assert all(found[key].shape[0] == 2 for key in found if ".experts." in key or ".gate.weight" in key)
            continue
        expected = stacked(wanted)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(CheckpointError, match="cannot shrink for one expert alone"):
        arrange(together.tensors, by_owner(together.geometry().units("neuron"))[0], [0, 1])
    channels = together.residual()
    assert {port.dim for port in channels.ports if port.tensor.endswith("gate_up_proj")} == {2}
    moved = stacked(one.tensors | one.residual().arranged(one.tensors, shuffled(64)))
    again = channels.arranged(together.tensors, shuffled(64))
    assert all(torch.equal(again.get(key, together.tensors[key]), moved[key]) for key in moved)


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "mixtral", "bert"])
def test_units_by_structure(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made(name)
    with Checkpoint.open(under_another_name(one, tmp_path)) as checkpoint:
        found, declared = read_geometry(checkpoint), one.geometry()
    assert not found.refusals
    for kind in ("head", "kv-group", "value", "query-key", "neuron", "expert"):
        slices = [{frozenset(unit.parts) for unit in one.units(kind)} for one in (found, declared)]
        assert slices[0] == slices[1]
        assert slices[0] or (kind == "expert" and name != "mixtral")


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("phi3", "head", "does not say how queries, keys and values lie in model.layers.0.self_attn.qkv_proj"),
        ("phi3", "neuron", "does not say how the rows of model.layers.0.mlp.gate_up_proj"),
        ("gpt-neox", "value", "query_key_value, which is all in one"),
        (
            "t5",
            "kv-group",
            "SelfAttention.relative_attention_bias.weight .* is to the heads",
        ),
    ],
)
def test_what_structure_does_not_tell_is_refused(
    name: str, kind: str, why: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    with Checkpoint.open(under_another_name(made(name), tmp_path)) as checkpoint:
        found = read_geometry(checkpoint)
    with pytest.raises(CheckpointError, match=why) as caught:
        found.units(kind)
    assert "\n" not in str(caught.value)


def test_wrong_questions(made: Callable[[str], Made], tmp_path: Path) -> None:
    one = made("llama")
    units = one.geometry().units("neuron", block=1)
    assert len(units) == 128
    assert {unit.block for unit in units} == {1}
    with pytest.raises(CheckpointError, match="no units 'column'"):
        one.geometry().units("column")
    for order in ([0, 0], [128], [-1]):
        with pytest.raises(CheckpointError, match="at most once"):
            arrange(one.tensors, units, order)
        with pytest.raises(CheckpointError, match="at most once"):
            one.residual().arranged(one.tensors, order)
    with pytest.raises(CheckpointError, match="different owners"):
        arrange(one.tensors, [*units, *one.geometry().units("neuron", block=0)], [1, 0])
    folder = under_another_name(one, tmp_path)
    for key, value, why in (
        ("num_attention_heads", None, "how many heads there are"),
        ("num_attention_heads", 5, "how 5 heads share 2"),
        ("num_key_value_heads", 4, "the heads of model.layers.0.self_attn"),
    ):
        config = json.loads((one.folder / "config.json").read_text()) | {key: value}
        (folder / "config.json").write_text(json.dumps(config))
        with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=why):
            read_geometry(checkpoint).units("head")


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=10),
    model_type=st.sampled_from(["llama", "mixtral", "gpt2", "gpt_neox", "bert", "resnet", "strange"]),
    hidden=st.sampled_from([2, 3, None]),
    heads=st.sampled_from([1, 2, "2", None]),
)
def test_any_names_and_shapes_are_told_or_refused(
    tmp_path_factory: pytest.TempPathFactory, shapes: Any, model_type: str, hidden: int | None, heads: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "invented-geometry"
    folder.mkdir(exist_ok=True)
    sizes = {key: tuple(value) for key, value in shapes.items()}
    write_tensors(folder, sizes, model_type=model_type, hidden_size=hidden, num_attention_heads=heads)
    with Checkpoint.open(folder) as checkpoint:
        try:
            geometry = read_geometry(checkpoint)
        except CheckpointError:
            return
        for kind in ("head", "kv-group", "value", "query-key", "neuron", "expert"):
            if kind in geometry.refusals:
                assert "\n" not in geometry.refusals[kind]
                continue
            for part in (part for unit in geometry.units(kind) for part in unit.parts):
                stored = checkpoint.tensor(part.tensor)
                assert part.view(stored).shape[part.dim] == part.stop - part.start
        try:
            residual = read_residual(checkpoint)
        except CheckpointError:
            return
        assert all(checkpoint.entry(port.tensor).shape[port.dim] == residual.hidden for port in residual.ports)
