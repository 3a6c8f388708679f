#!/usr/bin/env python
"""Split a text into one to calibrate on and one to measure on, which share nothing.

    python scripts/split_text.py wiki.valid.txt --out FOLDER          # FOLDER/calibration.txt and FOLDER/heldout.txt

The first part ends with the line in which its share of the characters ends. For figures on a pretrained model: the
validation text of WikiText-2.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def split(text: str, share: float) -> tuple[str, str]:
    """Both parts in order; together they are the text."""
    end = text.find("\n", int(share * len(text))) + 1
    if not 0 < end < len(text):
        raise ValueError("the text has no line end after that share of it, so that one part would be empty")
    return text[:end], text[end:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--share", type=float, default=0.7, help="of the first part, in characters")
    arguments = parser.parse_args()
    try:
        first, rest = split(arguments.text.read_text(encoding="utf-8"), arguments.share)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SystemExit(f"{arguments.text}: {error}") from None
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("calibration.txt", first), ("heldout.txt", rest)):
        (arguments.out / name).write_text(part, encoding="utf-8")


if __name__ == "__main__":
    main()
