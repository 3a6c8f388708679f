"""Evaluation on another device: the same numbers as on the CPU, and nothing but single numbers leaves the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_folders import llama, text  # noqa: F401  fixtures
from torch.nn.attention import SDPBackend, sdpa_kernel

from featherweight.cli.backends import BackendSettings, GenerationSettings, open_backend
from featherweight.errors import EvaluationError, FeatherError
from featherweight.model.layers.modules import CodedModule
from featherweight.system import devices
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.evaluate import opening, speed
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.opening import keep_decoded, open_model
from featherweight.tasks.evaluate.speed import measure_speed
from second_device import DEVICE, OnDevice, second_device


@pytest.fixture(autouse=True)
def one_kernel() -> Iterator[None]:
    """Attention by the same operations on both devices: the second one knows no fused kernels."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def without_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device has no tensors of inference mode."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)


@pytest.fixture
def small(llama: Path, tmp_path: Path) -> Path:  # noqa: F811
    compress(llama, "ptqtp", tmp_path / "small", changes=("grid.group_size=32",), threads=1)
    return tmp_path / "small"


@pytest.fixture
def leaving(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every tensor of floats that was read from the second device."""
    seen: list[int] = []
    before: Callable[..., torch.Tensor] = torch.Tensor.cpu

    def cpu(self: torch.Tensor) -> torch.Tensor:
        if isinstance(self, OnDevice) and self.is_floating_point():
            seen.append(self.numel())
        return before(self)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    return seen


def test_the_same_numbers(small: Path, llama: Path, text: Path, leaving: list[int]) -> None:  # noqa: F811
    here = evaluate(small, llama, text, context=32, dtype="bfloat16", device="cpu")
    leaving.clear()
    with second_device() as device:
        there = evaluate(small, llama, text, context=32, dtype="bfloat16", device=device)
    assert here.divergence is not None
    assert here.divergence.mean > 0
    assert there.divergence == here.divergence
    assert there.window_losses == here.window_losses
    assert there.perplexity_against == here.perplexity_against
    # whole logits of a window are 32 x 32; a number a token is 32, the tokens that check for causality have 32
    scored = [count for count in leaving if count > 32]
    weights = {p.numel() for p in open_model(small, "bfloat16", torch.device("cpu"))[0].parameters()}
    assert leaving
    assert set(scored) <= weights  # what is stored of compressed layers is decoded in main memory


def test_the_compute_type_is_the_devices(small: Path, text: Path) -> None:  # noqa: F811
    assert evaluate(small, text=text, context=32, device="cpu").setting.dtype == "float32"
    with second_device() as device:
        assert evaluate(small, text=text, context=32, device=device).setting.dtype == "bfloat16"


def test_matrices_are_kept_as_far_as_there_is_room(small: Path) -> None:
    model, _ = open_model(small, "bfloat16", torch.device("cpu"))
    coded = [module for module in model.modules() if isinstance(module, CodedModule)]
    sizes = [2 * module.spec["shape"][0] * module.spec["shape"][1] for module in coded]
    assert keep_decoded(model, sizes[0] + sizes[1]) == sizes[0] + sizes[1]
    assert [module.cache for module in coded] == [True, True] + [False] * (len(coded) - 2)


def test_a_device_that_is_not_there(llama: Path, text: Path) -> None:  # noqa: F811
    with pytest.raises(FeatherError, match=r"^the device 'cuda:99' cannot be used \(.+\): take cpu.*, or auto$"):
        evaluate(llama, text=text, device="cuda:99")


def test_a_device_that_is_too_small(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    monkeypatch.setattr(opening, "free_bytes", lambda _: 0)
    with second_device() as device, pytest.raises(EvaluationError, match="does not fit into the memory of lazy:0"):
        evaluate(llama, text=text, context=32, device=device)


def test_speed_is_measured_there(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """By transformers, waiting for the device each time the clock is looked at."""
    waits: list[torch.device] = []
    monkeypatch.setattr(speed, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "synchronise", waits.append)
    with second_device() as device:
        report = measure_speed(llama, 8, 2, repeats=1, device=device)
        with pytest.raises(EvaluationError, match="^the native decoder, and its KV caches, are on the CPU"):
            measure_speed(llama, 8, 2, engine="native", device=device)
        with pytest.raises(EvaluationError, match="take --device cpu, or --engine transformers without a cache"):
            measure_speed(llama, 8, 2, cache="int8", device=device)
    assert (report["engine"], report["device"], report["peak_device_memory_bytes"]) == ("transformers", "lazy:0", None)
    assert waits.count(DEVICE) == len(waits) >= 8  # of bandwidth, prompt and generation: before and after, and warm


def test_speed_on_a_device_that_is_not_there(small: Path) -> None:
    with pytest.raises(FeatherError, match="^the device 'cuda:99' cannot be used"):
        measure_speed(small, 8, 2, device="cuda:99")


def test_text_is_written_there(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same text as on the CPU; the native decoder is named as what does not run there."""
    named: Callable[..., torch.device] = devices.device_named
    monkeypatch.setattr(devices, "device_named", lambda name: DEVICE if name == "lazy" else named(name))
    said = []
    settings = GenerationSettings(6, 0.0, None, None, 0)
    for device, engine in (("cpu", "transformers"), ("lazy", "auto")):
        with second_device():
            backend = open_backend(BackendSettings(str(small), engine, "bfloat16", threads=1, device=device))
            said.append(backend.write(backend.encode("green bottles"), settings))
    assert said[0] == said[1]
    assert isinstance(next(backend.model.parameters()), OnDevice)  # type: ignore[attr-defined]
    assert capsys.readouterr().err.count("the native decoder is on the CPU; transformers runs the model on lazy:0") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "native"}, "^--engine native is for the native decoder, which is on the CPU, not on lazy:0"),
        ({"kv_cache": "int8"}, "^--kv-cache is for the native decoder, which is on the CPU, not on lazy:0"),
        ({"device": "cuda:99"}, "^the device 'cuda:99' cannot be used"),
    ],
)
def test_devices_that_cannot_write(settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named: Callable[..., torch.device] = devices.device_named
    monkeypatch.setattr(devices, "device_named", lambda name: DEVICE if name == "lazy" else named(name))
    with pytest.raises(FeatherError, match=said):
        open_backend(BackendSettings("no-such-model", **{"device": "lazy", **settings}))
