"""Damage done to GGUF files by number: what is read of each must be a model, or one sentence."""

from __future__ import annotations

import random
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import CheckpointError
from featherweight.interop.importers.gguf import GGUF

NUMBERS = (0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
MARKS = (
    b"general.",
    b"llama.",
    b"tokenizer.ggml.",
    b"blk.",
    b"weight",
    b"GGUF",
    b"attn_q",
    b"\x08\0\0\0",
    b"\x09\0\0\0",
)


@dataclass(frozen=True)
class Outcome:
    """fault : what should not have happened, empty where nothing did"""

    number: int
    done: str
    refused: bool
    text: str
    fault: str = ""


def damaged(raw: bytes, number: int, path: Path) -> Outcome:
    """Damage a file in a way of this number, write it and open it, reading every tensor."""
    chance = random.Random(number)
    changed = bytearray(raw)
    done = []
    for _ in range(chance.choice((1, 1, 2, 4))):
        done.append(chance.choice(WAYS)(chance, changed))
    path.write_bytes(changed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported = GGUF.open(path)
            try:
                for tensor in imported.tensors:
                    if tuple(tensor.load().shape) != tensor.shape:
                        return Outcome(number, "; ".join(done), False, "", f"{tensor.name} has another shape")
            finally:
                imported.close()
    except CheckpointError as error:
        text = str(error)
        short = len(text) > 600 or "\n" in text or str(path) not in text
        return Outcome(number, "; ".join(done), True, text, "no sentence" if short else "")
    except Exception as error:  # what the campaign looks for
        return Outcome(number, "; ".join(done), True, "", f"{type(error).__name__}: {error}")
    return Outcome(number, "; ".join(done), False, "")


def head_of(content: bytearray) -> int:
    """Bytes in which most of the header lies."""
    return min(len(content), max(64, content.rfind(b"output_norm.weight") + 64))


def flip(chance: random.Random, content: bytearray) -> str:
    place = chance.randrange(head_of(content)) if content else 0
    if content:
        content[place] ^= 1 << chance.randrange(8)
    return f"bit of byte {place}"


def number(chance: random.Random, content: bytearray) -> str:
    """A number where one may stand."""
    width = chance.choice("IQ")
    value = chance.choice(NUMBERS) & (2**32 - 1 if width == "I" else 2**64 - 1)
    place = chance.choice((4, 8, 16, chance.randrange(max(1, head_of(content)))))
    packed = struct.pack("<" + width, value)
    content[place : place + len(packed)] = packed
    return f"{value} at {place}"


def beside_a_mark(chance: random.Random, content: bytearray) -> str:
    """A number just before or behind something that has a length, a kind or a shape beside it."""
    mark = chance.choice(MARKS)
    places = []
    place = content.find(mark)
    while place >= 0 and len(places) < 400:
        places.append(place)
        place = content.find(mark, place + 1)
    if not places:
        return flip(chance, content)
    place = chance.choice(places) + chance.choice((-8, -4, len(mark), len(mark) + 4, len(mark) + 12))
    place = max(0, place)
    content[place : place + 8] = struct.pack("<Q", chance.choice(NUMBERS))
    return f"number beside {mark!r} at {place}"


def cut(chance: random.Random, content: bytearray) -> str:
    length = chance.choice((chance.randrange(max(1, len(content))), chance.randrange(max(1, head_of(content)))))
    del content[length:]
    return f"cut to {length}"


def removed(chance: random.Random, content: bytearray) -> str:
    first = chance.randrange(max(1, head_of(content)))
    del content[first : first + chance.choice((1, 4, 8, 32, 100))]
    return f"bytes gone at {first}"


def put_in(chance: random.Random, content: bytearray) -> str:
    first = chance.randrange(max(1, head_of(content)))
    content[first:first] = chance.randbytes(chance.choice((1, 4, 8, 32)))
    return f"bytes put in at {first}"


def renamed(chance: random.Random, content: bytearray) -> str:
    """A word for another of the same length."""
    old, new = chance.choice(
        (
            (b"blk.0.attn_q", b"blk.0.attn_v"),
            (b"blk.1.ffn_up", b"blk.9.ffn_up"),
            (b"llama.block_count", b"llama.block_cOunt"),
            (b"llama.embedding_length", b"llama.feed_forwardlengt"[:22]),
            (b"tokenizer.ggml.model", b"tokenizer.ggml.mOdel"),
            (b"gpt2", b"bert"),
            (b"gpt-2", b"gpt-9"),
            (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma"),
            (b"output.weight", b"outPut.weight"),
        )
    )
    content[:] = content.replace(old, new[: len(old)].ljust(len(old), b"_"), 1)
    return f"{old!r} renamed"


def noise(chance: random.Random, content: bytearray) -> str:
    """Of the weights: they are read as what they are."""
    first = chance.randrange(max(1, len(content)))
    some = chance.randbytes(min(64, len(content) - first))
    content[first : first + len(some)] = some
    return f"noise at {first}"


WAYS = (flip, flip, number, beside_a_mark, beside_a_mark, cut, removed, put_in, renamed, noise)
