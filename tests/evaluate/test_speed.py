"""`measure_speed` and `feather bench` on the bundled model and on folders of random codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.synthetic_folder import VARIANTS, write_folder

import featherweight
from featherweight.cli.main import main
from featherweight.errors import EvaluationError
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.native import measure
from featherweight.storage.checkpoint.size import bytes_per_token, measure_size
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.evaluate import speed
from featherweight.tasks.evaluate.speed import TransformersRunner, measure_speed

REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"
REQUIRED = (
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "bytes_per_token",
    "bandwidth_gb_s",
    "bandwidth_share",
    "peak_memory_bytes",
)
# The reference model: 8 blocks, 2 key-value heads of 64.
FLOAT16_POSITION, INT8_POSITION = 2 * 8 * 2 * 64 * 2, 2 * 8 * 2 * (64 + 4)


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BUFFER_BYTES", 1 << 22)


def needs_native() -> None:
    from featherweight.model.decoder import native

    try:
        native.functions()
    except UnsupportedModelError as error:
        pytest.skip(str(error))


def test_command_writes_what_is_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    options = ["--prompt", "16", "--generate", "2", "--repeats", "1", "--threads", "1", "--json", str(file)]
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(REFERENCE), *options])
    assert stop.value.code == 0
    report = json.loads(file.read_text())
    assert all(report[key] > 0 for key in REQUIRED)
    assert (report["prompt_tokens"], report["context_tokens"], report["new_tokens"]) == (16, 16, 2)
    printed = capsys.readouterr().out
    assert f"{report['decode_tokens_per_second']:.1f} tokens/s" in printed
    assert "start-up" in printed


@pytest.mark.parametrize(("cache", "position"), [("float16", FLOAT16_POSITION), ("int8", INT8_POSITION)])
def test_native_engine_is_measured(cache: str, position: int) -> None:
    needs_native()
    options: dict[str, Any] = {"engine": "native", "cache": cache, "threads": 1, "repeats": 1}
    report = measure_speed(REFERENCE, 24, 4, context_tokens=8, **options)
    assert report["engine"] == "native"
    assert report["kv_cache"] == cache
    assert report["context_tokens"] == 8
    assert 0 <= report["outside_kernels_share"] < 1
    longer = measure_speed(REFERENCE, 24, 4, context_tokens=18, **options)
    assert longer["bytes_per_token"] - report["bytes_per_token"] == 10 * position
    read = report["decode_tokens_per_second"] * report["bytes_per_token"]
    assert report["bandwidth_share"] == pytest.approx(read / (report["bandwidth_gb_s"] * 1e9))


def test_native_engine_processes_one_token_for_each_that_is_counted() -> None:
    needs_native()
    runner = speed._native(REFERENCE, "auto", 1)
    assert isinstance(runner, speed.NativeRunner)
    runner.prefill(torch.arange(10))
    before = runner.model.stats()
    runner.generate(5)
    after = runner.model.stats()
    assert after.passes - before.passes == 5
    assert after.prompt_tokens - before.prompt_tokens + after.new_tokens - before.new_tokens <= 6


def test_transformers_take_over_where_the_native_engine_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise UnsupportedModelError("no such family")

    monkeypatch.setattr(speed, "_native", refuse)
    report = measure_speed(REFERENCE, 8, 2, threads=1, repeats=1)
    assert report["engine"] == "transformers"
    assert report["outside_kernels_share"] is None
    assert report["bytes_per_token"] == bytes_per_token(REFERENCE) + 2 * FLOAT16_POSITION * (8 + 1)  # float32
    with pytest.raises(UnsupportedModelError):
        measure_speed(REFERENCE, 8, 2, engine="native")
    with pytest.raises(EvaluationError, match="KV cache of int8"):
        measure_speed(REFERENCE, 8, 2, cache="int8")


def test_transformers_continue_with_the_likeliest_token() -> None:
    runner = TransformersRunner(REFERENCE, "float32")
    runner.prefill(torch.arange(8))
    first = int(runner._out.logits[0, -1].argmax())
    runner.generate(1)
    with torch.inference_mode():
        expected = runner.model(input_ids=torch.tensor([[*range(8), first]])).logits[0, -1]
    torch.testing.assert_close(runner._out.logits[0, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "at least one token"),
        ({"new_tokens": 0}, "at least one token"),
        ({"context_tokens": 0}, "at least one token"),
        ({"engine": "gpu"}, "the engine is 'gpu'"),
        ({"cache": "int4"}, "the KV cache is 'int4'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        measure_speed(REFERENCE, **options)


def test_limits_of_the_machine_are_plausible() -> None:
    bandwidth, peak = measure.read_bandwidth(1 << 24, 1, 1), measure.int8_peak(1)
    if bandwidth is None or peak is None:
        pytest.skip("needs the native library")
    assert 1e8 < bandwidth < 1e13
    assert 1e8 < peak < 1e14
    assert 1e8 < (measure.bf16_peak(1) or 0) < 1e14


def test_without_the_native_library_there_are_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    assert measure.read_bandwidth(1 << 20) is None
    assert measure.int8_peak() is None
    assert measure.bf16_peak() is None
    assert speed.read_bandwidth(size=1 << 22) > 0


def test_bench_says_what_the_lack_of_the_native_library_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "bench.json"
    options = ["--prompt", "8", "--generate", "2", "--repeats", "1", "--json", str(report)]
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", "off")
    with pytest.raises(SystemExit, match="0"):
        main(["bench", str(REFERENCE), *options])
    text = " ".join(capsys.readouterr().out.split())
    seen = json.loads(report.read_text())
    assert seen["without_native_library"] == "FEATHERWEIGHT_NATIVE turns it off; unset that"
    assert f"a token takes {1 / seen['bandwidth_share']:.3g} times as long as reading it does" in text
    monkeypatch.delenv("FEATHERWEIGHT_NATIVE")
    report.unlink()
    with pytest.raises(SystemExit, match="0"):
        main(["bench", str(REFERENCE), *options])
    assert "as long as reading it" not in capsys.readouterr().out
    assert json.loads(report.read_text())["without_native_library"] is None


BITS = {"planes-1": 1.725, "planes-2": 3.45, "planes-2-tied": 3.45, "planes-3": 5.175, "uniform-4": 4.125, "bf16": 16}


@pytest.mark.parametrize("name", VARIANTS)
def test_synthetic_folders_are_whole_and_run(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / name, "tiny", name)
    assert verify(folder).whole
    bits = measure_size(folder).linear_bits
    assert bits == pytest.approx(BITS.get(name, bits), abs=2e-3)
    model, _ = featherweight.load(folder, dtype="float32")
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(6)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert 0.01 < float(logits.std()) < 10
