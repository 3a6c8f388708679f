"""Networks that run on another device: the same bytes as on the CPU, from tensors that may not meet the CPU's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import networks
from featherweight.errors import FeatherError
from featherweight.methods.calibrate import session as sessions
from featherweight.methods.learn import loop
from featherweight.methods.quantize import sweep_steps
from featherweight.model.network import module
from featherweight.native.sweep import Columns, sweep_columns
from featherweight.storage.run.ownership import MANIFEST
from featherweight.tasks.compress import block_steps, memory
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.memory import quantize
from models import make_tiny
from outputs import contents
from second_device import DEVICE, OnDevice, comparable_cpu, second_device

MakeModel = Callable[..., Path]
TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(400))
SMALL = ("calibration.sequences=8", "calibration.length=24", "grid.group_size=32")
TUNED = "corrections=[{kind: scale-tuning, steps: 3, batch_size: 2, against: %s, norms: true}]"
ONCE = "rounding.rounds=1"
FEW = ("layers.include=[k_proj, down_proj]",)
"""A sweep in PyTorch's form goes column by column, a descent weight by weight: over two layers of a block, which get
two planes or one. discquant and awq take all layers."""
RECIPES: dict[str, tuple[str, ...]] = {
    "gptaq": (*SMALL, *FEW),
    "awq": (*SMALL, "transforms=[{kind: awq, points: 3, search_tokens: 128, clip_steps: 4}]"),
    "adadim-3": (*SMALL, "rounding.search_tokens=128"),
    "flexround-3": (*SMALL, "rounding.steps=3"),
    "discquant": (*SMALL, "rounding.steps=3", "rounding.batch_size=2"),
    "squeezellm": (*SMALL[:2],),
    "rsq": (*SMALL, *FEW),
    "d2quant": (*SMALL, *FEW),
    "trit-1-blockwise": (*SMALL, *FEW, ONCE, TUNED % "block"),
    "trit-1": (*SMALL, *FEW, ONCE, TUNED % "model"),
    "quarot-gptq": (*SMALL, *FEW),
    "pvq": (*SMALL[:2], "grid.dimension=8", "grid.pulses=9"),
    "zeroquant-v2": SMALL[2:],
}
SWEPT = ("gptaq", "rsq", "quarot-gptq", "trit-1", "trit-1-blockwise")
TRAINED = ("flexround-3", "discquant", "trit-1-blockwise", "trit-1")
LONG = pytest.mark.skipif("FEATHERWEIGHT_LONG_TESTS" not in os.environ, reason="set FEATHERWEIGHT_LONG_TESTS=1")
PRESETS = [pytest.param(name, marks=LONG) if name == "trit-1" else name for name in RECIPES]
"""A descent in PyTorch's form takes minutes: of the two presets with one, this file always runs the other."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two narrow blocks: what goes column by column here takes a hundred times as long as natively."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    return make_tiny("llama", folder, tokenizer=True, hidden_size=32, head_dim=8, intermediate_size=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with comparable_cpu(monkeypatch):
        yield


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices of all that is trained, filled as it is."""
    seen: list[torch.device] = []
    before = loop._Trainer.__init__

    def begin(self: loop._Trainer, theta: list[torch.Tensor], *rest: object) -> None:
        seen.extend(value.device for value in theta)
        before(self, theta, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop._Trainer, "__init__", begin)
    return seen


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_bytes(
    preset: str,
    llama: Path,
    text: Path,
    tmp_path: Path,
    trained: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes, gathered, solved = RECIPES[preset], list[bool](), list[bool]()
    compress(llama, preset, tmp_path / "cpu", changes=changes, calibration=text, threads=1)
    trained.clear()
    add = sessions.Accumulator.add

    def watched(self: sessions.Accumulator, inputs: torch.Tensor, *rest: object) -> None:
        gathered.append(isinstance(inputs, OnDevice))
        add(self, inputs, *rest)  # type: ignore[arg-type]

    def swept(columns: Columns, *rest: Any) -> Any:
        solved.append(isinstance(columns.weight, OnDevice))
        return sweep_columns(columns, *rest)

    monkeypatch.setattr(sessions.Accumulator, "add", watched)
    monkeypatch.setattr(sweep_steps, "sweep_columns", swept)
    with second_device() as device:
        compress(llama, preset, tmp_path / "there", changes=changes, calibration=text, threads=1, device=device)
    assert all(gathered)
    assert all(solved)
    assert bool(solved) or preset not in SWEPT
    assert set(trained) == ({DEVICE} if preset in TRAINED else set())
    here, there = contents(tmp_path / "cpu"), contents(tmp_path / "there")
    (rest, errors), (wanted, expected) = (taken_apart(files.pop(MANIFEST)) for files in (there, here))
    assert errors == pytest.approx(expected, rel=1e-5)  # float32 sums over tensors that lie otherwise in memory
    assert rest == wanted
    assert there == here


def taken_apart(manifest: bytes) -> tuple[Any, list[float]]:
    """A manifest without its fractions, which are measured errors, and these in their order."""
    fractions = list[float]()
    return json.loads(manifest, parse_float=lambda text: fractions.append(float(text))), fractions


def test_statistics_files(llama: Path, text: Path, tmp_path: Path) -> None:
    settings = {"sequences": 8, "length": 24}
    needs = ("gram", "mean", "mean_abs", "inputs", "held_out_gram")
    here = gather_statistics(llama, tmp_path / "here.safetensors", text, needs, settings)
    with second_device() as device:
        there = gather_statistics(llama, tmp_path / "there.safetensors", text, needs, settings, device=device)
    assert there.read_bytes() == here.read_bytes()


def test_layers_without_data(llama: Path, tmp_path: Path) -> None:
    compress(llama, "ptqtp", tmp_path / "cpu", threads=1)
    with second_device() as device:
        compress(llama, "ptqtp", tmp_path / "there", threads=1, device=device)
        with pytest.raises(FeatherError, match="^workers share the processors, and layers are solved on lazy:0; leave"):
            compress(llama, "ptqtp", tmp_path / "no", threads=1, device=device, workers=2)
    assert contents(tmp_path / "there") == contents(tmp_path / "cpu")


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("ptqtp", ("grid.group_size=32",)),
        ("gptq", (*SMALL, "embedding={grid: {kind: uniform, bits: 6, group_size: 32}}")),
    ],
)
def test_a_model_in_memory(recipe: str, changes: tuple[str, ...], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solved where it is, with the CPU's codes, which are there as well."""
    solved, before = list[str](), memory.solve_layer
    windows = networks.ids(8, 24)

    def solve(job: Any, source: Any, group: Any, options: Any, *rest: Any) -> Any:
        solved.append(options.device)
        return before(job, source, group, options, *rest)

    monkeypatch.setattr(memory, "solve_layer", solve)
    monkeypatch.setattr(block_steps, "solve_layer", solve)
    here = quantize(networks.whole("llama", llama), recipe, windows, changes=changes, threads=1)
    assert set(solved) == {"cpu"}
    solved.clear()
    monkeypatch.setattr(module, "_same", lambda one, other: one is other)  # addresses are not within reach
    with second_device() as device:
        there = quantize(networks.whole("llama", llama).to(device), recipe, windows, changes=changes, threads=1)
        stored = {name: value.cpu() for name, value in there.state_dict().items() if isinstance(value, OnDevice)}
    assert set(solved) == {str(DEVICE)}
    wanted = here.state_dict()
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in stored.items())


def test_a_run_goes_on_on_another_device(llama: Path, tmp_path: Path) -> None:
    """What is finished stays; run.json says where the work is done, and the log that it was done elsewhere before."""
    out, events = tmp_path / "out", list[dict[str, Any]]()

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "layer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(llama, "ptqtp", out, threads=1, observer=stop)
    begun = out.with_name("out.feather-run") / "run.json"
    assert json.loads(begun.read_text())["device"] == "cpu"
    with second_device() as device, pytest.raises(KeyboardInterrupt):
        compress(llama, "ptqtp", out, threads=1, device=device, observer=stop)
    assert json.loads(begun.read_text())["device"] == "lazy:0"
    result = compress(llama, "ptqtp", out, threads=1, observer=events.append)
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert any(text.startswith("this run was on lazy:0 before and goes on on cpu: ") for text in notes)
    assert result.resumed > 0


def test_the_second_device_is_one() -> None:
    """What the other tests rest on: mixing fails, and so does reaching for memory."""
    with second_device() as device:
        there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
        assert there.device == DEVICE
        assert (there.to(torch.float64) + 1).cpu().tolist() == [[2.0] * 3] * 2
        for mix in (lambda: there + here, lambda: here @ there.T, lambda: here[there[0].long()], there.numpy):
            with pytest.raises(RuntimeError):
                mix()
        with pytest.raises(RuntimeError):
            there.data_ptr()
        with pytest.raises(RuntimeError):
            torch.rand(2, device=device, generator=torch.Generator())
