"""Which layers get the finer grid, told by what they are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from tests.models import make_tiny
from tests.networks import folder

from featherweight.errors import RecipeError
from featherweight.methods.recipe import Recipe, recipe_from
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.plan import Plan, make_plan

BITS = {"finer": 5, "usual": 3}


def recipe(overrides: tuple[dict[str, Any], ...] = (), **allocation: Any) -> Recipe:
    mapping = {
        "name": "mine",
        "grid": {"kind": "uniform", "bits": BITS["usual"], "group_size": 16},
        "allocation": {"kind": "by-role", "grid": {"bits": BITS["finer"]}, **allocation},
        "overrides": overrides,
    }
    return recipe_from(mapping, "mine")


def finer(path: Path, **allocation: Any) -> set[str]:
    """Names of the layers that get the finer grid, without what all of them have in front."""
    plan = plan_of(path, **allocation)
    return {
        job.layer.name.split(".", 2)[2] for job in plan.jobs if job.treatment.grid.settings()["bits"] == BITS["finer"]
    }


def plan_of(path: Path, **allocation: Any) -> Plan:
    with Checkpoint.open(path) as checkpoint:
        return make_plan(checkpoint, recipe(**allocation))


@functools.cache
def llama(blocks: int = 3, kv_heads: int = 1) -> Path:
    return folder("llama", num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=kv_heads)


def test_narrow_keys_and_values_and_the_last_layers_at_the_ends() -> None:
    both = {f"{block}.self_attn.{part}_proj" for block in range(3) for part in "kv"}
    assert finer(llama()) == both | {"0.mlp.down_proj", "2.mlp.down_proj"}  # one at least
    assert finer(llama(), ends=0) == both
    assert finer(llama(), ends=0, attention=["v"]) == {name for name in both if "v_proj" in name}
    assert finer(llama(), ends=0, attention=["o"]) == {f"{block}.self_attn.o_proj" for block in range(3)}


def test_the_last_mlps_whole() -> None:
    found = finer(llama(), ends=0, attention=[], last_mlps=1)
    assert found == {f"2.mlp.{part}_proj" for part in ("gate", "up", "down")}


def test_keys_as_wide_as_queries_are_like_other_layers() -> None:
    assert finer(llama(kv_heads=4), ends=0) == set()
    assert len(finer(llama(kv_heads=4), ends=0, widest=1.0)) == 6


def test_the_ends_grow_with_the_depth() -> None:
    path = llama(blocks=17)
    found = finer(path, attention=[], ends=0.1)
    assert found == {f"{block}.mlp.down_proj" for block in (0, 1, 15, 16)}
    assert finer(path, attention=[], ends=0.01) == {"0.mlp.down_proj", "16.mlp.down_proj"}


@pytest.mark.parametrize(("family", "wanted"), [("gpt2", "mlp.c_proj"), ("bert", "output.dense")])
def test_other_names(family: str, wanted: str) -> None:
    """Keys as wide as queries, or one layer with them, are left; last layers of MLPs are found by any name."""
    path = folder(family)
    found = finer(path)
    assert found
    assert all(name.endswith(wanted) for name in found)


def test_experts_count_as_mlps() -> None:
    found = finer(folder("mixtral"), attention=[])
    assert found
    assert all("w2" in name or "down_proj" in name for name in found)


def test_the_plan_counts_what_each_layer_gets(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "model")
    plan = plan_of(tmp_path / "model")
    sizes = {job.layer.name: job.treatment.nbytes(job.layer.shape) for job in plan.jobs}
    assert sum(sizes.values()) == plan.code_bytes
    bits = {job.treatment.grid.settings()["bits"] for job in plan.jobs}
    assert bits == set(BITS.values())


def test_an_override_counts_before_it() -> None:
    plan = plan_of(llama(), overrides=({"match": "v_proj", "grid": {"bits": 8}},))
    assert {j.treatment.grid.settings()["bits"] for j in plan.jobs if j.layer.role == "v_proj"} == {8}


@pytest.mark.parametrize(
    ("allocation", "words"),
    [
        ({"grid": {"bitts": 3}}, r"no field allocation.grid.bitts \(did you mean 'bits'"),
        ({"grid": {"kind": "unifrm"}}, "no grid called 'unifrm'"),
        ({"attention": ["w"]}, "allocation.attention.0 is 'w'"),
        ({"ends": -1}, "allocation.ends is -1"),
    ],
)
def test_wrong_settings_are_said_where_the_recipe_is_read(allocation: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe mine: .*{words}"):
        recipe(**allocation)
