"""Names to classes: a name is taken once, whoever takes it."""

from __future__ import annotations

import threading

import pytest

from featherweight import registry
from featherweight.registry import find, register


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.registered("grid")
    monkeypatch.setattr(registry, "_entries", {axis: dict(known) for axis, known in registry._entries.items()})
    monkeypatch.setattr(registry, "_origins", dict(registry._origins))


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


def test_of_many_threads_one_gets_a_name() -> None:
    classes = [make(f"plugin.number_{i}", "Mine") for i in range(16)]
    start = threading.Barrier(len(classes))
    refused: list[str] = []

    def take(cls: type) -> None:
        start.wait()
        try:
            register("grid", "mine")(cls)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(cls,)) for cls in classes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(classes) - 1
    kept = find("grid", "mine")
    assert all(f"by {kept.__module__}.Mine and plugin.number_" in text for text in refused)


def test_where_a_choice_of_a_script_comes_from() -> None:
    register("grid", "mine")(make("my_script", "Mine"))
    assert registry.origin("grid", "mine") == "my_script"
    assert registry.origin("grid", "uniform") == "featherweight"


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(ValueError, match="no axis called 'grids'.*did you mean 'grid'"):
        register("grids", "mine")
