"""Names to classes: a name is taken once, whoever takes it."""

from __future__ import annotations

import pytest

from featherweight import registry
from featherweight.registry import find, register


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.registered("grid")
    monkeypatch.setattr(registry, "_entries", {axis: dict(known) for axis, known in registry._entries.items()})


def make(module: str, qualname: str) -> type:
    return type(qualname.rpartition(".")[2], (), {"__module__": module, "__qualname__": qualname})


def test_a_second_class_of_a_name_is_refused() -> None:
    first = register("grid", "mine")(make("plugin.one", "Mine"))
    with pytest.raises(ValueError, match=r"grid 'mine' is registered twice, by plugin.one.Mine and plugin.two.Mine"):
        register("grid", "mine")(make("plugin.two", "Mine"))  # same name of the class, another module
    with pytest.raises(ValueError, match="registered twice"):
        register("grid", "mine")(make("plugin.one", "Other"))
    assert find("grid", "mine") is first


def test_a_name_of_ours_is_refused_even_before_ours_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_scanned", set())
    ours = find("grid", "uniform")
    with pytest.raises(ValueError, match="registered twice"):
        register("grid", "uniform")(make("plugin.one", "UniformGrid"))
    assert find("grid", "uniform") is ours


def test_the_same_class_defined_again_takes_its_place() -> None:
    register("grid", "mine")(make("plugin.one", "Mine"))
    again = register("grid", "mine")(make("plugin.one", "Mine"))
    assert find("grid", "mine") is again


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(ValueError, match="no axis called 'grids'.*did you mean 'grid'"):
        register("grids", "mine")
