"""Whatever moment a run dies at, the same command finishes it, and the bytes are those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import OutputError
from featherweight.storage.run.folder import RUN_SUFFIX
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import compress
from outputs import Stop, assert_only_output, compress_and_die, contents, in_process, log_events, start, stopping

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")

OPTIONS: dict[str, Any] = {"recipe": "ptqtp", "shard_bytes": 60_000}
MOMENTS = 20


@pytest.fixture(scope="module")
def model(tiny: Any) -> Path:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny("llama", num_hidden_layers=24, tokenizer=True, **small)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int, float]:
    """The output of an uninterrupted run, how many operations on files it makes, how many seconds it takes."""
    folder = tmp_path_factory.mktemp("whole")
    counted = str(folder / "count")
    begun = time.monotonic()
    assert in_process(compress_and_die, str(model), str(folder / "made" / "out"), OPTIONS, None, counted) == 0
    seconds = time.monotonic() - begun
    return contents(folder / "made" / "out"), int(Path(counted).read_text()), seconds


def finish(model: Path, out: Path, expected: dict[str, bytes], **options: Any) -> Any:
    """Run the command to its end; the layers that the log says are finished must not be done again."""
    done = {event["number"] for event in log_events(out) if event["event"] == "layer"}
    result = compress(model, out=out, threads=1, **(OPTIONS | options))
    assert_only_output(out, expected)
    assert result.resumed >= len(done)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_random_moments(
    model: Path, whole: tuple[dict[str, bytes], int, float], tmp_path: Path, moment: int
) -> None:
    expected, operations, seconds = whole
    chance = random.Random(1000 + moment)
    kind = ("file", "event", "time", "file")[moment % 4]
    when = {"file": chance.randrange(operations), "event": chance.randrange(170), "time": chance.random() * seconds}
    out = tmp_path / "out"
    code = in_process(compress_and_die, str(model), str(out), OPTIONS, (kind, when[kind]))
    assert code == -signal.SIGKILL or kind == "time"
    finish(model, out, expected)


@pytest.mark.slow
def test_killed_again_and_again(model: Path, whole: tuple[dict[str, bytes], int, float], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(5):
        assert in_process(compress_and_die, str(model), str(out), OPTIONS, ("event", 30)) == -signal.SIGKILL
    finish(model, out, whole[0])


@pytest.fixture(scope="module")
def publishing(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, bytes], int]:
    """An old output, the new one that replaces it, and how many operations that takes."""
    folder = tmp_path_factory.mktemp("publishing")
    compress(llama, "rtn-4", folder / "old", threads=1)
    compress(llama, out=folder / "out", **OPTIONS, threads=1)
    new = contents(folder / "out")
    old = contents(folder / "old")
    (folder / "again").mkdir()
    os.rename(folder / "old", folder / "again" / "out")
    options = OPTIONS | {"overwrite": True}
    counted = folder / "count"
    assert in_process(compress_and_die, str(llama), str(folder / "again" / "out"), options, None, str(counted)) == 0
    return old, new, int(counted.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("before_end", range(1, 25))
def test_killed_while_replacing(
    llama: Path,
    publishing: tuple[dict[str, bytes], dict[str, bytes], int],
    tmp_path: Path,
    before_end: int,
) -> None:
    """At every step of the end of the run: the old output or the new one is there, and the command finishes."""
    old, new, operations = publishing
    out = tmp_path / "out"
    for name, content in old.items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    options = OPTIONS | {"overwrite": True}
    moment = ("file", operations - before_end)
    assert in_process(compress_and_die, str(llama), str(out), options, moment) == -signal.SIGKILL
    aside = tmp_path / ("out" + RUN_SUFFIX) / "replaced"
    assert contents(out) in (old, new) or contents(aside) == old
    compress(llama, out=out, threads=1, **options)
    assert_only_output(out, new)


def test_the_old_output_comes_back_when_its_replacement_is_discarded(
    llama: Path, publishing: tuple[dict[str, bytes], dict[str, bytes], int], tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    rename = os.rename

    def second_fails(source: Any, target: Any) -> None:
        if Path(target) == out:
            raise Stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(Stop):
        compress(llama, out=out, overwrite=True, **OPTIONS)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(Stop):
        compress(llama, "rtn-3", out, overwrite=True, observer=stopping("plan"))
    assert contents(out) == publishing[0]


def test_interrupted_by_the_keyboard(model: Path, whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(event: dict[str, Any]) -> None:
        if event.get("number") == 40:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(model, out=out, observer=interrupt, **OPTIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not out.exists()
    assert log_events(out)[-1]["event"] == "stopped"
    finish(model, out, whole[0])


# Damage to what an interrupted run left.


def damage_truncated(artifacts: list[Path], chance: random.Random) -> None:
    for path in artifacts:
        os.truncate(path, chance.randrange(path.stat().st_size))


def damage_bit(artifacts: list[Path], chance: random.Random) -> None:
    for path in artifacts:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)


def damage_record(artifacts: list[Path], chance: random.Random) -> None:
    """A digit of the recorded error, of the same length: valid JSON, wrong number."""
    for path in artifacts:
        content = path.read_bytes()
        place = content.index(b"relative_error") + 22
        assert content[place : place + 1].isdigit()
        path.write_bytes(
            content[:place] + (b"1" if content[place : place + 1] != b"1" else b"2") + content[place + 1 :]
        )


def damage_exchanged(artifacts: list[Path], chance: random.Random) -> None:
    held = [path.read_bytes() for path in artifacts]
    for path, content in zip(artifacts, held[1:] + held[:1], strict=True):
        path.write_bytes(content)


def damage_zeros(artifacts: list[Path], chance: random.Random) -> None:
    """What a power cut can leave of a file whose name was already written."""
    for path in artifacts:
        path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [damage_truncated, damage_bit, damage_record, damage_exchanged, damage_zeros]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", ["layer", "shard"])
def test_damaged_artifacts_are_made_again(model: Path, whole: Any, tmp_path: Path, damage: Any, stage: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(model, out=out, observer=stopping(stage, 30 if stage == "layer" else 2), **OPTIONS)
    artifacts = sorted((tmp_path / ("out" + RUN_SUFFIX) / "artifacts").glob("*.safetensors"))
    assert len(artifacts) >= 30
    damage(artifacts, random.Random(7))
    compress(model, out=out, **OPTIONS)
    assert_only_output(out, whole[0])
    assert verify(out).whole


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": []}'])
def test_damaged_assembly_is_made_again(model: Path, whole: Any, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(model, out=out, observer=stopping("shard", 2), **OPTIONS)
    (tmp_path / ("out" + RUN_SUFFIX) / "assembly.json").write_text(text)
    compress(model, out=out, **OPTIONS)
    assert_only_output(out, whole[0])


def test_a_shard_cut_short_is_written_again(model: Path, whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(model, out=out, observer=stopping("shard", 3), **OPTIONS)
    shards = sorted((tmp_path / ("out" + RUN_SUFFIX) / "out").glob("*.safetensors"))
    os.truncate(shards[0], shards[0].stat().st_size - 1)
    compress(model, out=out, **OPTIONS)
    assert_only_output(out, whole[0])


def test_artifacts_without_a_run_are_not_trusted(llama: Path, tmp_path: Path) -> None:
    """A folder whose removal was interrupted may hold layers of another recipe."""
    compress(llama, "rtn-4", tmp_path / "expected" / "out")
    out = tmp_path / "here" / "out"
    with pytest.raises(Stop):
        compress(llama, "rtn-3", out, observer=stopping("layer", 9))
    (tmp_path / "here" / ("out" + RUN_SUFFIX) / "run.json").unlink()
    assert compress(llama, "rtn-4", out).resumed == 0
    assert_only_output(out, contents(tmp_path / "expected" / "out"))


def test_other_weights_of_the_same_shapes_are_another_model(tiny: Any, tmp_path: Path) -> None:
    """Two states of one training have the same names, shapes and configuration."""
    first, second = tiny("llama"), tiny("llama", seed=1)
    model, out = tmp_path / "model", tmp_path / "made" / "out"
    model.mkdir()
    for name, content in contents(first).items():
        (model / name).write_bytes(content)
    compress(model, "rtn-4", out)
    (model / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes())
    with pytest.raises(OutputError, match="the output of another command"):
        compress(model, "rtn-4", out)


def test_a_torn_line_in_the_log_is_dropped(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(llama, "rtn-4", out, observer=stopping("layer", 3))
    with (tmp_path / "out.log.jsonl").open("a") as stream:
        stream.write('{"event": "lay')
    compress(llama, "rtn-4", out)
    assert [event["event"] for event in log_events(out)][-1] == "done"


# Two processes.


def hold(model: str, out: str, flag: str) -> None:
    """Target of a process: compress, and wait at the fifth layer until the flag is gone."""

    def wait(event: dict[str, Any]) -> None:
        if event["event"] == "layer" and event["number"] == 5:
            Path(flag).touch()
            while Path(flag).exists():
                time.sleep(0.01)

    compress(model, out=out, observer=wait, threads=1, **OPTIONS)


def test_second_process_is_told(llama: Path, publishing: Any, tmp_path: Path) -> None:
    out, flag = tmp_path / "made" / "out", tmp_path / "flag"
    process = start(hold, str(llama), str(out), str(flag))
    while not flag.exists():
        assert process.is_alive()
        time.sleep(0.01)
    for options in ({}, {"overwrite": True}, {"recipe": "rtn-4", "overwrite": True}):
        with pytest.raises(OutputError, match="another process is working in"):
            compress(llama, out=out, **(OPTIONS | options))
    flag.unlink()
    process.join(60)
    assert process.exitcode == 0
    assert_only_output(out, publishing[1])


def test_finding_it_complete_leaves_the_run_of_another_alone(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(llama, "rtn-4", out)
    with pytest.raises(Stop):
        compress(llama, "rtn-3", out, overwrite=True, observer=stopping("layer", 4))
    assert compress(llama, "rtn-4", out).already_complete
    assert compress(llama, "rtn-3", out, overwrite=True).resumed >= 4


def many_layers_few_files(model: str, out: str) -> None:
    """Target of a process: one shard of more layers than files that may be open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    compress(model, "rtn-4", out, threads=1)


def test_a_shard_of_more_layers_than_open_files(model: Path, tmp_path: Path) -> None:
    assert in_process(many_layers_few_files, str(model), str(tmp_path / "out")) == 0
    assert len(json.loads((tmp_path / "out" / "featherweight.json").read_text())["layers"]) > 64


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_the_type_of_passes_stays_what_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A run that goes on where another type is faster, as on another machine, keeps to the one it began in."""
    changes = ("calibration.sequences=4", "calibration.length=32", "grid.group_size=32")
    options: dict[str, Any] = {"recipe": "gptq", "changes": changes, "threads": 1}
    monkeypatch.setenv("FEATHERWEIGHT_PRECISION", first)
    expected = contents(compress(model, out=tmp_path / "whole", **options).out)
    out, events = tmp_path / "out", list[dict[str, Any]]()
    with pytest.raises(Stop):
        compress(model, out=out, observer=stopping("layer", 10), **options)
    monkeypatch.setenv("FEATHERWEIGHT_PRECISION", "float32" if first == "bfloat16" else "bfloat16")
    result = compress(model, out=out, observer=events.append, **options)
    assert result.resumed > 0
    assert contents(out) == expected
    assert any(f"began with the network in {first} and goes on in it" in event.get("text", "") for event in events)
