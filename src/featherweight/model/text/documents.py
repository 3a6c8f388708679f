"""Calibration text, read into documents.

What is read is a .txt file (also .xz, .gz), .jsonl, .parquet, a folder of text files, or a data set of the Hugging Face
hub, `hf:NAME[:config[:split[:column]]]`; with nothing given, the text that comes with the package. Rows hold `text`, or
a conversation: `messages`, `conversations`, or `prompt` and `completion`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from featherweight.errors import CalibrationError
from featherweight.model.text.files import read_text
from featherweight.system.places import ASSETS

BUNDLED = ASSETS / "calibration.txt"
TEXT_SUFFIXES = (".txt", ".md", ".text")
TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True)
class Document:
    """A text, or a conversation: role and content of every message."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


def text_digest(text: str | Path | None) -> str:
    """SHA-256 (hex) of a text's files; of its name for a data set of the hub."""
    digest = hashlib.sha256()
    if text is not None and str(text).startswith("hf:"):
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
    elif str(text).startswith("hf:"):
        documents = _read_hub(str(text))
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


def _read_hub(text: str) -> list[Document]:
    """hf:NAME[:config[:split[:column]]]"""
    name, config, split, column = (text.removeprefix("hf:").split(":") + ["", "", ""])[:4]
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise CalibrationError(f"{text} needs the package datasets: pip install datasets, or give a file") from None
    try:
        rows = list(datasets.load_dataset(name, config or None, split=split or "train"))
    except Exception as error:  # the package raises many kinds
        raise CalibrationError(f"cannot load the data set {text} ({str(error)[:200]})") from error
    numbered = ((f"row {i}", {"text": row.get(column)} if column else row) for i, row in enumerate(rows, 1))
    return _rows_to_documents(numbered, text)


def _rows_to_documents(rows: Iterable[tuple[str, Any]], name: str) -> list[Document]:
    return [_row_to_document(row, f"{place} of {name}") for place, row in rows]


def _row_to_document(row: Any, place: str) -> Document:
    if isinstance(row, str):
        return Document(row)
    if isinstance(row, dict):
        for column in CHAT_COLUMNS:
            if row.get(column) is not None:
                return Document(messages=_messages(row[column], f"{column} in {place}"))
        if row.get("prompt") is not None and row.get("completion") is not None:
            return Document(messages=_prompted(row["prompt"], row["completion"], place))
        for column in TEXT_COLUMNS:
            if isinstance(row.get(column), str):
                return Document(row[column])
    raise CalibrationError(
        f"{place} has neither text nor a conversation; expected a field text, messages, conversations, or prompt "
        "and completion"
    )


def _messages(value: Any, place: str) -> tuple[dict[str, str], ...]:
    names = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    found = []
    for message in value if isinstance(value, list | tuple) else ():
        if not isinstance(message, dict):
            break
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which only texts count
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            break
        found.append({"role": names.get(role, role), "content": content})
    else:
        if found:
            return tuple(found)
    raise CalibrationError(f"{place} is not a list of messages, each with a role and a content")


def _prompted(prompt: Any, completion: Any, place: str) -> tuple[dict[str, str], ...]:
    parts: list[dict[str, str]] = []
    for role, value in (("user", prompt), ("assistant", completion)):
        parts += [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, place)
    return tuple(parts)
