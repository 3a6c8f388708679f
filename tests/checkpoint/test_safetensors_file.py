"""The reader of one file: the same bytes as the safetensors library, precise errors, bounded memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.safetensors_file import MAX_HEADER_BYTES, Entry, SafetensorsFile

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(torch.float32).to(dtype) for dtype in DTYPES
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "cube": torch.randn(4, 3, 2)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_reads_what_the_library_reads(sample: Path) -> None:
    expected = load_file(sample)
    with SafetensorsFile.open(sample) as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.entries) == set(expected)
        for name, tensor in expected.items():
            got = file.tensor(name)
            assert got.dtype == tensor.dtype
            assert got.shape == tensor.shape
            assert got.view(torch.uint8 if got.ndim else got.dtype).equal(
                tensor.view(torch.uint8 if got.ndim else tensor.dtype)
            )
            assert b"".join(bytes(w) for w in file.raw_windows(name, 7)) == bytes(
                got.reshape(-1).view(torch.uint8).numpy()
            )


def test_rows(sample: Path) -> None:
    with SafetensorsFile.open(sample) as file:
        cube = file.tensor("cube")
        for first in range(5):
            for last in range(first, 5):
                assert file.rows("cube", first, last).equal(cube[first:last])
        for first, last in ((-1, 2), (0, 5), (3, 2)):
            with pytest.raises(IndexError):
                file.rows("cube", first, last)
        with pytest.raises(IndexError):
            file.rows("scalar", 0, 1)


def test_zero_copy_and_private(sample: Path) -> None:
    before = sample.read_bytes()
    with SafetensorsFile.open(sample) as file:
        cube = file.tensor("cube")
        assert file.rows("cube", 1, 2).data_ptr() == cube.data_ptr() + 6 * 4
        cube.zero_()
    assert sample.read_bytes() == before


def test_misaligned_data_is_read(tmp_path: Path) -> None:
    values = torch.arange(4, dtype=torch.float32)
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [4], [1, 17])}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path = write_raw(tmp_path / "a.safetensors", raw, b"\1" + values.numpy().tobytes())
    with SafetensorsFile.open(path) as file:
        assert file.tensor("b").equal(values)
        assert file.rows("b", 1, 3).equal(values[1:3])


def test_tensors_survive_close(sample: Path) -> None:
    expected = load_file(sample)["cube"]
    file = SafetensorsFile.open(sample)
    cube = file.tensor("cube")
    file.close()
    file.close()
    assert cube.equal(expected)
    with pytest.raises(CheckpointError, match="closed"):
        file.tensor("cube")
    file.release("cube")


def test_unknown_tensor(sample: Path) -> None:
    with SafetensorsFile.open(sample) as file, pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        file.tensor("nothing")


def test_release_while_others_read(sample: Path) -> None:
    expected = load_file(sample)["cube"]
    wrong: list[int] = []
    with SafetensorsFile.open(sample) as file:

        def work(seed: int) -> None:
            for i in range(300):
                if not file.rows("cube", i % 4, i % 4 + 1).equal(expected[i % 4 : i % 4 + 1]):
                    wrong.append(seed)
                file.release("cube", i % 4, i % 4 + 1)
                file.release("cube")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"", b"", "does not begin with"),
        (b"[1]", b"", "does not begin with"),
        (b"{", b"", "not JSON"),
        (b'{"a":\xff}', b"", "not UTF-8"),
        (b'{"a":' + b"[" * 200_000, b"", "not JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "not JSON|lacks dtype"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "not valid Unicode"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"dtype":"I8"}}', b"", "key 'dtype' twice"),
        (b'{"a":1,"a":1}', b"", "key 'a' twice"),
        ({"a": 1}, b"", "lacks dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "lacks dtype"),
        ({"a": entry(dtype="F31")}, bytes(8), "unknown dtype 'F31'"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "unknown dtype"),
        ({"a": entry(shape="2")}, bytes(8), "impossible shape"),
        ({"a": entry(shape=[2.0])}, bytes(8), "impossible shape"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "impossible shape"),
        ({"a": entry(shape=[-2, -1])}, bytes(8), "impossible shape"),
        ({"a": entry(shape=[2**80, 0], offsets=[0, 0])}, b"", "impossible shape"),
        ({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b"", "more than can be addressed"),
        ({"a": entry(shape=[1] * 65 + [2])}, bytes(8), "impossible shape"),
        ({"a": entry(shape=[2**62, 4], offsets=[0, 0])}, b"", "more than can be addressed"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "impossible data_offsets"),
        ({"a": entry(offsets=[0])}, bytes(8), "impossible data_offsets"),
        ({"a": entry(offsets=[-8, 0])}, bytes(8), "impossible data_offsets"),
        ({"a": entry(offsets=[0, 8.0])}, bytes(8), "impossible data_offsets"),
        ({"a": entry(shape=[3])}, bytes(8), "needs 12 bytes"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "'b' overlaps 'a'"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "leaves 4 unused bytes behind 'a'"),
        ({"a": entry(offsets=[4, 12])}, bytes(12), "leaves 4 unused bytes behind the header"),
        ({"a": entry()}, bytes(5), "truncated, 3 bytes of its tensors are missing"),
        ({"a": entry()}, bytes(9), "1 bytes behind its last tensor"),
        ({}, b"x", "1 bytes behind"),
        ({"__metadata__": {"a": 1}}, b"", "text to text"),
        ({"__metadata__": []}, b"", "text to text"),
        ({"__metadata__": "pt"}, b"", "text to text"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    refused(write_raw(tmp_path / "bad.safetensors", header, data), words)


def test_hostile_lengths(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    refused(write_raw(path, b"{}", length=3), "1 bytes of its header are missing")
    refused(write_raw(path, b"{}", length=MAX_HEADER_BYTES + 1), "claims 100000001 bytes")
    refused(write_raw(path, b"{}", length=2**64 - 1), "claims")
    refused(tmp_path, "cannot read|not a regular file")
    refused(tmp_path / "absent.safetensors", "No such file")


def test_valid_corners(tmp_path: Path) -> None:
    with SafetensorsFile.open(write_raw(tmp_path / "a.safetensors", b'{"__metadata__":null}   ')) as file:
        assert (file.entries, file.metadata) == ({}, {})
    header = {"b": entry("U8", [1], [1, 2]), "a": entry("U8", [1], [0, 1]), "none": entry("I64", [3, 0], [1, 1])}
    with SafetensorsFile.open(write_raw(tmp_path / "b.safetensors", header, b"\1\2")) as file:
        assert list(file.entries) == ["a", "none", "b"]
        assert file.tensor("none").shape == (3, 0)
        assert file.rows("none", 1, 3).shape == (2, 0)
        assert list(file.raw_windows("none")) == []
        file.release("none")


def test_truncated_anywhere(tmp_path: Path, sample: Path) -> None:
    content = sample.read_bytes()
    path = tmp_path / "cut.safetensors"
    header_end = 8 + int.from_bytes(content[:8], "little")
    for length in [*range(header_end + 1), *range(header_end + 1, len(content), 13)]:
        path.write_bytes(content[:length])
        refused(path, "truncated, ")
    path.write_bytes(content[:-5])
    refused(path, "5 bytes of its tensors are missing")


def check_consistent(file: SafetensorsFile) -> None:
    """What every opened file guarantees: the tensors cover its data, and each can be read."""
    position = min((e.start for e in file.entries.values()), default=file.size)
    for name, found in file.entries.items():
        assert isinstance(found, Entry)
        assert found.start == position
        position += found.nbytes
        tensor = file.tensor(name)
        assert tuple(tensor.shape) == found.shape
        assert tensor.numel() * tensor.element_size() == found.nbytes
    assert position == file.size


@settings(max_examples=250, deadline=None)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    in_header=st.booleans(),
    cut=st.integers(0, 3),
)
def test_mutated_files(
    tmp_path_factory: pytest.TempPathFactory, sample: Path, edits: list[tuple[float, int]], in_header: bool, cut: int
) -> None:
    content = bytearray(sample.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    for where, value in edits:
        content[int(where * end)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content[: len(content) - cut])
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError:
        return
    with file:
        check_consistent(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
SMALL = st.integers(-1, 20) | JSON
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F4"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(SMALL, max_size=3) | JSON,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=250, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES | JSON), data=st.binary(max_size=24)
)
def test_invented_headers(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes) -> None:
    path = write_raw(tmp_path_factory.getbasetemp() / "invented.safetensors", header, data)
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError:
        return
    with file:
        check_consistent(file)


RSS_SCRIPT = """
import sys, torch
from pathlib import Path
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
def resident():  # file-mapped pages count
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
rows, columns, step = 1 << 15, 5000, 1 << 10
with SafetensorsFile.open(sys.argv[1]) as file:
    file.rows("a", 0, 1).max()
    before, peak = resident(), 0
    for first in range(0, rows, step):
        file.rows("a", first, first + step).view(torch.int16).max()
        peak = max(peak, resident())
        if sys.argv[2] == "release":
            file.release("a", first, first + step)
    for window in file.raw_windows("a", 8 << 20) if sys.argv[2] == "release" else ():
        bytes(window)
        peak = max(peak, resident())
    if sys.argv[2] == "release":
        file.tensor("a").view(torch.int16).max()
        file.release("a")
        assert resident() - before < 24 << 20, resident() - before
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_resident_memory_is_bounded(tmp_path: Path) -> None:
    """A sparse file of 328 MB is walked; released, it never occupies more than two windows."""
    import subprocess
    import sys

    import featherweight

    path, rows, columns = tmp_path / "large.safetensors", 1 << 15, 5000
    write_raw(path, {"a": entry("BF16", [rows, columns], [0, 2 * rows * columns])})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + 2 * rows * columns)
    environment = {"PYTHONPATH": str(Path(featherweight.__path__[0]).parent), "OMP_NUM_THREADS": "1"}

    def peak(mode: str) -> int:
        command = [sys.executable, "-c", RSS_SCRIPT, str(path), mode]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert peak("release") < 40 << 20
    assert peak("keep") > 250 << 20  # the measure sees file-mapped pages
