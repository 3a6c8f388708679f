"""Texts to evaluate on: files, data sets of the hub, and those that papers use, by name."""

from __future__ import annotations

from pathlib import Path

from featherweight.errors import EvaluationError
from featherweight.model.text.documents import HUB, read_hub
from featherweight.model.text.files import read_text

KNOWN = {"wikitext-2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:test:text"}
"""Name -> data set. Rows joined by empty lines are the text of GPTQ's code (arXiv 2210.17323) and most papers since."""
SEPARATOR = "\n\n"


def named_text(text: str | Path) -> str:
    """The content of a file, or of a data set: one in `KNOWN`, unless a file has that name, or hf:NAME.

    Raises
    ------
    EvaluationError
        The file cannot be read; the data set cannot be had, is of conversations, or the package datasets is missing.
    """
    source = str(text)
    if source in KNOWN and not Path(source).exists():
        source = KNOWN[source]
    if not source.startswith(HUB):
        return read_text(Path(text), EvaluationError)
    documents = read_hub(source, EvaluationError)
    if any(document.messages for document in documents):
        raise EvaluationError(
            f"{text} has conversations, not texts: name a column of text (hf:NAME:CONFIG:SPLIT:COLUMN), or measure on "
            "conversations with --conversations FILE"
        )
    return SEPARATOR.join(document.text for document in documents)
