#!/usr/bin/env python
"""Make the tasks that ship with the package out of the novels the reference model was validated on.

    python scripts/make_novel_tasks.py --valid novels-valid.txt.xz --out src/featherweight/assets

What `evaluation.txt` holds is passed over, so that no task is on the text of the perplexity. Both are of the novels'
own sentences, drawn with a fixed seed:

- `novels-choice.jsonl.xz`: a passage whose last sentence breaks off, and four ends that it may have. The wrong three
  end other sentences of the same novel and are of the same kind: as many words, nearly as many letters, the same marks.
- `novels-cloze.jsonl.xz`: a passage without its last word, which has occurred in it before.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20260101
ITEMS = 400
SECOND = '"CAPTAINS COURAGEOUS"'
"""What the second of the two novels begins with."""
FAR = 20
"""Sentences that lie between one and those it is offered beside, at least."""
PARAGRAPH = "\n\n"
MARKS = "\"'.,;:!?-("
WORDS = 8
"""Of an end."""
ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Dr|St|Capt|Messrs|[A-Z])\.$")
STOP = re.compile(r"""[.!?]["']?(?=\s+["']?[A-Z])""")
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
COMMON = """
that this with from have they them then than were when what which would could should their there these those been your
will must upon into only over more some such even other very said made make come came went gone know knew about again
before after never ever here where while through though
"""
"""Words that any passage has: one of these in the cloze would test grammar alone."""


@dataclass(frozen=True)
class Sentence:
    """novel : its number; begins : whether it begins a paragraph; number : among all sentences"""

    text: str
    novel: int
    begins: bool
    number: int

    @property
    def words(self) -> list[str]:
        return WORD.findall(self.text)


@dataclass(frozen=True)
class End:
    """The last words of a sentence, and what is before them."""

    sentence: Sentence
    before: str
    text: str

    @classmethod
    def of(cls, sentence: Sentence, words: int) -> End | None:
        """None where the sentence is shorter than twice that, or breaks where a clause or a speech begins."""
        parts = sentence.text.split(" ")
        if len(parts) < 2 * words or parts[-words - 1][-1] in MARKS or parts[-words][0] in MARKS:
            return None
        return cls(sentence, " ".join(parts[:-words]), " ".join(parts[-words:]))

    @property
    def kind(self) -> tuple[int, str]:
        """The novel, and the marks in it."""
        return self.sentence.novel, re.sub(r"[\w\s'-]", "", self.text)


def sentences_of(text: str) -> list[str]:
    """Of a paragraph; none of a heading or a verse, which end in no mark."""
    found, begun = [], 0
    for end in STOP.finditer(text):
        piece = text[begun : end.end()].strip()
        if not ABBREVIATED.search(piece):
            found.append(piece)
            begun = end.end()
    last = text[begun:].strip()
    return [*found, last] if re.search(r"""[.!?]["']?$""", last) else found


def read(path: Path, skip: int) -> list[Sentence]:
    """All sentences of a file behind its first `skip` characters, in order."""
    raw = path.read_bytes()
    text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    second = text.index(SECOND)
    found: list[Sentence] = []
    for block in re.finditer(r"\S.*?(?=\n\s*\n|\Z)", text, re.DOTALL):
        if block.start() >= skip:
            for place, piece in enumerate(sentences_of(" ".join(block[0].split()))):
                found.append(Sentence(piece, int(block.start() >= second), place == 0, len(found)))
    return found


def before(sentences: Sequence[Sentence], number: int, least: int) -> str:
    """The sentences in front of one, as many as have `least` words, with an empty line between paragraphs."""
    text, novel = "", sentences[number].novel
    for later, one in zip(sentences[number:0:-1], sentences[number - 1 :: -1], strict=False):
        if len(text.split()) >= least or one.novel != novel:
            break
        text = one.text + (("\n\n" if later.begins else " ") + text if text else "")
    return text


def choice_items(sentences: Sequence[Sentence], chance: random.Random) -> list[dict[str, object]]:
    ends = [end for s in sentences[1:] if (end := End.of(s, WORDS)) is not None]
    order = list(ends)
    chance.shuffle(order)
    items: list[dict[str, object]] = []
    used: set[str] = set()
    for right in order:
        others = [end for end in ends if end.text not in used and alike(end, right)]
        if right.text in used or len(others) < 3:
            continue
        choices = [right.text, *(end.text for end in chance.sample(others, 3))]
        if len(set(choices)) == len(choices):
            used.update(choices)  # an end that were seen twice would be known not to follow
            chance.shuffle(choices)
            here = right.sentence
            context = f"{before(sentences, here.number, 30)}{PARAGRAPH if here.begins else ' '}{right.before}"
            items.append({"context": context, "choices": choices, "answer": choices.index(right.text)})
        if len(items) == ITEMS:
            break
    return items


def alike(one: End, right: End) -> bool:
    """Whether it could stand in place of another by its form, and is not from nearby."""
    letters = len(right.text)
    far = abs(one.sentence.number - right.sentence.number) > FAR
    return far and one.kind == right.kind and abs(len(one.text) - letters) <= 0.12 * letters


def cloze_items(sentences: Sequence[Sentence], chance: random.Random) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for one in sentences[1:]:
        match = re.fullmatch(r"""(.+) ([A-Za-z]{4,})[.!?]["']?""", one.text)
        if match is None or len(one.words) < 6 or match[2].lower() in COMMON.split():
            continue
        context = f"{before(sentences, one.number, 60)}{PARAGRAPH if one.begins else ' '}{match[1]}"
        if match[2] in WORD.findall(context):
            found.append({"context": context, "target": match[2]})
    return chance.sample(found, min(ITEMS, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder with evaluation.txt")
    arguments = parser.parse_args()
    skip = len((arguments.out / "evaluation.txt").read_text("utf-8"))
    sentences = read(arguments.valid, skip)
    for name, make in (("novels-choice", choice_items), ("novels-cloze", cloze_items)):
        items = make(sentences, random.Random(SEED))
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (arguments.out / f"{name}.jsonl.xz").write_bytes(packed)
        print(f"{name}: {len(items)} items, {len(text.encode()):,} bytes, {len(packed):,} compressed")


if __name__ == "__main__":
    main()
