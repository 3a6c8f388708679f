"""What all formats share: the cache, `import`, names that mean a model, folders as tensors, and exporting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from toy_formats import ORIGIN, Toy, write_toy

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))  # for the command

from feather_command import feather_here

import featherweight
from featherweight.errors import CheckpointError, OutputError, RecipeError
from featherweight.interop.cache import cached
from featherweight.interop.exporting import export
from featherweight.interop.stored import StoredModel
from featherweight.model.network.source import open_source
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.resolve import resolve
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import compress
from interrupts import interrupt, start
from models import make_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imported"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("plain") / "model", tokenizer=True, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def coded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 bits, the tied embedding in 6."""
    out = tmp_path_factory.mktemp("coded") / "out"
    compress(plain, "rtn-8", out, changes=["embedding=6bit"], threads=1)
    return out


@pytest.fixture
def toy(coded: Path, tmp_path: Path) -> Path:
    return write_toy(tmp_path / "model.toy", coded)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`mount(kibibytes)`: a small file system in memory."""
    folder = tmp_path / "small disk"
    mounted = []

    def make(kibibytes: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount here")
        mounted.append(folder)
        return folder

    yield make
    for each in mounted:
        subprocess.run(["umount", "-l", str(each)], check=True)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def equal(one: Path, other: Path) -> bool:
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The cache.


def test_a_file_becomes_a_folder_of_the_same_values_once(toy: Path, coded: Path, cache: Path) -> None:
    place = resolve(toy)
    assert place.read_from == toy
    assert place.folder.parent == cache
    assert equal(place.folder, coded)
    assert verify(place.folder).problems == []
    made = (place.folder / "config.json").stat().st_mtime_ns
    assert resolve(toy).folder == place.folder
    assert (place.folder / "config.json").stat().st_mtime_ns == made


def test_a_source_that_changed_is_read_again(toy: Path, coded: Path) -> None:
    before = resolve(toy).folder
    write_toy(toy, coded, note="changed")
    assert resolve(toy).folder != before
    revision = Toy.revision
    after = resolve(toy).folder
    try:
        Toy.revision = revision + 1
        assert resolve(toy).folder != after, "an importer that reads otherwise than before"
    finally:
        Toy.revision = revision


def test_killed_half_way_it_goes_on(coded: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are complete are not read again."""
    from featherweight.interop import imported

    monkeypatch.setattr(imported, "SHARD_BYTES", 20_000)
    log = tmp_path / "log"
    names = list(Toy.open(write_toy(tmp_path / "model.toy", coded, log=log)).tensors)
    late = names[-1].module if names[-1].spec else names[-1].name
    pulled: list[str] = []
    load = Toy._load

    def until(source: Any, name: str, coded: bool, about: dict[str, Any]) -> Any:
        if name == late and not pulled:
            pulled.append(name)
            raise KeyboardInterrupt
        return load(source, name, coded, about)

    monkeypatch.setattr(Toy, "_load", staticmethod(until))
    with pytest.raises(KeyboardInterrupt):
        resolve(tmp_path / "model.toy")
    assert not [path for path in cache.iterdir() if (path / "config.json").exists()]
    first = log.read_text().splitlines()
    folder = resolve(tmp_path / "model.toy").folder
    second = log.read_text().splitlines()[len(first) :]
    assert len(second) < len(names)
    assert late in second
    assert equal(folder, coded)


def test_two_at_once_make_one(coded: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    toy = write_toy(tmp_path / "model.toy", coded, log=log, pause=0.01)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import toy_formats\n"
        "from featherweight.storage.checkpoint.resolve import resolve\nprint(resolve(sys.argv[2]).folder)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(toy)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert len(log.read_text().splitlines()) == len(Toy.open(toy).tensors)


def test_a_full_disk_is_one_sentence(toy: Path, mount: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    disk = mount(40)
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(disk))
    with pytest.raises(
        OutputError, match=r"reading this model takes .* are free: free some, or set FEATHERWEIGHT_CACHE"
    ):
        resolve(toy)
    outcome = feather_here("inspect", toy)
    assert "FEATHERWEIGHT_CACHE" in outcome.last_sentence()
    with pytest.raises(OutputError, match="choose another --out"):
        featherweight.import_model(toy, disk / "out")
    assert not (disk / "out").exists()


def test_a_source_that_lies_about_itself(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Toy._load

    def cut(source: Any, name: str, coded: bool, about: dict[str, Any]) -> Any:
        found = load(source, name, coded, about)
        return found if coded else found[:1]

    monkeypatch.setattr(Toy, "_load", staticmethod(cut))
    with pytest.raises(CheckpointError, match="the importer gave"):
        cached(Toy, toy)


# What a name means.


def test_files_that_no_importer_knows(tmp_path: Path) -> None:
    (tmp_path / "model.unheard").write_bytes(b"what")
    with pytest.raises(CheckpointError, match=r"is not a model: give a folder, a \.safetensors file or a hub id"):
        resolve(tmp_path / "model.unheard")
    with pytest.raises(CheckpointError, match="there is no folder or file"):
        resolve(tmp_path / "gone.toy" / "deeper.gguf")


def test_a_folder_by_its_config(plain: Path, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "toy"}}))
    write_toy(folder / "model.toy", coded)
    place = resolve(folder)
    assert place.read_from == folder
    assert equal(place.folder, coded)

    def asked(path: Path, config: Any) -> bool:
        raise AssertionError("no importer is asked about a plain folder or one of ours")

    monkeypatch.setattr(Toy, "recognises", staticmethod(asked))
    assert resolve(plain).folder == plain
    assert resolve(coded).folder == coded
    assert resolve(plain / "model.safetensors").folder == plain


# import


def test_import_makes_a_folder(toy: Path, coded: Path, tmp_path: Path, cache: Path) -> None:
    told: list[tuple[int, int]] = []
    made = featherweight.import_model(toy, tmp_path / "out", told=lambda done, total: told.append((done, total)))
    assert equal(tmp_path / "out", coded)
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert made.bytes == checkpoint.total_bytes
    assert (made.origin, made.coded, made.plain) == (ORIGIN, 15, 5)
    assert told[-1] == (made.bytes, made.bytes)
    assert verify(tmp_path / "out").problems == []
    assert not cache.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.toy", "out"]
    ids = torch.arange(20)[None]
    one, two = featherweight.load(tmp_path / "out")[0], featherweight.load(coded)[0]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_import_refuses_what_is_none(plain: Path, coded: Path, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="is a plain model already: there is nothing to import"):
        featherweight.import_model(plain, out)
    with pytest.raises(CheckpointError, match="is a folder of featherweight's already: there is nothing to import"):
        featherweight.import_model(coded, out)
    with pytest.raises(CheckpointError, match="no config.json"):
        featherweight.import_model(tmp_path, out)
    with pytest.raises(CheckpointError, match="there is no folder or file"):
        featherweight.import_model(tmp_path / "gone.toy", out)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        featherweight.import_model(toy, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="the folder .* is not there: make it first"):
        featherweight.import_model(toy, tmp_path / "no" / "out")
    foreign = Path(shutil.copytree(plain, tmp_path / "foreign"))
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "unheard"}}))
    with pytest.raises(CheckpointError, match="plain model|no importer here reads"):
        featherweight.import_model(foreign, tmp_path / "other")


def test_import_that_fails_leaves_nothing(coded: Path, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "model.toy", coded, stop="model.norm.weight")
    with pytest.raises(CheckpointError, match="the toy is broken at model.norm.weight"):
        featherweight.import_model(toy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.toy"]


def test_import_that_is_interrupted_leaves_nothing(coded: Path, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "model.toy", coded, pause=0.2)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import toy_formats\n"
        "from featherweight.cli.main import main\nmain(['import', sys.argv[2], '--out', sys.argv[3]])"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(toy), str(tmp_path / "out")]
    process = start(command)
    end = time.monotonic() + 60
    while not (tmp_path / "out.part").exists() and time.monotonic() < end:
        time.sleep(0.05)
    done = interrupt(process, wait=0)
    assert done.code in (130, -signal.SIGINT), done
    assert "Traceback" not in done.errors
    assert [path.name for path in tmp_path.iterdir()] == ["model.toy"]


def test_the_command(toy: Path, coded: Path, tmp_path: Path) -> None:
    done = feather_here("import", toy, "--out", tmp_path / "out", "--json", tmp_path / "said.json")
    assert done.code == 0, done
    said = json.loads((tmp_path / "said.json").read_text())
    assert (said["origin"], said["coded"], said["plain"]) == (ORIGIN, 15, 5)
    assert "15 as codes, 5 plain" in done.output
    assert "a toy is a toy" in done.errors
    assert "is there already" in feather_here("import", toy, "--out", tmp_path / "out").sentence()
    assert "nothing to import" in feather_here("import", coded, "--out", tmp_path / "other").sentence()


@pytest.mark.parametrize("by_name", [True, False])
def test_every_command_has_sensible_words_for_it(toy: Path, tmp_path: Path, by_name: bool) -> None:
    model = toy
    if not by_name:
        featherweight.import_model(toy, tmp_path / "out")
        model = tmp_path / "out"
    shown = feather_here("inspect", model)
    assert shown.code == 0
    assert f"imported from  {ORIGIN}" in " ".join(shown.output.split("\n")) or ORIGIN in shown.output
    assert "2 blocks" in shown.output
    assert "unknown family" not in shown.output
    assert feather_here("verify", model).code == 0
    said = " ".join(feather_here("plan", model, "--recipe", "rtn-4").errors.split())
    assert f"is compressed already (imported from {ORIGIN}," in said
    assert "is compressed already" in feather_here("recommend", model, "--ram", "8GB").errors
    compressed = feather_here("compress", model, "--recipe", "rtn-4", "--out", tmp_path / "small")
    assert compressed.code == 0, compressed
    assert f"compressed before (imported from {ORIGIN}," in (tmp_path / "small" / "README.md").read_text()
    assert feather_here("generate", model, "--prompt", "a", "--max-tokens", "3").code == 0
    assert feather_here("report", tmp_path / "small", "--out", tmp_path / "page.html").code == 0
    if not by_name:
        assert feather_here("report", model, "--out", tmp_path / "own.html").code == 0


# A folder as tensors.


def test_stored_tensors(plain: Path, coded: Path) -> None:
    with StoredModel(coded) as stored, Checkpoint.open(plain) as original, open_source(coded) as decoded:
        assert set(stored.tensors) == set(original.names)
        assert stored.coded
        assert stored.recipe == "rtn-8"
        assert "quantization_config" not in stored.config
        for name, tensor in stored.tensors.items():
            assert torch.equal(tensor.values().float(), decoded.tensor(name).float()), name
            assert torch.equal(torch.cat([rows for _, _, rows in tensor.windows()]), tensor.values().float())
            if tensor.spec is not None:
                assert torch.equal(tensor.code().decode(), load_code(decoded.coded, tensor.module).decode())
    with StoredModel(plain) as stored:
        assert not stored.coded
        assert all(
            torch.equal(t.values(), load_file(plain / "model.safetensors")[n]) for n, t in stored.tensors.items()
        )


def test_stored_experts(tmp_path: Path, coded: Path) -> None:
    model = make_tiny("qwen3-moe", tmp_path / "model")
    compress(model, "rtn-8", tmp_path / "out", threads=1)
    with StoredModel(tmp_path / "out") as stored, Checkpoint.open(model) as original:
        expert = next(name for name in stored.tensors if "experts.3.down_proj" in name)
        wanted = original.tensor(expert).float()
        assert float((stored.tensors[expert].values() - wanted).norm() / wanted.norm()) < 0.01


def test_another_tools_folder_is_no_stored_model(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp_quant"}}))
    with pytest.raises(CheckpointError, match="quantised by 'fp_quant', which no importer here reads"):
        StoredModel(folder)


# Exporting.


def test_export(coded: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = export(coded, "toy", tmp_path / "out", settings={"bits": 6}, told=lambda done, of: told.append((done, of)))
    assert made.path == tmp_path / "out"
    assert {verdict.becomes for verdict in made.verdicts} == {"toy 6"}
    assert made.bytes == (tmp_path / "out" / "toy.txt").stat().st_size
    assert told[-1] == (20, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_nothing(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the exporter broke"):
        export(coded, "toy", tmp_path / "out", settings={"fail_at": "model.norm.weight"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        OutputError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight \(and 1 more\) cannot be written"
    ):
        export(coded, "toy", tmp_path / "out", settings={"refuse": "q_proj"})
    assert not list(tmp_path.iterdir())


def test_where_an_export_has_no_place(coded: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "link"):
        with pytest.raises(OutputError, match="is there already"):
            export(coded, "toy", tmp_path / name)
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(OutputError, match="lies within the model's own folder"):
        export(coded, "toy", coded / "out")
    with pytest.raises(OutputError, match="is not there: make it first"):
        export(coded, "toy", tmp_path / "no" / "out")
    assert not (coded / "out.part").exists()


def test_formats_and_settings_that_do_not_exist(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'toy'"):
        export(coded, "toyy", tmp_path / "out")
    with pytest.raises(
        RecipeError, match=r"toy has no setting 'bitts' \(did you mean 'bits'\?\); settings: bits, fail_at"
    ):
        export(coded, "toy", tmp_path / "out", settings={"bitts": 3})
    with pytest.raises(RecipeError, match="toy: bits is 'many'"):
        export(coded, "toy", tmp_path / "out", settings={"bits": "many"})


def test_a_full_disk_while_exporting(
    coded: Path, mount: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount(4)
    (disk / "full").write_bytes(bytes(4096 * 0 + 4000))
    with pytest.raises(OutputError, match="disk|space"):
        export(coded, "toy", disk / "out")
    assert not (disk / "out").exists()


def test_threads_import_one_source_once(coded: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    toy = write_toy(tmp_path / "model.toy", coded, log=log)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(toy).folder)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(log.read_text().splitlines()) == len(Toy.open(toy).tensors)
