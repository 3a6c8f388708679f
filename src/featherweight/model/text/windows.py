"""Windows of tokens cut from calibration text; see `featherweight.model.text.documents` for what a text may be.

Conversations become text through the tokenizer's chat template, whose special tokens are tokens. Where a text has
nothing but conversations, every window begins with one, and goes on with whole ones until it is full.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from featherweight.errors import CalibrationError, CheckpointError, FeatherError
from featherweight.events import Observer
from featherweight.model.text.documents import Document, read_documents, text_digest
from featherweight.model.text.mixture import SELF, SHIPPED, Mixture, spread
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.storage.checkpoint.checkpoint import Checkpoint

PIECE = 1 << 16  # characters of a text that are tokenised at a time
SPARE = 16  # characters read for each token wanted; a token of any language is rarely longer
LEAST_WINDOWS = 4
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# Positions a model was made for: the common name first, then those of families.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xmod", "data2vec-text")


class WindowSettings(Protocol):
    """How much text is wanted: `featherweight.methods.calibrate.settings.CalibrationSettings`, or `Wanted`."""

    @property
    def sequences(self) -> int:
        """Number of windows."""
        ...

    @property
    def length(self) -> int:
        """Tokens a window."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the choice of windows."""
        ...


@dataclass(frozen=True)
class Wanted:
    """The least that says how much text is wanted; see `WindowSettings`."""

    sequences: int = 128
    length: int = 512
    seed: int = 0


def windows(
    tokenizer: Any,
    text: Any = None,
    settings: WindowSettings | None = None,
    *,
    context: int | None = None,
    notify: Observer | None = None,
    conversations: Sequence[Document] | None = None,
) -> Tensor:
    """Token ids int64 [sequences, length]: windows that do not overlap, chosen by `settings.seed`.

    Each begins and ends with the special tokens that the tokenizer puts around a text by itself. Windows for encoders
    begin at the beginning of a sentence. Those of a mixture are spread evenly, so that the last ones, which are held
    out, have the shares of all.

    Parameters
    ----------
    tokenizer : of transformers, or a `featherweight.model.text.tokenizer.Tokenizer`.
    text : see `featherweight.model.text.documents`, or a mixture of such, see `featherweight.model.text.mixture`.
    context : most tokens the model can take, see `context_of`; longer windows are cut to it.
    notify : called when there is less text than wanted.
    conversations : what the source `self` stands for.

    Raises
    ------
    CalibrationError
        the text cannot be read, or is enough for fewer than 4 windows; one of a mixture for fewer than its share.
    """
    tokenizer = Tokenizer.of(tokenizer)
    settings = settings or Wanted()
    length = settings.length if context is None else min(settings.length, context)
    mixture = Mixture.of(text)
    counts = mixture.counts(settings.sequences)
    parts = []
    for source, count in counts.items():
        if count == 0:
            raise CalibrationError(
                f"the calibration text {source} has a share of less than one of {settings.sequences} windows: raise "
                "its weight or calibration.sequences, or leave it out"
            )
        wanted = Wanted(count, length, settings.seed)
        documents = _documents_of(source, conversations)
        found = _windows_of(tokenizer, documents, wanted)
        _check_enough(found, wanted, source, mixture.single is None, notify)
        parts.append(found.rows)
    if len(parts) == 1:
        return torch.tensor(parts[0], dtype=torch.int64)
    order = spread([len(rows) for rows in parts])
    return torch.tensor([parts[source][number] for source, number in order], dtype=torch.int64)


def _documents_of(source: str, conversations: Sequence[Document] | None) -> list[Document]:
    if source != SELF:
        return read_documents(None if source == SHIPPED else source)
    if conversations is None:
        raise CalibrationError(
            f"the calibration text {SELF} is written by a model in a folder with `feather compress` or `feather "
            "calibrate`; elsewhere give a file that `feather converse` has made"
        )
    return list(conversations)


@dataclass(frozen=True)
class _Found:
    """rows : the windows that were chosen; places, tokens : how many there are in the text"""

    rows: list[list[int]]
    places: int
    tokens: int


def _windows_of(tokenizer: Tokenizer, documents: list[Document], settings: Wanted) -> _Found:
    """Windows of one source; fewer than wanted where there are no more."""
    length = settings.length
    prefix, suffix = tokenizer.around()
    body = length - len(prefix) - len(suffix)
    if body < 1:
        raise CalibrationError(f"windows of {length} tokens leave no room beside the special tokens; raise the length")
    generator = torch.Generator().manual_seed(settings.seed)
    documents = _choose(documents, settings.sequences * length * SPARE, generator)
    if not suffix and tokenizer.chat_template is not None and all(document.messages for document in documents):
        talks = [conversation_tokens(tokenizer, document) for document in documents]
        whole = conversation_windows(talks, length, prefix)
        order = torch.randperm(len(whole), generator=generator)[: settings.sequences].tolist()
        return _Found([whole[i] for i in order], len(whole), sum(len(ids) for ids in talks))
    if prefix and suffix:
        ids, starts = _sentences(tokenizer, documents)
        places = _places_at(starts, len(ids), body)
    else:
        ids = _stream(tokenizer, documents)
        count = len(ids) // body
        shift = int(torch.randint(0, len(ids) - count * body + 1, (1,), generator=generator))
        places = [shift + i * body for i in range(count)]
    chosen = torch.randperm(len(places), generator=generator)[: settings.sequences].tolist()
    rows = [[*prefix, *ids[places[i] : places[i] + body], *suffix] for i in chosen]
    return _Found(rows, len(places), len(ids))


def conversation_tokens(tokenizer: Any, document: Document) -> list[int]:
    """A conversation as its chat template writes it: the template's special tokens, and no others, are tokens."""
    return Tokenizer.of(tokenizer).encode(as_text(tokenizer, document), special=False)


def conversation_windows(talks: Iterable[Sequence[int]], length: int, prefix: Sequence[int] = ()) -> list[list[int]]:
    """Windows of `length` tokens of conversations, in order.

    Each begins with a conversation, behind `prefix` unless the conversation begins with it, and goes on with whole
    ones; what of the last does not fit is left out, unless it fills further windows by itself.
    """
    found: list[list[int]] = []
    window: list[int] = []
    before = list(prefix)
    for ids in talks:
        if not window and list(ids[: len(before)]) != before:
            window = list(before)
        window += ids
        while len(window) >= length:
            found.append(window[:length])
            rest = [*before, *window[length:]]
            window = rest if len(rest) >= length else []
    return found


def calibration_windows(
    checkpoint: Checkpoint,
    text: Any,
    settings: WindowSettings,
    notify: Observer | None = None,
    conversations: Sequence[Document] | None = None,
) -> Tensor:
    """`windows` of a text with the tokenizer and the context of a checkpoint."""
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.trust_remote_code)
    context = context_of(config)
    ids = windows(tokenizer, text, settings, context=context, notify=notify, conversations=conversations)
    check_vocabulary(ids, vocabulary_of(config))
    return ids


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model folder; CalibrationError where there is none that can be used."""
    try:
        found = Tokenizer.open(folder, trust_remote_code)
    except CheckpointError as error:
        raise CalibrationError(f"calibration needs a tokenizer, and {error}") from error
    if found is None:
        raise CalibrationError(
            f"{folder} has no tokenizer, and calibration needs one: copy the tokenizer files beside the weights"
        )
    return found


def check_vocabulary(ids: Tensor, rows: Any) -> None:
    """CalibrationError where a token has no row in an embedding of `rows`, the vocab_size of a config.json."""
    if isinstance(rows, int) and ids.numel() and int(ids.max()) >= rows:
        raise CalibrationError(
            f"the calibration text has token {int(ids.max())} and the model a vocabulary of {rows}: "
            "the tokenizer does not belong to this model"
        )


def vocabulary_of(config: dict[str, Any]) -> int | None:
    """Rows of the embedding by the content of a config.json; None where that does not say."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        value = part.get("vocab_size")
        if isinstance(value, int) and value > 0:
            return value
    return None


def context_of(config: dict[str, Any]) -> int | None:
    """Positions a model was made for, by the content of its config.json; None where that does not say."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for name in CONTEXT_FIELDS:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value - 2 if part.get("model_type") in SHIFTED_POSITIONS else value
    return None


def windows_digest(ids: Tensor) -> str:
    """SHA-256 (hex) of windows of tokens."""
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()).hexdigest()


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    return Tokenizer.of(tokenizer).around()


def _check_enough(found: _Found, wanted: Wanted, source: str, mixed: bool, notify: Observer | None) -> None:
    """CalibrationError where there is too little text, or, `mixed`, less than the source's share; else a note."""
    count, length = found.places, wanted.length
    if count >= wanted.sequences:
        return
    name = "the calibration text" if source == SHIPPED else f"the calibration text {source}"
    words = (
        f"{name} has {found.tokens} tokens, enough for {count} windows of {length}, but {wanted.sequences} windows "
        f"({wanted.sequences * length} tokens) are wanted"
    )
    if mixed:
        raise CalibrationError(f"{words} for its share: give more text, or lower its weight or calibration.sequences")
    if count < min(LEAST_WINDOWS, wanted.sequences):
        raise CalibrationError(f"{words}: give more text, or lower calibration.sequences or calibration.length")
    if notify is not None:
        notify({"event": "note", "text": f"{words}; going on with {count} windows", "windows": count})


# From documents to tokens -------------------------------------------------------------------------------------------


def _choose(documents: list[Document], characters: int, generator: torch.Generator) -> list[Document]:
    """All documents, or as many pieces of them as `characters` asks for, at random places, in order."""
    if sum(_size(document) for document in documents) <= characters:
        return documents
    pieces = [piece for document in documents for piece in _cut(document)]
    chosen, total = [], 0
    for place in torch.randperm(len(pieces), generator=generator).tolist():
        if total >= characters:
            break
        chosen.append(place)
        total += _size(pieces[place])
    return [pieces[place] for place in sorted(chosen)]


def _size(document: Document) -> int:
    return len(document.text) + sum(len(message["content"]) for message in document.messages)  # calls count nothing


def _cut(document: Document) -> Iterator[Document]:
    """A long text in pieces that end with a line where they can."""
    text, first = document.text, 0
    if document.messages or len(text) <= PIECE:
        yield document
        return
    while first < len(text):
        stop = first + PIECE
        end = text.rfind("\n", first, stop) + 1 if stop < len(text) else len(text)
        end = end if end > first else min(stop, len(text))
        yield Document(text[first:end])
        first = end


def _stream(tokenizer: Tokenizer, documents: Iterable[Document]) -> list[int]:
    """All documents as one row of tokens, with the end-of-text token between them if there is one."""
    end = tokenizer.eos
    ids: list[int] = []
    for document in documents:
        if ids and end is not None:
            ids.append(end)
        for piece in _cut(Document(as_text(tokenizer, document))):
            ids += tokenizer.encode(piece.text, special=False)
    return ids


def _sentences(tokenizer: Tokenizer, documents: Iterable[Document]) -> tuple[list[int], list[int]]:
    """All documents as one row of tokens, and where sentences begin."""
    ids: list[int] = []
    starts: list[int] = []
    for document in documents:
        sentences = [part for part in SENTENCE_END.split(as_text(tokenizer, document)) if part.strip()]
        for part in tokenizer.encode_all(sentences, special=False):
            starts.append(len(ids))
            ids += part
    return ids, starts


def _places_at(starts: list[int], tokens: int, body: int) -> list[int]:
    """Beginnings of windows of `body` tokens that do not overlap, out of `starts`."""
    places, free = [], 0
    for start in starts:
        if start >= free and start + body <= tokens:
            places.append(start)
            free = start + body
    return places


def as_text(tokenizer: Any, document: Document) -> str:
    """A document's text; a conversation goes through the chat template if there is one."""
    if not document.messages:
        return document.text
    template = Tokenizer.of(tokenizer).chat_template
    messages = [dict(message) for message in document.messages]
    if template is None:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)
    try:
        text = template.render(messages, answer=False, tools=document.tools or None)
    except FeatherError as error:
        raise CalibrationError(
            f"the conversation in {document.place or 'the calibration text'} cannot be written: {error}; correct or "
            "leave out the row, or give rows with a field text instead"
        ) from error
    last = messages[-1]["content"].strip()
    end = text.rfind(last) + len(last)
    return text if document.finished or not last or end < len(last) else text[:end]


__all__ = ["calibration_windows", "context_of", "text_digest", "windows", "windows_digest"]
