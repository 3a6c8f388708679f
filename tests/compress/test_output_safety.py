"""What stands where an output is to be made is never lost: only outputs of ours are replaced, if somebody says so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from featherweight.errors import OutputError
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.recipe import load_recipe
from featherweight.storage.run.folder import RUN_SUFFIX
from featherweight.tasks.compress.compression import compress
from outputs import Stop, assert_only_output, contents, stopping


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The outputs of two recipes."""
    folder = tmp_path_factory.mktemp("made")
    for recipe in ("rtn-4", "rtn-3"):
        compress(llama, recipe, folder / recipe)
    return {recipe: contents(folder / recipe) for recipe in ("rtn-4", "rtn-3")}


def foreign(folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("ten years of work")
    (folder / "figures").mkdir()
    (folder / "figures" / "1.txt").write_text("a figure")
    return contents(folder)


def test_foreign_files_are_not_touched(llama: Path, tmp_path: Path) -> None:
    held = foreign(tmp_path / "out")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds figures, which featherweight did not write") as caught:
            compress(llama, "rtn-4", tmp_path / "out", overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
        assert contents(tmp_path) == {f"out/{name}": content for name, content in held.items()}


def test_overwrite_replaces(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    compress(llama, "rtn-4", tmp_path / "out", overwrite=True)
    assert_only_output(tmp_path / "out", made["rtn-4"])
    compress(llama, "rtn-3", tmp_path / "out", overwrite=True)
    assert_only_output(tmp_path / "out", made["rtn-3"])


def own_file(out: Path) -> str:
    (out / "notes.txt").write_text("mine")
    return "notes.txt"


def own_folder(out: Path) -> str:
    (out / "runs").mkdir()
    (out / "runs" / "1.json").write_text("{}")
    return "runs"


def own_weights(out: Path) -> str:
    (out / "adapter.safetensors").write_bytes(b"mine")
    return "adapter.safetensors"


def folder_of_our_name(out: Path) -> str:
    (out / "README.md").unlink()
    own_folder(out)
    (out / "runs").rename(out / "README.md")
    return "README.md"


def an_original_model(out: Path) -> str:
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    (out / "featherweight.json").unlink()
    return "README.md"


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "made before files were listed"])
@pytest.mark.parametrize("spoil", [own_file, own_folder, own_weights, folder_of_our_name, an_original_model])
def test_a_file_of_ones_own_in_an_output_is_never_lost(
    llama: Path, tmp_path: Path, spoil: Callable[[Path], str], listed: bool
) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    if not listed:
        unlisted(out)
    name = spoil(out)
    held = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"holds {name}, which featherweight did not write") as caught:
            compress(llama, "rtn-3", out, overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
    assert contents(tmp_path) == held


def unlisted(out: Path) -> None:
    """As outputs were before."""
    manifest = json.loads((out / "featherweight.json").read_text())
    del manifest["files"]
    (out / "featherweight.json").write_text(json.dumps(manifest))


def test_outputs_made_before_are_replaced(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    unlisted(out)
    (out / "tokenizer.json").write_text("{}")
    compress(llama, "rtn-3", out, overwrite=True)
    assert_only_output(out, made["rtn-3"])


def test_a_file_that_appears_while_an_output_is_replaced(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)

    def appear(event: dict[str, object]) -> None:
        if event["event"] == "shard":
            own_file(out)

    with pytest.raises(OutputError, match=r"came to hold notes\.txt while the work went on"):
        compress(llama, "rtn-3", out, overwrite=True, observer=appear)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert compress(llama, "rtn-3", out, overwrite=True).resumed == 14


def test_a_folder_in_the_place_of_the_run_folder(
    llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]
) -> None:
    for name in ("thesis.tex", "out/thesis.tex", "artifacts/000000.safetensors"):
        held = tmp_path / ("out" + RUN_SUFFIX) / name
        held.parent.mkdir(parents=True)
        held.write_text("ten years of work")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="which featherweight did not write"):
                compress(llama, "rtn-4", tmp_path / "out", overwrite=overwrite)
        assert contents(tmp_path) == {str(held.relative_to(tmp_path)): b"ten years of work"}
        shutil.rmtree(tmp_path / ("out" + RUN_SUFFIX))
    compress(llama, "rtn-4", tmp_path / "out")
    mine = tmp_path / ("out" + RUN_SUFFIX) / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("ten years of work")
    assert compress(llama, "rtn-4", tmp_path / "out").already_complete
    assert mine.read_text() == "ten years of work"


def test_a_file_in_the_place_of_the_log(llama: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.log.jsonl"
    log.write_text("my own notes")
    with pytest.raises(OutputError, match="featherweight did not write it"):
        compress(llama, "rtn-4", tmp_path / "out")
    assert log.read_text() == "my own notes"


WORDED = {"notes": "another note", "title": "another title", "paper": "another paper", "name": "another-name"}


@pytest.mark.parametrize("field", WORDED)
def test_words_of_a_recipe_change_nothing(llama: Path, tmp_path: Path, field: str) -> None:
    recipe, out = load_recipe("rtn-4"), tmp_path / "out"
    compress(llama, recipe, out)
    held = contents(out)
    reworded = recipe.model_copy(update={field: WORDED[field]})
    assert compress(llama, reworded, out).already_complete
    assert contents(out) == held


def test_words_of_a_recipe_do_not_stop_a_run_from_going_on(llama: Path, tmp_path: Path) -> None:
    recipe, out = load_recipe("rtn-4"), tmp_path / "out"
    with pytest.raises(Stop):
        compress(llama, recipe, out, observer=stopping("layer", 6))
    assert compress(llama, recipe.model_copy(update=WORDED), out).resumed >= 5


def test_an_output_from_before_a_setting_existed_is_complete(llama: Path, tmp_path: Path) -> None:
    """The setting has its default now, so it is the same work."""
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    manifest = json.loads((out / "featherweight.json").read_text())
    manifest["identity"]["recipe"]["grid"].pop("clip_steps", None)
    assert manifest["identity"]["recipe"]["grid"].pop("clip") == UniformGrid.model_fields["clip"].default
    (out / "featherweight.json").write_text(json.dumps(manifest))
    assert compress(llama, "rtn-4", out).already_complete


def test_outputs_inside_the_model(llama: Path, tmp_path: Path) -> None:
    model, link = tmp_path / "model", tmp_path / "link"
    shutil.copytree(llama, model)
    link.symlink_to(model)
    held = contents(tmp_path)
    for out in (model / "out", model / "a" / "b", link / "out", model / ".." / "model" / "out"):
        for source in (model, link):
            with pytest.raises(OutputError, match="lies in the folder of the model"):
                compress(source, "rtn-4", out)
    assert contents(tmp_path) == held
    assert not compress(model / "model.safetensors", "rtn-4", model / "out").already_complete  # that is a file


def test_outputs_that_would_hold_the_base_model(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    shutil.copytree(llama, base)
    for out in (base, tmp_path / "models"):
        with pytest.raises(OutputError, match="holds the base model"):
            compress(llama, "rtn-4", out, base_model=base, overwrite=True)


def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(
    llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    for kind, number in (("plan", 1), ("layer", 7), ("shard", 1)):
        with pytest.raises(Stop):
            compress(llama, "rtn-3", out, overwrite=True, observer=stopping(kind, number))
        assert contents(out) == made["rtn-4"]
    assert compress(llama, "rtn-3", out, overwrite=True).resumed == 14
    assert_only_output(out, made["rtn-3"])


def test_complete_already(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    out = tmp_path / "out"
    first = compress(llama, "rtn-4", out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = compress(llama, "rtn-4", out)
    assert again.already_complete
    assert not first.already_complete
    assert again.layers == first.layers
    assert again.resumed == len(first.layers)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert_only_output(out, made["rtn-4"])


def test_overwriting_a_complete_output_makes_it_again(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-4", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert not compress(llama, "rtn-4", tmp_path / "out", overwrite=True).already_complete


@pytest.mark.parametrize(
    "change", [{"recipe": "rtn-3"}, {"seed": 1}, {"changes": ["grid.clip=mse"]}, {"shard_bytes": 50_000}]
)
def test_another_command_is_refused(
    llama: Path, tmp_path: Path, change: dict[str, object], made: dict[str, dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    with pytest.raises(OutputError, match="the output of another command"):
        compress(llama, out=out, **({"recipe": "rtn-4"} | change))  # type: ignore[arg-type]
    assert_only_output(out, made["rtn-4"])


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_output_is_not_called_complete(llama: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    shard = out / "model.safetensors"
    os.truncate(shard, 1000) if damage == "cut short" else shard.unlink()
    with pytest.raises(OutputError, match="damaged"):
        compress(llama, "rtn-4", out)
    assert not compress(llama, "rtn-4", out, overwrite=True).already_complete


def test_unfinished_run_of_another_command(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(llama, "rtn-4", out, observer=stopping("layer", 6))
    held = contents(tmp_path / ("out" + RUN_SUFFIX))
    with pytest.raises(OutputError, match=r"unfinished run of another command.*recipe.*--overwrite"):
        compress(llama, "rtn-3", out)
    assert contents(tmp_path / ("out" + RUN_SUFFIX)) == held
    assert compress(llama, "rtn-3", out, overwrite=True).resumed == 0
    assert_only_output(out, made["rtn-3"])


def test_a_run_that_finished_no_layer_stands_in_nobodys_way(
    llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]
) -> None:
    with pytest.raises(Stop):
        compress(llama, "rtn-4", tmp_path / "out", observer=stopping("plan"))
    assert not (tmp_path / ("out" + RUN_SUFFIX)).exists()
    compress(llama, "rtn-3", tmp_path / "out")
    assert_only_output(tmp_path / "out", made["rtn-3"])


def test_files_that_appear_meanwhile_are_not_touched(
    llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    held: dict[str, bytes] = {}

    def appear(event: dict[str, object]) -> None:
        if event["event"] == "shard":
            held.update(foreign(out))

    with pytest.raises(OutputError, match="came to hold other files"):
        compress(llama, "rtn-4", out, observer=appear)
    assert contents(out) == held
    shutil.rmtree(out)
    assert compress(llama, "rtn-4", out).resumed == 14
    assert_only_output(out, made["rtn-4"])


def test_outputs_that_would_hold_the_model(tiny: object, llama: Path, tmp_path: Path, monkeypatch: object) -> None:
    model = tmp_path / "models" / "tiny"
    shutil.copytree(llama, model)
    held = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "models")  # type: ignore[attr-defined]
    link = tmp_path / "link"
    link.symlink_to(model)
    for out in (model, tmp_path / "models", tmp_path, Path("tiny"), Path("."), Path(".."), Path("/"), link):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="choose"):
                compress(model, "rtn-4", out, overwrite=overwrite)
    with pytest.raises(OutputError, match="holds the model"):
        compress(model / "model.safetensors", "rtn-4", model, overwrite=True)
    link.unlink()
    assert contents(tmp_path) == held


def test_the_current_folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for out in (tmp_path / "here" / "deeper", tmp_path / "here"):
        with pytest.raises(OutputError, match="is the current folder or holds it"):
            compress(llama, "rtn-4", out, overwrite=True)
    compress(llama, "rtn-4", "below")
    assert (tmp_path / "here" / "deeper" / "below" / "config.json").exists()


def test_impossible_outputs(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for out, sentence in (
        (file, "is a file"),
        (file / "below", "Not a directory"),
        (tmp_path / ("x" * 300), "too long"),
        (loop, "loop"),
        ("~nobody-of-this-name/out", "home directory"),
        (str(tmp_path) + "/a\0b", "null"),
    ):
        with pytest.raises(OutputError, match=f"(?i){sentence}"):
            compress(llama, "rtn-4", out, overwrite=True)
    assert file.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_link_to_a_folder(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    target, link = tmp_path / "disk" / "out", tmp_path / "link"
    target.mkdir(parents=True)
    link.symlink_to(target)
    for recipe in ("rtn-4", "rtn-3"):
        compress(llama, recipe, link, overwrite=recipe == "rtn-3")
        assert link.is_symlink()
        assert_only_output(target, made[recipe])


def test_an_empty_folder_is_used(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    (tmp_path / "out").mkdir()
    compress(llama, "rtn-4", tmp_path / "out")
    assert_only_output(tmp_path / "out", made["rtn-4"])


def test_missing_parents_are_made(llama: Path, tmp_path: Path, made: dict[str, dict[str, bytes]]) -> None:
    out = tmp_path / "a" / "b" / "out"
    compress(llama, "rtn-4", out)
    assert_only_output(out, made["rtn-4"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent(llama: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot write .*Permission denied"):
            compress(llama, "rtn-4", parent / "out")
    finally:
        parent.chmod(0o700)
