"""`--max-device-memory`: what a run takes of a device against what was planned, batches that fit, and refusals."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.cli.main import main
from featherweight.errors import FeatherError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import load_recipe
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress import device_memory
from featherweight.tasks.compress.account import accounted_anatomy
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.device_memory import gathering_share, placed
from featherweight.tasks.compress.device_share import DeviceShare, limit_on
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.plan import make_plan
from models import make_tiny
from second_device import DEVICE, comparable_cpu, metered, second_device

TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(600))
SMALL = ("calibration.sequences=5", "calibration.length=64", "calibration.batch_tokens=256", "grid.group_size=32")
TUNED = "corrections=[{kind: scale-tuning, steps: 2, batch_size: 4, against: %s}]"
ONCE = "rounding.rounds=1"
FEW = ("layers.include=[k_proj, down_proj]",)
"""A descent in PyTorch's form goes weight by weight: over two layers of a block, which get two planes or one."""
RECIPES: dict[str, tuple[str, ...]] = {
    "ptqtp": ("grid.group_size=32",),
    "gptaq": (*SMALL, *FEW),
    "flexround-3": (*SMALL, "rounding.steps=2"),
    "trit-1-blockwise": (*SMALL, *FEW, ONCE, TUNED % "block"),
    "trit-1": (*SMALL, *FEW, ONCE, TUNED % "model"),
    "squeezellm": SMALL[:3],
}
LONG = pytest.mark.skipif("FEATHERWEIGHT_LONG_TESTS" not in os.environ, reason="set FEATHERWEIGHT_LONG_TESTS=1")
PRESETS = [pytest.param(name, marks=LONG) if name == "trit-1-blockwise" else name for name in RECIPES]
"""A descent in PyTorch's form takes minutes: of the two presets with one, this file always runs the other."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, of which every phase holds what it would of more."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    return make_tiny("llama", folder, torch.float32, tokenizer=True, num_hidden_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with comparable_cpu(monkeypatch):
        yield


def share_of(model: Path, preset: str, limit: int | None = None) -> DeviceShare:
    with Checkpoint.open(model) as checkpoint:
        plan = make_plan(checkpoint, load_recipe(preset, RECIPES[preset]), 1)
        return placed(plan, checkpoint, DEVICE, limit)[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_planned_suffices(preset: str, model: Path, text: Path, tmp_path: Path) -> None:
    planned = share_of(model, preset).nbytes
    with second_device() as device, metered() as meter:
        compress(
            model, preset, tmp_path / "out", changes=RECIPES[preset], calibration=text, threads=1, device=device,
            max_device_memory=planned,
        )  # fmt: skip
    assert meter.most <= planned <= 4 * meter.most


def test_batches_fit(model: Path, text: Path, tmp_path: Path) -> None:
    """Half of what four windows take, and the statistics are the same but for the order of sums."""
    full, one = share_of(model, "gptaq"), share_of(model, "gptaq", 1)
    assert (full.windows, one.windows) == (None, 0)
    limit = (full.nbytes + one.nbytes) // 2
    share = share_of(model, "gptaq", limit)
    assert share.windows in (1, 2, 3)
    assert share.nbytes <= limit < max(phase.nbytes((share.windows or 0) + 1) for phase in share.phases)
    events: list[dict[str, Any]] = []
    wanted = compress(model, "gptaq", tmp_path / "cpu", changes=RECIPES["gptaq"], calibration=text, threads=1)
    with second_device() as device, metered() as meter:
        found = compress(
            model, "gptaq", tmp_path / "out", changes=RECIPES["gptaq"], calibration=text, threads=1, device=device,
            max_device_memory=limit, observer=events.append,
        )  # fmt: skip
    assert meter.most <= limit
    planned = next(event for event in events if event["event"] == "plan")
    assert (planned["device_windows"], planned["device_memory_limit"]) == (share.windows, limit)
    for one_layer, other in zip(found.layers, wanted.layers, strict=True):
        assert one_layer["relative_error"] == pytest.approx(other["relative_error"], rel=1e-3)


def test_statistics_in_little_memory(model: Path, text: Path, tmp_path: Path) -> None:
    settings = {"sequences": 4, "length": 64, "batch_tokens": 256}
    with Checkpoint.open(model) as checkpoint:
        anatomy, chosen = accounted_anatomy(checkpoint)[0], CalibrationSettings(**settings)
        need = gathering_share(anatomy, checkpoint, chosen, ("gram",), DEVICE, None)
        limit = need.nbytes * 2 // 3
        assert gathering_share(anatomy, checkpoint, chosen, ("gram",), DEVICE, limit).windows in range(1, 4)
    with second_device() as device, metered() as meter:
        gather_statistics(
            model, tmp_path / "a.safetensors", text, ("gram",), settings, device=device, max_device_memory=limit
        )
        assert meter.most <= limit
        with pytest.raises(FeatherError, match="^gathering statistics needs .* window of 64 tokens"):
            gather_statistics(
                model, tmp_path / "b.safetensors", text, ("gram",), settings, device=device, max_device_memory="1MB"
            )


def test_rows_of_layers_that_are_solved_without_data(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer go together where all do not fit; the narrowest that is tried may still be too wide."""
    monkeypatch.setattr(device_memory, "WINDOWS", (1 << 14, 1 << 12))
    limit = share_of(model, "ptqtp").nbytes - 1
    with Checkpoint.open(model) as checkpoint:
        plan = make_plan(checkpoint, load_recipe("ptqtp", RECIPES["ptqtp"]), 1)
        narrow, share = placed(plan, checkpoint, DEVICE, limit)
        assert narrow.options.window_bytes == 1 << 14
        share.check()
        with pytest.raises(FeatherError, match=r"^solving .*_proj \[.*\] needs .* the solver, for .*_proj"):
            placed(plan, checkpoint, DEVICE, 1000)[1].check()


def test_what_does_not_fit_is_said_before_anything_is_done(model: Path, text: Path, tmp_path: Path) -> None:
    with second_device() as device, pytest.raises(FeatherError) as raised:
        compress(
            model, "gptaq", tmp_path / "out", changes=(*SMALL, "calibration.length=128"), calibration=text,
            device=device, max_device_memory="1MB",
        )  # fmt: skip
    said = str(raised.value)
    assert said.startswith("gathering statistics needs ")
    assert " on lazy:0, and --max-device-memory gives 1 MB: " in said
    for part in ("one window of 128 tokens", "the weights of a block", "calibration.length", "--device cpu"):
        assert part in said
    assert not (tmp_path / "out").exists()


def test_what_is_free_is_the_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 1_000_000)
    share = share_of(model, "gptaq")
    assert (share.limit, share.said) == (1_000_000, False)
    with pytest.raises(FeatherError, match=r"free are 1 MB"):
        share.check()
    wide = share_of(model, "gptaq", 1 << 30)
    wide.check()
    assert wide.spare_bytes(5) == ((1 << 30) - wide.nbytes) // 2
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 0)
    unknown = share_of(model, "gptaq")
    unknown.check()
    assert (unknown.limit, unknown.windows, unknown.spare_bytes(5)) == (None, None, 5)


def test_limits_that_make_no_sense() -> None:
    cpu = torch.device("cpu")
    assert limit_on(cpu, "auto", "2GB") is None
    assert limit_on(DEVICE, DEVICE, "2GB") == 2_000_000_000
    for device, named, limit, said in (
        (cpu, "cpu", "2GB", "--max-memory is for it"),
        (DEVICE, DEVICE, 0, "is 0 bytes"),
        (DEVICE, DEVICE, "much", "'much' is not a size"),
    ):
        with pytest.raises(FeatherError, match=said):
            limit_on(device, named, limit)


def test_the_plan_says_what_the_device_needs(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("featherweight.system.devices.device_named", lambda name: DEVICE)
    out = tmp_path / "plan.json"
    arguments = ["plan", str(model), "--recipe", "gptaq", "--device", "lazy", "--max-device-memory", "1GB"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *(x for change in SMALL for x in ("--set", change)), "--json", str(out)])
    assert ended.value.code == 0
    told = json.loads(out.read_text())
    assert told["device_memory_bytes"] == share_of(model, "gptaq").nbytes
    assert told["device_memory_limit"] == 1_000_000_000
    assert re.search(r"memory of lazy:0 +about .* \(1 GB given\)", capsys.readouterr().out)
