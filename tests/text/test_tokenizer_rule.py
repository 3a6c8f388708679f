"""Text becomes tokens as in the installed version of transformers, whichever way a folder is read."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tokenizer_folders import TEXTS, write_folder

from featherweight.errors import CheckpointError
from featherweight.model.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
FOLDERS = int(os.environ.get("FEATHERWEIGHT_TOKENIZER_FOLDERS", "120"))
TALK = [{"role": "user", "content": "It was"}]


def test_every_folder_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    chance, cores = random.Random(5), {}
    read_directly = refused = 0
    for number in range(FOLDERS):
        folder = write_folder(tmp_path / str(number), chance, cores)
        settings = (folder / "tokenizer_config.json").read_text()
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception:  # what it cannot read, ours may refuse, in one sentence
            with pytest.raises(CheckpointError) as caught:
                Tokenizer.open(folder)
            assert "\n" not in str(caught.value)
            refused += 1
            continue
        try:
            ours = Tokenizer.open(folder)
        except CheckpointError as error:
            assert "turns text into nothing" in str(error), settings  # noqa: PT017
            refused += 1
            continue
        assert ours is not None
        read_directly += ours.direct
        for text in TEXTS:
            for special in (True, False):
                expected = theirs(text, add_special_tokens=special).input_ids
                found = ours.encode(text, special)
                assert found == expected, (ours.direct, text, special, settings)
                assert ours.decode(found) == theirs.decode(found, skip_special_tokens=True), (text, settings)
        assert ours.bos == theirs.bos_token_id, settings
        assert ours.eos == theirs.eos_token_id, settings
        if theirs.chat_template:
            assert ours.chat_template is not None
            expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
            assert ours.chat_template.render(TALK) == expected
    assert read_directly > FOLDERS // 10
    assert refused < FOLDERS // 4
