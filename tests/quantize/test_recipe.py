"""Recipes: reading, changing, selecting layers, and every way to get one wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import RecipeError
from featherweight.methods.quantize.grids.trit_planes import TritPlaneGrid
from featherweight.methods.quantize.treatment import Treatment
from featherweight.methods.recipe import load_recipe, presets, recipe_from
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer


def layer(name: str, kind: str = "attention", block: int | None = 0) -> LinearLayer:
    return LinearLayer(
        name, f"{name}.weight", (8, 8), False, None, False, block, name.split(".")[-1], kind, "x", None, None, ()
    )


def anatomy(head: bool = False) -> Anatomy:
    names = [f"model.layers.{b}.{n}" for b in (0, 1) for n in ("attn.q_proj", "attn.k_proj", "mlp.down_proj")]
    layers = tuple(layer(n, "mlp" if "mlp" in n else "attention", int(n.split(".")[2])) for n in names)
    router = layer("model.layers.0.mlp.gate", "router")
    return Anatomy(
        "llama",
        2,
        "model",
        "model.layers",
        (*layers, router),
        layer("lm_head", "head", None) if head else None,
        (),
        (),
        (),
        (),
    )


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_survives_its_dump(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe, ["name=" + name]).dump() == recipe.dump()


def test_changes_reach_the_grid() -> None:
    recipe = load_recipe("ptqtp", ["grid.planes=3", "grid.tied=true", "layers.skip=[q_proj]"])
    assert isinstance(recipe.grid, TritPlaneGrid)
    assert (recipe.grid.planes, recipe.grid.tied, recipe.layers.skip) == (3, True, ("q_proj",))


def test_selection_by_name_role_and_kind() -> None:
    chosen = set(load_recipe("ptqtp").treatments_for(anatomy()))
    assert len(chosen) == 6  # the router is left alone
    skipped = load_recipe("ptqtp", ["layers.skip=[k_proj, '*.1.mlp.*']"]).treatments_for(anatomy())
    assert set(skipped) == {n for n in chosen if "k_proj" not in n and ".1.mlp." not in n}
    only = load_recipe("ptqtp", ["layers.include=[mlp]"]).treatments_for(anatomy())
    assert set(only) == {n for n in chosen if "down_proj" in n}
    assert "model.layers.0.mlp.gate" in load_recipe("ptqtp", ["layers.routers=true"]).treatments_for(anatomy())
    assert "lm_head" in load_recipe("ptqtp", ["layers.head=true"]).treatments_for(anatomy(head=True))


def test_overrides_change_single_settings_or_the_kind() -> None:
    recipe = load_recipe(
        "ptqtp", ["overrides=[{match: down_proj, grid: {planes: 3}}, {match: '*.0.*', grid: {kind: uniform, bits: 8}}]"]
    )
    grids = {name: treatment.grid for name, treatment in recipe.treatments_for(anatomy()).items()}
    assert grids["model.layers.1.mlp.down_proj"].settings()["planes"] == 3
    assert grids["model.layers.0.mlp.down_proj"].settings()["planes"] == 3  # the first match counts
    assert grids["model.layers.0.attn.q_proj"].settings()["bits"] == 8
    assert grids["model.layers.1.attn.q_proj"] == recipe.grid


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["grid.plans=3"], ["grid.plans", "'planes'"]),
        (["grid.planes=4"], ["grid.planes", "4"]),
        (["grid.planes=two"], ["grid.planes", "'two'"]),
        (["grid.group_size=0"], ["grid.group_size", "0"]),
        (["grid.kind=trit-plane"], ["'trit-plane'", "'trit-planes'"]),
        (["grid=3"], ["grid", "kind"]),
        (["rouding.kind=nearest"], ["rouding", "'rounding'"]),
        (["rounding.kind=nearst"], ["'nearst'", "'nearest'"]),
        (["layers.skp=[a]"], ["layers.skp", "'skip'"]),
        (["transforms=[{kind: hadamrd}]"], ["transform", "'hadamrd'"]),
        (["overrides=[{match: x}]"], ["overrides", "grid"]),
        (["grid.planes"], ["FIELD=VALUE"]),
        (["grid.planes=[1"], ["YAML"]),
        (["name.x=1"], ["'name'"]),
    ],
)
def test_wrong_changes_name_the_field(changes: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("ptqtp", changes)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid: {kind: uniform, bits: 9}", ["grid.bits", "9"]),
        ("grid: {bits: 4}", ["grid", "kind"]),
        ("rounding: {kind: nearest}", ["grid", "missing"]),
        ("- 1", ["mapping"]),
        ("grid: [", ["cannot be read"]),
        ("", ["mapping"]),
        ("overrides: 3\ngrid: {kind: uniform}", ["overrides"]),
    ],
)
def test_wrong_files_name_the_field_and_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for word in [*words, "mine.yaml"]:
        assert word in str(caught.value)


def test_wrong_overrides_and_patterns() -> None:
    with pytest.raises(RecipeError, match="overrides\\[0\\].grid.plans"):
        load_recipe("ptqtp", ["overrides=[{match: q_proj, grid: {plans: 3}}]"]).treatments_for(anatomy())
    with pytest.raises(RecipeError, match="'q_porj' in layers.skip.*'q_proj'"):
        load_recipe("ptqtp", ["layers.skip=[q_porj]"]).treatments_for(anatomy())
    with pytest.raises(RecipeError, match="no layer"):
        load_recipe("ptqtp", ["layers.skip=['*']"]).treatments_for(anatomy())
    with pytest.raises(RecipeError, match="has no output layer"):
        load_recipe("ptqtp", ["layers.head=true"]).treatments_for(anatomy())


TUNING = {"kind": "scale-tuning", "against": "model"}
WRONG_OVERRIDES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another rounding of blocks": (
        {},
        {"rounding": {"kind": "flexround"}},
        r"overrides\[0\].rounding: flexround chooses the codes of a whole block together, so single layers cannot",
    ),
    "other settings of it": (
        {"rounding": {"kind": "flexround"}},
        {"rounding": {"steps": 3}},
        r"overrides\[0\].rounding: flexround chooses .* whole block .* they may only opt out",
    ),
    "a rounding of the model": (
        {},
        {"rounding": {"kind": "discquant"}},
        "discquant chooses the codes of a whole model",
    ),
    "a transform of blocks": (
        {},
        {"transforms": [{"kind": "awq"}]},
        r"overrides\[0\].transforms: awq sees a whole block at once, so single layers cannot .* into the recipe's",
    ),
    "other settings of a correction of blocks": (
        {"corrections": [{"kind": "mean-shift"}]},
        {"corrections": [{"kind": "mean-shift", "final": False}]},
        r"overrides\[0\].corrections: mean-shift sees a whole block at once, .* or settings of their own",
    ),
    "without a rotation": (
        {"transforms": [{"kind": "rotation"}]},
        {"transforms": [{"kind": "hadamard"}]},
        r"overrides\[0\].transforms: rotation changes the whole model at once, so no layer can be without it; list it",
    ),
    "without tuning": ({"corrections": [TUNING]}, {"corrections": []}, "scale-tuning changes the whole model at once"),
    "an unknown setting": (
        {"rounding": {"kind": "hessian"}},
        {"rounding": {"dampin": 0.1}},
        r"no field overrides\[0\].rounding.dampin \(did you mean 'damping'\?\)",
    ),
    "an unknown transform": ({}, {"transforms": [{"kind": "hadamrd"}]}, "no transform called 'hadamrd'"),
    "a list without kinds": ({}, {"corrections": [{"rank": 1}]}, r"overrides\[0\].corrections\[0\] must be a mapping"),
    "no list": ({}, {"transforms": {"kind": "hadamard"}}, "overrides.0.transforms is .*but must be a list"),
    "inputs rounded too late": (
        {},
        {"transforms": [{"kind": "hadamard"}, {"kind": "quantize-inputs"}]},
        r"quantize-inputs must be the first in overrides\[0\].transforms",
    ),
    "an axis that is the recipe's": ({}, {"allocation": {"kind": "fixed"}}, "no field overrides.0.allocation"),
    "nothing": ({}, {}, "overrides.0 is .*an override must name at least one of grid, rounding, transforms and corr"),
}


@pytest.mark.parametrize("case", WRONG_OVERRIDES)
def test_wrong_overrides_say_why_in_a_sentence(case: str) -> None:
    own, override, words = WRONG_OVERRIDES[case]
    with pytest.raises(RecipeError, match=words) as caught:
        recipe_from(
            {"name": "mine", "grid": {"kind": "uniform"}, **own, "overrides": [{"match": "*", **override}]}, "mine"
        )
    assert str(caught.value).startswith("recipe mine: ")
    assert "\n" not in str(caught.value)


def treated(**fields: Any) -> dict[str, Treatment]:
    mapping = {"name": "mine", "grid": {"kind": "uniform", "bits": 3}, **fields}
    return recipe_from(mapping, "mine").treatments_for(anatomy())


def test_each_axis_has_its_first_override() -> None:
    found = treated(
        rounding={"kind": "hessian", "damping": 0.02},
        corrections=[{"kind": "lorc"}],
        overrides=[
            {"match": "q_proj", "rounding": {"kind": "nearest"}},
            {"match": "attention", "grid": {"bits": 2}, "rounding": {"order": "activation"}, "corrections": []},
            {"match": "*", "grid": {"bits": 8}, "transforms": [{"kind": "hadamard"}]},
        ],
    )
    query, key, down = (found[f"model.layers.0.{n}"] for n in ("attn.q_proj", "attn.k_proj", "mlp.down_proj"))
    assert [t.grid.settings()["bits"] for t in (query, key, down)] == [2, 2, 8]
    assert [t.rounding.kind for t in (query, key, down)] == ["nearest", "hessian", "hessian"]
    assert key.rounding.settings()["order"] == "activation"
    assert key.rounding.settings()["damping"] == down.rounding.settings()["damping"] == 0.02
    assert [[c.kind for c in t.corrections] for t in (query, key, down)] == [[], [], ["lorc"]]
    assert {t.transforms[0].kind for t in found.values()} == {"hadamard"}
    assert query is found["model.layers.1.attn.q_proj"]  # alike layers share one object


def test_needs_follow_overrides() -> None:
    plain = {"grid": {"kind": "uniform"}}
    swept = [{"match": "q_proj", "rounding": {"kind": "hessian"}}]
    recipe = recipe_from({**plain, "name": "mine", "overrides": swept}, "mine")
    assert recipe.calibrated
    assert recipe.needs == ("gram",)
    assert recipe.treatment.needs == ()
    assert "calibration" not in recipe_from({**plain, "name": "mine"}, "mine").dump()
    assert recipe_from(recipe.dump(), "again") == recipe
    assert recipe.digest() != recipe_from({**plain, "name": "mine"}, "mine").digest()


def test_overrides_of_the_grid_alone_are_dumped_as_before() -> None:
    mapping = {"name": "mine", "grid": {"kind": "uniform"}, "overrides": [{"match": "q_proj", "grid": {"bits": 3}}]}
    assert recipe_from(mapping, "mine").dump()["overrides"] == mapping["overrides"]


def test_what_layers_may_opt_out_of() -> None:
    found = treated(
        transforms=[{"kind": "awq"}],
        corrections=[{"kind": "mean-shift"}],
        overrides=[{"match": "q_proj", "transforms": []}, {"match": "attention", "corrections": [{"kind": "lorc"}]}],
    )
    query = found["model.layers.0.attn.q_proj"]
    assert query.transforms == ()
    assert [c.kind for c in query.corrections] == ["lorc"]
    assert found["model.layers.0.attn.k_proj"].transforms[0].kind == "awq"
    alone = treated(rounding={"kind": "flexround"}, overrides=[{"match": "q_proj", "rounding": {"kind": "nearest"}}])
    assert alone["model.layers.0.attn.q_proj"].rounding.kind == "nearest"


def test_unknown_presets_and_files() -> None:
    with pytest.raises(RecipeError, match="did you mean 'ptqtp'"):
        load_recipe("ptqpt")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("none.yaml")
