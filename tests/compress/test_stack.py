"""Stacks: bytes within the budget, every prefix a model bit for bit, growing and shrinking, hostile indices, orders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight
from featherweight.errors import CheckpointError, FeatherError, OutputError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.storage.stack.stack import Stack
from featherweight.storage.stack.writing import cut
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.stack.orders import by_level, by_saving, shuffled
from featherweight.tasks.stack.stacking import StackSettings, cut_stack, stack

TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(200))
QUICK = ("calibration.sequences=4", "calibration.length=64")
IDS = torch.arange(32)[None]


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of a tiny model in average order."""
    place = tmp_path_factory.mktemp("stack")
    (place / "text.txt").write_text(TEXT)
    model = tiny("llama", tokenizer=True, dtype=torch.float32)
    settings = StackSettings(blocks=3, rank=2, changes=QUICK, tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(place / "cache"))
        first = stack(model, place / "stack", settings=settings, calibration=place / "text.txt", threads=1)
        again = stack(model, place / "stack", settings=settings, calibration=place / "text.txt", threads=1)
        assert (again.least, again.most, again.blocks) == (first.least, first.most, first.blocks)
        assert first.blocks == 2 * first.layers
        with pytest.raises(OutputError, match="another command"):
            stack(model, place / "stack", settings=StackSettings(blocks=2, rank=2, changes=QUICK, order="local"))
    return place / "stack"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_whole_stack_is_an_ordinary_folder(made: Path) -> None:
    assert verify(made).whole
    model, _ = featherweight.load(made, dtype="float32")
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_every_prefix_is_the_sum_of_its_blocks_and_has_the_bytes_that_were_told(made: Path, tmp_path: Path) -> None:
    with Stack.open(made) as opened:
        sizes = [opened.nbytes(n) for n in range(opened.blocks + 1)]
        assert sizes == sorted(set(sizes))
        for blocks in (0, 1, opened.blocks // 2, opened.blocks):
            cut(opened, blocks, tmp_path / str(blocks))
            assert (tmp_path / str(blocks) / "model.safetensors").stat().st_size == sizes[blocks]
            assert verify(tmp_path / str(blocks)).whole
            with Checkpoint.open(tmp_path / str(blocks)) as part:
                for module, level in opened.levels(blocks).items():
                    whole = load_code(opened.checkpoint, module, level)
                    assert torch.equal(load_code(part, module).decode(), whole.decode())


def test_the_most_that_fits_is_taken(made: Path) -> None:
    with Stack.open(made) as opened:
        for blocks in (0, 3, opened.blocks - 1):
            assert opened.prefix(opened.nbytes(blocks)) == blocks
            assert opened.prefix(opened.nbytes(blocks + 1) - 1) == blocks
        assert opened.prefix("1GB") == opened.blocks
        with pytest.raises(FeatherError, match=f"smallest model of the stack .*{opened.nbytes(0)} bytes"):
            opened.prefix(opened.nbytes(0) - 1)


def test_blocks_lie_one_behind_the_other_in_their_order(made: Path) -> None:
    with Stack.open(made) as opened:
        second = opened.checkpoint.files[1]
        names = list(second.entries)
        assert [name.partition(".inner")[0].partition(".terms")[0] for name in names][::3] == list(opened.sequence)
        assert len(names) == 3 * opened.blocks
        entries = [second.entries[name] for name in names]
        assert all(a.start + a.nbytes == b.start for a, b in zip(entries, entries[1:], strict=False))
        assert all(entry.start % entry.torch_dtype.itemsize == 0 for entry in entries)


def test_growing_and_shrinking_is_loading_anew(made: Path, cache: Path) -> None:
    with Stack.open(made) as opened:
        small, middle, large = (opened.nbytes(n) for n in (0, opened.blocks // 2, opened.blocks))
    model, _ = featherweight.load(made, size=small, dtype="float32")
    held = {n: p.data_ptr() for n, p in model.named_parameters() if n.endswith("norm.weight")}
    for size in (middle, large, middle, small, middle):
        featherweight.resize(model, size)
        fresh, _ = featherweight.load(made, size=size, dtype="float32")
        state, other = model.state_dict(), fresh.state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, fresh(IDS).logits)
        assert model.config.quantization_config.specs == fresh.config.quantization_config.specs
    assert held == {n: p.data_ptr() for n, p in model.named_parameters() if n.endswith("norm.weight")}
    with pytest.raises(FeatherError, match="smallest model"):
        featherweight.resize(model, small - 1)
    plain, _ = featherweight.load(made)
    with pytest.raises(FeatherError, match="not loaded from a stack"):
        featherweight.resize(plain, "1MB")


def test_a_part_is_cut_out_as_a_folder(made: Path, tmp_path: Path) -> None:
    with Stack.open(made) as opened:
        size = opened.nbytes(2)
    part = cut_stack(made, tmp_path / "part", size)
    assert (part.blocks, part.bytes) == (2, size)
    with pytest.raises(FeatherError, match="is there already"):
        cut_stack(made, tmp_path / "part", size)
    with pytest.raises(CheckpointError, match="is no stack"):
        cut_stack(tmp_path / "part", tmp_path / "other", size)
    assert not list(tmp_path.glob("*.part"))


def changed(made: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(made, folder)
    manifest = json.loads((folder / "featherweight.json").read_text())
    change(manifest["stack"])
    (folder / "featherweight.json").write_text(json.dumps(manifest))
    return folder


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no list": lambda s: s.update(blocks="all"),
    "no module": lambda s: s["blocks"].__setitem__(0, 1000),
    "negative": lambda s: s["blocks"].__setitem__(0, -1),
    "true": lambda s: s["blocks"].__setitem__(0, True),
    "too few": lambda s: s["blocks"].pop(),
    "too many": lambda s: s["blocks"].append(0),
    "another order": lambda s: s["blocks"].reverse(),
    "another module": lambda s: s["modules"].__setitem__(0, "lm_head"),
    "twice": lambda s: s["modules"].__setitem__(0, s["modules"][1]),
    "objects": lambda s: s.update(modules=[{}] * len(s["modules"])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_does_not_fit_is_refused(name: str, made: Path, tmp_path: Path) -> None:
    folder = changed(made, tmp_path / "stack", HOSTILE[name])
    with pytest.raises(CheckpointError, match="is damaged"):
        Stack.open(folder)


def test_a_truncated_stack_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "stack")
    path = tmp_path / "stack" / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        Stack.open(tmp_path / "stack")


def test_a_stop_while_writing_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.storage.stack import writing

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_write_rest", stop)
    with pytest.raises(KeyboardInterrupt):
        cut_stack(made, tmp_path / "part", "1GB")
    assert not list(tmp_path.iterdir())


def test_levels_go_by_loss_and_what_is_no_number_comes_last() -> None:
    losses = [{"a": 2.0, "b": 1.0, "c": math.nan, "d": math.inf}, {"a": 1.0, "b": 0.5, "c": 3.0, "d": 2.0}]
    assert by_level(losses) == ["b", "a", "d", "c", "b", "a", "d", "c"]


def test_savings_go_by_error_a_byte_in_the_order_of_each_layer() -> None:
    costs = {"a": [10.0, 4.0, 3.0], "b": [8.0, 7.0, 1.0], "c": [1.0, 1.0, 1.0]}
    nbytes = {"a": [10, 20, 30], "b": [10, 20, 30], "c": [5, 6, 7]}
    # a saves 0.6 and 0.1 a byte; of b the second block saves more than the first, so both go together: 0.35
    assert by_saving(costs, nbytes) == ["a", "b", "b", "a", "c", "c"]


def test_the_random_order_has_every_block_once() -> None:
    found = shuffled({"a": 3, "b": 1, "c": 2}, 4)
    assert sorted(found) == ["a", "a", "c"]
    assert found == shuffled({"a": 3, "b": 1, "c": 2}, 4)


@pytest.mark.parametrize("order", ["knapsack", "local", "random"])
def test_other_orders(order: Any, made: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """They share what was decomposed and kept."""
    settings = StackSettings(blocks=3, rank=2, changes=QUICK, tokens=64, order=order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(made.parent / "cache"))
        model = tiny("llama", tokenizer=True, dtype=torch.float32)
        found = stack(model, tmp_path / "out", settings=settings, calibration=made.parent / "text.txt", threads=1)
    assert found.order == order
    with Stack.open(tmp_path / "out") as opened, Stack.open(made) as other:
        assert sorted(opened.sequence) == sorted(other.sequence)
        assert opened.nbytes(opened.blocks) == other.nbytes(other.blocks)


def test_a_recipe_without_blocks_is_refused(tiny: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(FeatherError, match="nothing to stack"):
        stack(
            tiny("llama", tokenizer=True), tmp_path / "out", calibration=tmp_path / "text.txt", threads=1,
            settings=StackSettings(recipe="rtn-4", blocks=None, changes=QUICK),
        )  # fmt: skip
    with pytest.raises(FeatherError, match="--order"):
        stack(tiny("llama"), tmp_path / "out", settings=StackSettings(order="best"))  # type: ignore[arg-type]
