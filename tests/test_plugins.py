"""Packages outside ours: what is wrong with one is a warning that names it, and the rest is there, for all threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import featherweight

REPORT = """
import json, threading, warnings
warnings.simplefilter("always")
said = []
warnings.showwarning = lambda message, category, *rest, **named: said.append([category.__name__, str(message)])
"""
LOOK = """
from featherweight.registry import PACKAGES, find, origin, registered
from featherweight.errors import RecipeError
start, seen = threading.Barrier(8), []
def look(axis):
    start.wait()
    seen.append((axis, {name: f"{cls.__module__}.{cls.__qualname__}" for name, cls in registered(axis).items()}))
threads = [threading.Thread(target=look, args=(axis,)) for axis in ["grid", "allocation"] * 4]
for thread in threads: thread.start()
for thread in threads: thread.join()
try:
    find("grid", "never-there")
except RecipeError as error:
    sentence = str(error)
origins = {name: origin("grid", name) for name in ("uniform", "good-grid")}
print(json.dumps({"said": said, "seen": seen, "sentence": sentence, "origins": origins}))
"""
PRESETS = """
from featherweight.methods.recipe import load_recipe, preset_origin, presets
from featherweight.tasks.compress.methods import method_table
rows = {row["preset"]: row["from"] for row in method_table()}
paths = {name: [str(path), preset_origin(name)] for name, path in presets().items()}
print(json.dumps({"said": said, "rows": rows, "paths": paths, "bits": load_recipe("good-preset").grid.bits}))
"""


def distribution(
    site: Path, name: str, modules: dict[str, str], methods: str | None = None, recipes: str | None = None
) -> None:
    """What an installer leaves of a package: modules, and a dist-info folder with entry points."""
    for module, text in modules.items():
        path = site / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    info = site / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", "utf-8")
    entries = {"featherweight.plugins": methods, "featherweight.recipes": recipes}
    lines = [f"[{group}]\nit = {value}\n" for group, value in entries.items() if value]
    (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")


def grid(name: str, before: str = "", after: str = "") -> str:
    """A module that registers a grid."""
    lines = "from featherweight.methods.quantize.grids.uniform import UniformGrid", "@register({!r}, {!r})"
    register = lines[1].format("grid", name)
    head = f"from featherweight.registry import register\n{lines[0]}\n{before}\n"
    return f"{head}{register}\nclass Mine(UniformGrid):\n    '''A uniform grid.'''\n{after}\n"


def run(site: Path, script: str, *options: str) -> Any:
    places = [str(Path(featherweight.__file__).parents[1]), str(site)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, *options, "-c", REPORT + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight threads look up two axes at once, with these packages around."""
    site = tmp_path_factory.mktemp("site")
    distribution(site, "good-one", {"good_one.py": grid("good-grid")}, "good_one")
    distribution(site, "broken-late", {"broken_late.py": grid("half", after="1 / 0")}, "broken_late")
    distribution(site, "broken-exit", {"broken_exit.py": "raise SystemExit('no licence\\nfound')"}, "broken_exit")
    distribution(site, "broken-away", {}, "never_written")
    distribution(site, "takes-ours", {"takes_ours.py": grid("uniform")}, "takes_ours")
    distribution(site, "takes-theirs", {"takes_theirs.py": grid("good-grid")}, "takes_theirs")
    distribution(site, "within", {"within/__init__.py": "", "within/deep.py": grid("deep-grid")}, "within.deep")
    return run(site, LOOK)


def test_every_thread_sees_the_same_whole_table(looked_at: Any) -> None:
    for axis in ("grid", "allocation"):
        tables = [names for looked, names in looked_at["seen"] if looked == axis]
        assert len(tables) == 4
        assert all(names == tables[0] for names in tables)
    (names, *_) = (names for axis, names in looked_at["seen"] if axis == "grid")
    assert names["good-grid"] == "good_one.Mine"
    assert names["deep-grid"] == "within.deep.Mine"
    assert names["uniform"] == "featherweight.methods.quantize.grids.uniform.UniformGrid"
    assert {"trit-planes", "codebook", "pyramid"} < names.keys()
    assert "half" not in names  # registered by what failed afterwards


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("broken-late", "ZeroDivisionError: division by zero"),
        ("broken-exit", "SystemExit: no licence found"),
        ("broken-away", "ModuleNotFoundError: No module named 'never_written'"),
        ("takes-ours", "grid 'uniform' is registered twice, by featherweight.methods.quantize.grids.uniform."
         "UniformGrid (of featherweight) and takes_ours.Mine (of takes-ours 1.5): give the second another name"),
        ("takes-theirs", "grid 'good-grid' is registered twice, by good_one.Mine (of good-one 1.5) and "
         "takes_theirs.Mine (of takes-theirs 1.5): give the second another name"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_package_is_one_warning(looked_at: Any, package: str, reason: str) -> None:
    said = [text for _, text in looked_at["said"] if f"plug-in {package} 1.5 is left out" in text]
    assert len(said) == 1, looked_at["said"]
    assert said[0].endswith(reason)
    assert "\n" not in said[0]


def test_nothing_else_is_said(looked_at: Any) -> None:
    assert [category for category, _ in looked_at["said"]] == ["FeatherWarning"] * 5


def test_a_name_that_is_missing_is_explained(looked_at: Any) -> None:
    assert looked_at["sentence"].endswith(
        "; left out, as they cannot be imported: broken-away 1.5, broken-exit 1.5, broken-late 1.5, takes-ours 1.5, "
        "takes-theirs 1.5"
    )


def test_where_a_choice_comes_from(looked_at: Any) -> None:
    assert looked_at["origins"] == {"uniform": "featherweight", "good-grid": "good-one 1.5"}


def test_a_plugin_that_is_imported_by_hand_first(tmp_path: Path) -> None:
    """Its import begins before the scan, which finds it half done; it is registered once, by either way."""
    distribution(tmp_path, "good-one", {"good_one.py": grid("good-grid")}, "good_one")
    script = """
import good_one
from featherweight.registry import origin, registered
print(json.dumps([said, registered("grid")["good-grid"] is good_one.Mine, origin("grid", "good-grid")]))
"""
    assert run(tmp_path, script) == [[], True, "good-one 1.5"]


def test_warnings_as_errors_leave_the_table_whole(tmp_path: Path) -> None:
    distribution(tmp_path, "broken", {"broken.py": "1 / 0"}, "broken")
    distribution(tmp_path, "working", {"working.py": grid("works")}, "working")
    script = """
from featherweight.errors import FeatherWarning
from featherweight.registry import registered
warnings.simplefilter("error", FeatherWarning)
try:
    registered("grid")
    caught = ""
except FeatherWarning as error:
    caught = str(error)
print(json.dumps([caught, "works" in registered("grid")]))
"""
    caught, works = run(tmp_path, script)
    assert "broken 1.5" in caught
    assert works


def test_presets_of_packages(tmp_path: Path) -> None:
    good = "title: Good\npaper: none\ngrid: {kind: uniform, bits: 5}\n"
    distribution(
        tmp_path, "a-presets", {"a_presets/good-preset.yaml": good, "a_presets/gptq.yaml": good}, None, "a_presets"
    )
    missing = "title: T\npaper: p\ngrid: {kind: never-there}\n"
    modules = {"b_presets/good-preset.yaml": good, "b_presets/lost.yaml": missing, "b_presets/__init__.py": ""}
    distribution(tmp_path, "b-presets", modules, None, "b_presets")
    distribution(tmp_path, "c-presets", {"c_presets.py": ""}, None, "c_presets")
    found = run(tmp_path, PRESETS)
    assert found["bits"] == 5
    assert found["paths"]["good-preset"] == [str(tmp_path / "a_presets" / "good-preset.yaml"), "a-presets 1.5"]
    assert found["paths"]["gptq"][1] == found["rows"]["gptq"] == "featherweight"
    assert Path(found["paths"]["gptq"][0]).parent.name == "recipes"
    assert found["rows"]["good-preset"] == "a-presets 1.5"
    assert "lost" not in found["rows"]
    texts = [text for category, text in found["said"] if category == "FeatherWarning"]
    assert len(texts) == len(found["said"]) == 4
    for part in (
        "preset 'gptq' of a-presets 1.5 is left out, as featherweight has one of that name: rename ",
        "preset 'good-preset' of b-presets 1.5 is left out, as a-presets 1.5 has one of that name",
        "presets of c-presets 1.5 are left out: ImportError: c_presets is not a package with a folder",
        "preset 'lost' of b-presets 1.5 is left out: recipe lost: there is no grid called 'never-there'",
    ):
        assert any(part in text for text in texts), (part, texts)
