"""Files are whole or not there, and errors of the disk are one sentence."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import OutputError
from featherweight.system.files import disk_errors, read_object, replacing, sha256_of, to_json, write_text


class Stop(Exception):
    pass


@pytest.mark.parametrize("held", [None, b"before"])
def test_what_was_there_stays_until_the_end(tmp_path: Path, held: bytes | None) -> None:
    path = tmp_path / "file"
    if held is not None:
        path.write_bytes(held)

    def fail() -> None:
        with replacing(path) as stream:
            stream.write(b"half")
            assert (path.read_bytes() if path.exists() else None) == held
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if held is None else ["file"])
    with replacing(path, sync=False) as stream:
        stream.write(b"wh??e")
        stream.seek(2)
        stream.write(b"ol")
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_texts_are_utf8_with_their_own_line_ends(tmp_path: Path) -> None:
    text = "é\r\n\n漢"
    write_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_bytes() == text.encode()
    assert sha256_of(text) == hashlib.sha256((tmp_path / "text").read_bytes()).hexdigest()


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"^the disk is full while writing .*text; free some space and run the same"):
        write_text(tmp_path / "text", "much")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match=r"^cannot write .*below: Is a directory"), disk_errors(tmp_path / "below"):
        raise OSError(errno.EISDIR, "Is a directory")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "\ufffe{}", "[" * 100_000])
def test_what_is_no_object_reads_as_empty(tmp_path: Path, text: str) -> None:
    assert read_object(tmp_path / "missing") == {}
    assert read_object(tmp_path) == {}
    path = tmp_path / "object"
    path.write_text(text, encoding="utf-8")
    assert read_object(path) == {}
    write_text(path, to_json({"a": [1, {"ü": None}]}))
    assert read_object(path) == {"a": [1, {"ü": None}]}
