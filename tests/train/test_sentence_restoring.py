"""The pieces of benchmarks/tbt_bart.py on a tiny model."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
from benchmarks import tbt_bart
from benchmarks.tbt_bart import ARMS, END, FIRST, MASK, PAD

from featherweight import train

TEXT = [b"a ship in the harbour waits", b"the harbour waits for a ship", b"for a ship the harbour waits"]


def test_sentences_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The first sentence stands here. Short. " + "word " * 20 + "\n" + "x" * 70, "utf-8")
    found = tbt_bart.sentences(path, 40)
    assert found[0] == b"The first sentence stands here."
    assert all(16 <= len(one) <= 40 for one in found)
    assert b"".join(found[1:]).replace(b" ", b"") == b"word" * 20 + b"x" * 70
    path.write_text("No.")
    with pytest.raises(SystemExit, match="no sentence of 16 bytes"):
        tbt_bart.sentences(path, 40)


def test_words_are_masked_byte_by_byte() -> None:
    batch = tbt_bart.corrupted(TEXT, 0.3, torch.Generator().manual_seed(0))
    for row, sentence in enumerate(TEXT):
        assert bytes((batch.whole[row, : len(sentence)] - FIRST).tolist()) == sentence
        assert int(batch.whole[row, len(sentence)]) == END
        assert bool((batch.whole[row, len(sentence) + 1 :] == PAD).all())
        assert bool(batch.masked[row].any())
        words = "".join(
            "#" if one else chr(byte) for one, byte in zip(batch.masked[row].tolist(), sentence, strict=False)
        )
        assert all(set(word) == {"#"} or "#" not in word for word in words.split(" "))
    assert torch.equal(batch.corrupted == MASK, batch.masked)
    assert torch.equal(batch.corrupted[~batch.masked], batch.whole[~batch.masked])
    alone = tbt_bart.corrupted(TEXT, 0.0, torch.Generator().manual_seed(0))
    assert bool(alone.masked.any(1).all())  # a word of each


def test_arms_learn_from_the_full_model() -> None:
    options = argparse.Namespace(batch=8, share=0.2)
    torch.manual_seed(0)
    teacher = tbt_bart.network(32, 1, 40)
    full = train.train_recipe("full", ["schedule.learning_rate=0.005"])
    losses = tbt_bart.train_it(teacher, full, TEXT, options, 45, seed=0)
    assert losses[-1] < 0.7 * losses[0]
    wanted = tbt_bart.measured(teacher, TEXT, options)
    assert wanted["all"] > 0.3
    for name in ("TBT", "absmean, inputs kept"):
        recipe = train.train_recipe("tbt", [*ARMS[name].changes, "schedule.learning_rate=0.005"])
        student = copy.deepcopy(teacher)
        losses = tbt_bart.train_it(student, recipe, TEXT, options, 20, seed=1, teacher=teacher)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        assert len(train.low_bit_layers(student)) == 6 + 10
        found = tbt_bart.measured(student, TEXT, options)
        assert set(found) == {"loss", "masked", "all"}
        assert found == tbt_bart.measured(student, TEXT, options)


def test_every_arm_is_a_recipe() -> None:
    for name, arm in ARMS.items():
        recipe = train.train_recipe("tbt", arm.changes)
        assert recipe.attention.inputs == ("kept" not in name)
        wanted = 1.0 if name.startswith("absmean") else 4 / 3
        assert recipe.forward.factor == pytest.approx(wanted)  # type: ignore[attr-defined]
