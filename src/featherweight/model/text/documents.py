"""Calibration text, read into documents.

What is read is a .txt file (also .xz, .gz), .jsonl, .parquet, a folder of text files, or a data set of the Hugging Face
hub, `hf:NAME[:config[:split[:column]]]`; with nothing given, the text that comes with the package. Rows hold `text`, or
a conversation: `messages`, `conversations`, or `prompt` and `completion`, and with it the `tools` that it may call.
Files of conversations that a model wrote itself begin with a row that says how (docs/format.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from featherweight.errors import CalibrationError, FeatherError
from featherweight.model.text.files import read_text
from featherweight.system.places import ASSETS

BUNDLED = ASSETS / "calibration.txt"
TEXT_SUFFIXES = (".txt", ".md", ".text")
TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations")
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
"""Of messages, beside role and content: they go to the chat template as they are."""
HUB = "hf:"
"""Begins the name of a data set of the Hugging Face hub."""
HEADER = "featherweight_conversations"
"""The field by which the first row of a file of conversations is known; its value is the version of the form."""


@dataclass(frozen=True)
class Document:
    """A text, or a conversation.

    messages : role and content of each, and what else chat templates read: see MESSAGE_FIELDS
    tools : JSON schemas of the tools that may be called
    finished : False for a conversation whose last message was cut, so that no end of its turn is written
    place : where it comes from, for errors
    """

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    finished: bool = True
    place: str = ""


def text_digest(text: str | Path | None) -> str:
    """SHA-256 (hex) of a text's files; of its name for a data set of the hub."""
    digest = hashlib.sha256()
    if text is not None and str(text).startswith(HUB):
        return hashlib.sha256(str(text).encode()).hexdigest()
    path = BUNDLED if text is None else Path(text).expanduser()
    files = _text_files(path) if path.is_dir() else [path]
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CalibrationError(f"cannot read the calibration text {file}: {error.strerror or error}") from None
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def read_documents(text: str | Path | None) -> list[Document]:
    """All documents of a text. CalibrationError if it cannot be read or is empty."""
    if text is None:
        documents = [Document(_read_text(BUNDLED))]
    elif str(text).startswith(HUB):
        documents = read_hub(str(text))
    else:
        documents = _read_path(Path(text).expanduser())
    documents = [d for d in documents if d.messages or d.text.strip()]
    if not documents:
        raise CalibrationError(f"the calibration text {text} is empty")
    return documents


def _read_path(path: Path) -> list[Document]:
    if path.is_dir():
        files = _text_files(path)
        if not files:
            raise CalibrationError(f"the folder {path} has no text files ({', '.join(TEXT_SUFFIXES)})")
        return [Document(_read_text(file)) for file in files]
    if path.suffix == ".jsonl":
        return _rows_to_documents(_read_lines(path), str(path))
    if path.suffix == ".parquet":
        return _rows_to_documents(_read_parquet(path), str(path))
    return [Document(_read_text(path))]


def _text_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())


def _read_text(path: Path) -> str:
    if path.suffix == ".safetensors":
        raise CalibrationError(f"{path} is no text but a file of tensors: give .txt, .jsonl, .parquet or a folder")
    return read_text(path, CalibrationError, "calibration text")


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"line {number} of {path} is not JSON ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    rows: list[Any]
    try:
        try:
            rows = import_module("pyarrow.parquet").read_table(path).to_pylist()
        except ImportError:
            rows = import_module("pandas").read_parquet(path).to_dict("records")
    except ImportError:
        raise CalibrationError(f"reading {path} needs pyarrow: pip install pyarrow, or give .jsonl or .txt") from None
    except Exception as error:  # whatever the reader raises for a damaged file
        raise CalibrationError(f"cannot read {path} as parquet ({str(error)[:200]})") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def read_hub(text: str, error: type[FeatherError] = CalibrationError) -> list[Document]:
    """The rows of hf:NAME[:config[:split[:column]]], empty ones among them; `error` where they cannot be had."""
    name, config, split, column = (text.removeprefix(HUB).split(":") + ["", "", ""])[:4]
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise error(f"{text} needs the package datasets: pip install datasets, or give a file") from None
    try:
        rows = list(datasets.load_dataset(name, config or None, split=split or "train"))
    except Exception as reason:  # the package raises many kinds
        said = " ".join(f"{type(reason).__name__}: {reason}".split())
        raise error(
            f"cannot load the data set {text} ({said[:200]}): check its name and the connection to the hub, or give a "
            "file"
        ) from reason
    numbered = ((f"row {i}", {"text": row.get(column)} if column else row) for i, row in enumerate(rows, 1))
    try:
        return _rows_to_documents(numbered, text)
    except CalibrationError as reason:
        raise error(str(reason)) from None


def _rows_to_documents(rows: Iterable[tuple[str, Any]], name: str) -> list[Document]:
    return [
        row_to_document(row, f"{place} of {name}")
        for place, row in rows
        if not (isinstance(row, dict) and HEADER in row)
    ]


def row_to_document(row: Any, place: str) -> Document:
    """A row of a file or data set; CalibrationError, naming the place, where it is neither text nor a conversation."""
    if isinstance(row, str):
        return Document(row)
    if isinstance(row, dict):
        for column in CHAT_COLUMNS:
            if row.get(column) is not None:
                messages = _messages(row[column], f"{column} in {place}")
                return Document("", messages, _tools(row, place), row.get("finished") is not False, place)
        if row.get("prompt") is not None and row.get("completion") is not None:
            return Document("", _prompted(row["prompt"], row["completion"], place), _tools(row, place), place=place)
        for column in TEXT_COLUMNS:
            if isinstance(row.get(column), str):
                return Document(row[column])
    raise CalibrationError(
        f"{place} has neither text nor a conversation; expected a field text, messages, conversations, or prompt "
        "and completion"
    )


def _tools(row: dict[str, Any], place: str) -> tuple[Any, ...]:
    """The tools of a conversation: a list, or one written as JSON, as data sets with columns of one type have it."""
    found = row.get("tools")
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = 0
    if not found and found != 0:
        return ()
    if not isinstance(found, list | tuple):
        raise CalibrationError(f"tools in {place} is not a list of JSON schemas: correct the row or take it out")
    return tuple(found)


def _messages(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    names = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    found = []
    for message in value if isinstance(value, list | tuple) else ():
        if not isinstance(message, dict):
            break
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which only texts count
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        more = {name: message[name] for name in MESSAGE_FIELDS if message.get(name)}
        if content is None and more:  # calls of tools may stand alone
            content = ""
        if not isinstance(role, str) or not isinstance(content, str):
            break
        found.append({"role": names.get(role, role), "content": content, **more})
    else:
        if found:
            return tuple(found)
    raise CalibrationError(f"{place} is not a list of messages, each with a role and a content")


def _prompted(prompt: Any, completion: Any, place: str) -> tuple[dict[str, Any], ...]:
    parts: list[dict[str, Any]] = []
    for role, value in (("user", prompt), ("assistant", completion)):
        parts += [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, place)
    return tuple(parts)
