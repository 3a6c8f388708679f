"""A slice of the campaign of benchmarks/mutate_checkpoints.py, and tests of the campaign itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from mutations import campaign
from mutations.bases import Base
from mutations.campaign import Result, bases_in, run_case, run_many
from mutations.files import HASHES, SINGLE, Files, split
from mutations.judge import CLOSE, judge
from mutations.kinds import Case, all_kinds, draw

ROOT = Path(__file__).resolve().parents[2]
Bases = Sequence[tuple[Base, Files]]
SLICE = ("llama-untied", "qwen2-tied", "qwen3-untied", "gpt2", "llama-rtn-8", "qwen3-rtn-4-head")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@pytest.fixture(scope="module")
def bases(work: Path) -> Bases:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return bases_in(work / "bases", SLICE)
    finally:
        torch.set_num_threads(threads)


def test_a_slice_of_the_campaign(bases: Bases, work: Path, tmp_path: Path) -> None:
    assert [base.name for base, _ in bases] == list(SLICE)  # they lie where the script finds them
    script = str(ROOT / "benchmarks" / "mutate_checkpoints.py")
    command = [sys.executable, script, "--count", "100", "--work", str(work)]
    command += [argument for name in SLICE for argument in ("--base", name)]
    done = subprocess.run(
        [*command, "--report", str(tmp_path / "report.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["faults"]
    (tries, loaded, refused), *_ = [row[1:4] for row in report["table"] if row[0] == "all"]
    assert tries == 100
    assert loaded > 20
    assert refused > 20


def test_unmutated_bases_load_alike(bases: Bases, work: Path) -> None:
    for base, files in bases:
        folder = work / f"plain-{base.name}"
        files.write(folder)
        verdict = judge(Case(0, base, ()), folder)
        assert not verdict.faults
        assert verdict.loaded
        assert verdict.outcomes["native"].ok == base.native
        if base.native:
            native, logits = verdict.outcomes["native"].value, verdict.outcomes["load"].value[2]
            assert float((native - logits).norm() / logits.norm()) < CLOSE / 10


def test_a_number_is_a_case(bases: Bases) -> None:
    for number in range(50):
        (one, files), (other, again) = draw(number, bases), draw(number, bases)
        assert one == other
        assert files.content == again.content
        assert files.folders == again.folders


def test_every_kind_changes_something(bases: Bases) -> None:
    changed: dict[str, bool] = {}
    for number in range(1000):
        case, files = draw(number, bases)
        original = next(found for base, found in bases if base is case.base)
        for kind in case.kinds:
            changed[kind] = changed.get(kind, False) or files.content != original.content
    assert set(changed) == set(all_kinds())
    assert all(changed.values())


def test_split_is_the_same_model(bases: Bases) -> None:
    files = next(files for base, files in bases if base.name == "llama-rtn-8")
    parts = split(files, 3)
    assert files.tensors() == parts.tensors()
    assert SINGLE not in parts.content
    hashes = [json.loads((parts.shard(name).metadata or {})[HASHES]) for name in parts.shards]
    assert sum(map(len, hashes)) == len(files.tensors())
    assert not parts.damaged()
    tensor = files.shard(SINGLE).tensors[0]
    flipped = bytes([tensor.data[0] ^ 1]) + tensor.data[1:]
    files = files.copy()
    files.content[SINGLE] = files.content[SINGLE].replace(tensor.data, flipped, 1)
    assert tensor.name in files.damaged()


def test_a_process_that_dies_is_a_fault_of_its_case(bases: Bases, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(number: int, *rest: object) -> Result:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # a crash, without the trace that pytest prints of one
        return Result(number, "llama-untied", [("nothing", "")], "ok", [])

    monkeypatch.setattr(campaign, "run_case", dies)
    results = run_many(range(3), bases, work, warm=False)
    assert [result.number for result in results] == [0, 1, 2]
    assert [[rule for rule, _ in result.faults] for result in results] == [[], ["crash"], []]
    assert "SIGKILL" in results[1].faults[0][1]


def test_what_is_wrong_is_found(bases: Bases, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules themselves: an engine that computes something else, and one that raises what is not ours."""
    from featherweight.model.decoder.model import NativeModel

    kept = [pair for pair in bases if pair[0].name == "llama-untied"]
    monkeypatch.setattr("mutations.kinds.all_kinds", lambda: {"nothing": lambda chance, files: "nothing"})
    forward = NativeModel.forward
    assert not run_case(0, kept, work).faults
    monkeypatch.setattr(NativeModel, "forward", lambda self, tokens: forward(self, tokens) * 1.05)
    assert [rule for rule, _ in run_case(0, kept, work).faults] == ["engines differ"]

    def raises(self: NativeModel, tokens: object) -> torch.Tensor:
        raise KeyError("hidden_size")

    monkeypatch.setattr(NativeModel, "forward", raises)
    assert [rule for rule, _ in run_case(0, kept, work).faults] == ["traceback"]
