#!/usr/bin/env python
"""Cut the texts that ship with the package out of the corpora the reference model was trained and validated on.

    python scripts/cut_texts.py --train novels-train.txt.xz --valid novels-valid.txt.xz --out src/featherweight/assets

`calibration.txt` is taken from the training novels, in pieces from all over them; `evaluation.txt` is the beginning of
the validation novels, which the model never saw. Both are public domain and share no novel.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

PIECES = 32


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def from_line_to_line(text: str, start: int, length: int) -> str:
    """About `length` characters from the first line that begins after `start`, ending with a whole line."""
    first = text.index("\n", start) + 1 if start else 0
    return text[first : text.index("\n", first + length) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=450_000, help="of each text")
    arguments = parser.parse_args()
    train, valid = read_text(arguments.train), read_text(arguments.valid)
    piece = arguments.characters // PIECES
    starts = [i * (len(train) // PIECES) + len(train) // PIECES // 3 for i in range(PIECES)]
    (arguments.out / "calibration.txt").write_text("".join(from_line_to_line(train, s, piece) for s in starts))
    (arguments.out / "evaluation.txt").write_text(from_line_to_line(valid, 0, arguments.characters))


if __name__ == "__main__":
    main()
