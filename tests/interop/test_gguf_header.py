"""The reader of GGUF files: the same as the package's, a sentence for whatever a header claims wrongly."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_damage import damaged
from written_gguf import write_model

from featherweight.errors import CheckpointError
from featherweight.interop.gguf.file import GGUFFile, GGUFModel
from featherweight.interop.importers.gguf import GGUF
from featherweight.storage.checkpoint.resolve import resolve
from models import FAMILIES


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: str | bytes = "a", sides: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def content(
    pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: bytes = b"", version: int = 3, **counts: int
) -> bytes:
    numbers = counts.get("tensor_count", len(tensors)), counts.get("pair_count", len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *numbers) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def refused(path: Path, raw: bytes, words: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def array(kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + raw


def nested(depth: int) -> bytes:
    return array(9, 1, nested(depth - 1)) if depth else array(0, 1, b"\1")


Q4, F16 = 2, 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"),
        (b"GG", "begins with b'GG'"),
        (b"PK\3\4 and so on", "not with 'GGUF'"),
        (b"tjgg" + bytes(40), "came before GGUF"),
        (b"GGUF", "4 bytes are missing for the version"),
        (content(version=1), "GGUF file of version 1, 2 and 3 are read: convert"),
        (content(version=4), "GGUF file of version 4, 2 and 3 are read: install a newer"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQ", 3, 1), "8 bytes are missing for metadata"),
        (content(pair_count=2**60), "missing for 1152921504606846976 pairs of metadata"),
        (content(tensor_count=2**63), "missing for 9223372036854775808 tensors"),
        (content((pair("a", 4, b"\1\0\0\0"),) * 2), "metadata has the key 'a' twice"),
        (content((pair("a", 13, b""),), data=bytes(64)), "value of 'a' has the unknown kind 13"),
        (content((pair("a", 9, array(13, 1, b"")),), data=bytes(64)), "array of the unknown kind 13"),
        (content((pair("a", 9, array(4, 2**62, b"")),)), "missing for 4611686018427387904 elements of 'a'"),
        (content((pair("a", 9, array(8, 2**40, b"")),)), "missing for 1099511627776 elements of 'a'"),
        (content((pair("a", 9, nested(8)),)), "arrays within arrays, deeper than 4"),
        (content((pair("a", 8, struct.pack("<Q", 2**64 - 1)),)), "missing for the value of 'a'"),
        (content((pair("a", 8, text(b"\xff")),)), "value of 'a' is not UTF-8"),
        (content((struct.pack("<Q", 2**40),), data=bytes(64)), "a key claims 1099511627776 bytes, the limit is 65536"),
        (content((text(b"\xff") + bytes(8),)), "the name of a key is not UTF-8"),
        (content((pair("a", 7, b"\2"),)), "value of 'a' is neither true nor false"),
        (content((pair("a", 9, array(7, 2, b"\1\7")),)), "value of 'a' is neither true nor false"),
        (content((pair("general.alignment", 4, struct.pack("<I", 24)),)), "alignment is 24, expected a power of two"),
        (content((pair("general.alignment", 8, text("32")),)), "alignment is '32'"),
        (content((), (entry(),), bytes(16)) + b"", None),
        (content((), (entry(sides=()),), bytes(16)), "'a' has 0 dimensions, expected 1 to 4"),
        (content((), (entry(sides=(1,) * 5),), bytes(16)), "'a' has 5 dimensions"),
        (content((), (entry(sides=(4, 0)),), bytes(16)), r"'a' has the impossible shape \[0, 4\]"),
        (content((), (entry(sides=(2**40, 2**40)),), bytes(16)), "'a' has the impossible shape"),
        (content((), (entry(kind=99),), bytes(16)), "tensor 'a' is of the type 99, which this release does not know"),
        (content((), (entry(kind=4),), bytes(16)), "tensor 'a' is of the type Q4_2, which ggml has given up"),
        (content((), (entry(kind=9),), bytes(16)), "of the type Q8_1, which is for activations"),
        (content((), (entry(offset=8),), bytes(32)), "'a' begins at 8, which is no multiple of the alignment 32"),
        (content((), (entry(b"\xc3"),), bytes(16)), "the name of a tensor is not UTF-8"),
        (content((), (entry(), entry(offset=32)), bytes(64)), "has the tensor 'a' twice"),
        (content((), (entry(), entry("b")), bytes(64)), "'b' overlaps 'a'"),
        (content((), (entry(sides=(16,)), entry("b", offset=32)), bytes(64)), "'b' overlaps 'a'"),
        (content((), (entry(sides=(33,), kind=Q4),), bytes(64)), "rows of 33, and blocks of Q4_0 take 32"),
        (content((), (entry(),), bytes(15)), "truncated, 1 bytes are missing for tensor 'a'"),
        (content((), (entry(offset=2**63),), bytes(16)), "bytes are missing for tensor 'a'"),
        (content((), (entry("x" * 70000),)), "the name of a tensor claims 70000 bytes"),
    ],
)
def test_hostile_headers(tmp_path: Path, raw: bytes, words: str | None) -> None:
    if words is None:
        (tmp_path / "good.gguf").write_bytes(raw)
        assert GGUFFile(tmp_path / "good.gguf").header.tensors["a"].shape == (4,)
        return
    refused(tmp_path / "bad.gguf", raw, words)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read .*nothing.gguf: No such file"):
        GGUFFile(tmp_path / "nothing.gguf")
    refused(tmp_path / "lfs.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer")


def test_reads_what_the_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(tiny(), path, metadata={"a.list": [1, 2, 3], "a.flag": True, "a.names": ["x", "y"], "a.real": 0.5})
    reader, model = gguf.GGUFReader(path), GGUFModel(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            found = model.metadata[name]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents()
    assert {t.name for t in reader.tensors} == set(model.tensors)
    for tensor in reader.tensors:
        stored = model.tensors[tensor.name]
        assert stored.info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert stored.info.start == tensor.data_offset
        assert stored.rows(0, stored.count).tobytes() == tensor.data.tobytes()


def test_version_2_and_other_alignments(tmp_path: Path) -> None:
    pairs = (pair("general.alignment", 4, struct.pack("<I", 128)),)
    raw = content(pairs, (entry(), entry("b", offset=128)), version=2)
    raw += bytes(-len(raw) % 128) + np.arange(4, dtype="<f4").tobytes() + bytes(112) + np.ones(4, "<f4").tobytes()
    (tmp_path / "a.gguf").write_bytes(raw)
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.header.version == 2
    assert file.rows(file.header.tensors["a"], 0, 1).view(np.float32).tolist() == [[0, 1, 2, 3]]
    assert file.rows(file.header.tensors["b"], 0, 1).view(np.float32).tolist() == [[1, 1, 1, 1]]


def tiny(**settings: Any) -> Any:
    import transformers

    config, model, common = FAMILIES["llama"]
    return getattr(transformers, model)(getattr(transformers, config)(**(common | settings)))


def described(path: Path, words: str) -> None:
    """Refused in one sentence that names the file."""
    with pytest.raises(CheckpointError, match=words) as caught:
        GGUF.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def general(**pairs: str) -> bytes:
    found = tuple(pair(f"general.{key}", 8, text(value)) for key, value in pairs.items())
    return content(found, (entry(),), bytes(16))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (general(architecture="clip"), "reads pictures or sound: give the language model's file"),
        (general(architecture="clip", type="mmproj"), "reads pictures or sound"),
        (general(architecture="llama", type="adapter"), "an adapter, not a model"),
        (general(type="imatrix"), "a file of importances, not a model"),
        (general(architecture="mamba"), "architecture 'mamba', and GGUF files of llama, qwen2,"),
        (general(), "lacks general.architecture"),
        (content((pair("general.architecture", 8, text("llama")),)), "has a vocabulary and no weights"),
        (general(architecture="llama"), "lacks llama.embedding_length"),
    ],
)
def test_files_that_are_no_model(raw: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    described(path, words)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.expert_count": 8}, "has a mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "rotates 8 of the 16 columns of a head"),
        ({"llama.rope.scaling.type": "odd"}, "stretches rotary positions by 'odd'"),
        ({"tokenizer.ggml.token_type_count": 2}, None),
    ],
)
def test_models_that_are_not_read(metadata: dict[str, Any], words: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(tiny(), path, metadata=metadata)
    if words is None:
        GGUF.open(path).close()
    else:
        described(path, words)


def test_tensors_that_are_not_those_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(tiny(), path, left_out=("blk.1.attn_v.weight", "blk.1.ffn_up.weight"))
    described(path, "lacks the tensor blk.1.attn_v.weight and 1 more of a llama model")
    write_model(tiny(), path, tensors={"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)})
    described(path, "has the tensor 'blk.0.ffn_gate_inp.weight', which a llama model")
    write_model(tiny(), path, left_out=("output_norm.weight",), tensors={"output_norm.weight": np.zeros(32, "f4")})
    described(path, r"has 'output_norm.weight' of shape \[32\], and its metadata asks for \[64\]")
    write_model(tiny(), path, tensors={"rope_freqs.weight": np.ones(5, np.float32)})
    described(path, r"has rope_freqs.weight as F32 \[5\], and its heads ask for F32 \[8\]")
    write_model(tiny(), path, tensors={"blk.0.x.ptqtp1": np.ones((2, 2), np.float32)})
    described(path, "has 'blk.0.x' in planes that do not belong together")


def test_damaged_files_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of benchmarks/mutate_gguf.py."""
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    write_model(tiny(), tmp_path / "model.gguf", lambda name: gguf.GGMLQuantizationType.Q8_0)
    raw = (tmp_path / "model.gguf").read_bytes()
    outcomes = [damaged(raw, number, tmp_path / "damaged.gguf") for number in range(400)]
    assert sum(outcome.refused for outcome in outcomes) > 100
    assert sum(not outcome.refused for outcome in outcomes) > 20
    assert not [outcome for outcome in outcomes if outcome.fault]


def test_a_file_that_is_not_read_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    write_model(tiny(), path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match="is truncated"):
        resolve(path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
