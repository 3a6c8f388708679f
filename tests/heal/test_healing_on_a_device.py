"""Healing where the networks run on another device: the CPU's bytes, and values that are trained there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import featherweight
from featherweight.errors import FeatherError
from featherweight.methods.learn import loop
from featherweight.tasks.heal.memory import Need
from featherweight.tasks.heal.settings import HealSettings
from models import make_tiny
from outputs import contents
from second_device import DEVICE, comparable_cpu, metered, second_device

QUICK = HealSettings(steps=3, batch=2, length=16, windows=12, held_out=3, score=0, learning_rate=0.02)
RECIPE = {"name": "plane", "grid": {"kind": "trit-planes", "planes": 1, "group_size": 32}, "embedding": "4bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its small one, and text."""
    folder, draw = tmp_path_factory.mktemp("heal"), random.Random(0)
    narrow = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    make_tiny("llama", folder / "model", tokenizer=True, initializer_range=0.2, **narrow)
    featherweight.compress(folder / "model", RECIPE, folder / "small")
    words = ["once", "upon", "a", "time", "there", "was", "rain"]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(1500)))
    return folder


def heal(folder: Path, out: Path, settings: HealSettings, device: str | torch.device = "cpu") -> None:
    featherweight.heal(
        folder / "small", folder / "model", out, settings=settings, text=folder / "text.txt", threads=1, device=device
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "mixed"},
        {"level": "scales"},
        {"level": "blocks", "window": 2},
        {"training": "cat-q"},
        {"training": "cat-q", "level": "blocks"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_same_bytes(
    settings: dict[str, object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = HealSettings(**{**vars(QUICK), **settings})  # type: ignore[arg-type]
    devices, needs, before = list[torch.device](), list[Need](), loop._Trainer.__init__

    def begin(self: loop._Trainer, theta: list[torch.Tensor], *rest: object) -> None:
        devices.extend(value.device for value in theta if value.numel() > 1)  # a counter of steps is no value
        before(self, theta, *rest)  # type: ignore[arg-type]

    with comparable_cpu(monkeypatch):
        heal(folder, tmp_path / "cpu", chosen)
        monkeypatch.setattr(loop._Trainer, "__init__", begin)
        monkeypatch.setattr("featherweight.tasks.heal.healing.check_room", lambda need, *_: needs.append(need))
        with second_device() as device, metered() as meter:
            heal(folder, tmp_path / "there", chosen, device)
    assert set(devices) == {DEVICE}
    assert 0 < meter.most <= needs[0].on_device
    assert contents(tmp_path / "there") == contents(tmp_path / "cpu")


def test_a_device_that_is_too_small_is_said_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherweight.tasks.heal.memory.free_bytes", lambda device: 1 << 20)
    with (
        second_device() as device,
        pytest.raises(FeatherError, match=r"needs about .* of memory on lazy:0, and 1\.05 MB are free: try --level b"),
    ):
        heal(folder, tmp_path / "no", QUICK, device)
    with pytest.raises(FeatherError, match="the device 'cuda:99' cannot be used"):
        heal(folder, tmp_path / "no", QUICK, "cuda:99")
    assert not list(tmp_path.iterdir())
