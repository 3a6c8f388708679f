"""Damage that leaves a file's header right: what only a hash finds."""

from __future__ import annotations

from pathlib import Path

from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile


def flip_bit(path: Path, tensor: str | None = None, byte: int = 0) -> str:
    """Flip a bit of a tensor (the largest if none is named); its name."""
    with SafetensorsFile.open(path) as file:
        name = tensor or max(file.entries, key=lambda n: file.entries[n].nbytes)
        place = file.entries[name].start + byte
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    return name
