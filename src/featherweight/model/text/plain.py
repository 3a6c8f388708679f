"""Which folders' tokenizer.json says everything, so that it can be read without transformers.

transformers builds a tokenizer from tokenizer.json, tokenizer_config.json, further files, the class that is named and
the kind of the model, and each version in its own way: classes rebuild the whole pipeline from the vocabulary, flags
move the first and last tokens, named tokens are added. Only where none of that can matter is the file taken as it is.
tests/text compares the outcome over thousands of folders with the installed version.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.model.text.chat_template import TOKENS
from featherweight.system.transformers_calls import asking_transformers

MODEL_TYPES = ("llama", "qwen3")
"""Kinds of models for which every version of transformers takes the class that is named, not one of its own choice."""
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
HARMLESS = {
    *("backend", "is_local", "local_files_only", "model_input_names", "model_max_length", "name_or_path"),
    *("padding_side", "processor_class", "tokenizer_class", "truncation_side"),
}
"""Settings that do not change what a text becomes."""
OFF = {"clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space"}
"""Settings that change nothing while they are false."""
OTHER_FILES = ("added_tokens.json", "tekken.json", "tokenizer.model", "additional_chat_templates")
SOME_TEXT = "The quick brown fox, 12 é"
"""What every tokenizer makes some tokens of."""
FLAGS = ("lstrip", "rstrip", "single_word")


def plain_tokenizer(folder: Path) -> tuple[Any, dict[str, Any]] | None:
    """A `tokenizers.Tokenizer` and the settings, or None where transformers is to be asked.

    Raises
    ------
    CheckpointError
        a file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() or any((folder / name).exists() for name in OTHER_FILES):
        return None
    settings, config = read_object(folder / "tokenizer_config.json"), read_object(folder / "config.json")
    if not _plain_class(settings, config):
        return None
    content = read_object(path)
    added = _added_tokens(content)
    if added is None or not _plain_pipeline(content) or not _plain_settings(settings, added):
        return None
    if not _same_names(read_object(folder / "special_tokens_map.json"), settings, added):
        return None
    from tokenizers import Tokenizer

    with asking_transformers(f"make a tokenizer of {path}", "restore the file"):
        core = Tokenizer.from_str(json.dumps(content))
        useful = bool(core.encode(SOME_TEXT, add_special_tokens=False).ids)
    return (core, settings) if useful else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): restore the file") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object: restore the file")
    return found


def _plain_class(settings: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the class that transformers takes is the one that does nothing of its own."""
    named = settings.get("tokenizer_class")
    if named == "TokenizersBackend":
        try:
            known = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
        except (importlib.metadata.PackageNotFoundError, ValueError):
            known = False
    else:
        known = named == "PreTrainedTokenizerFast"
    return known and config.get("model_type") in MODEL_TYPES and "auto_map" not in config


def _added_tokens(content: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The added tokens of a tokenizer.json by their text; None where they are not what they should be."""
    found = content.get("added_tokens", [])
    if not isinstance(found, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in found):
        return None
    return {token["content"]: token for token in found}


def _plain_pipeline(content: dict[str, Any]) -> bool:
    """transformers 4 changes a leading pre-tokeniser that adds a space; padding and truncation are read by all."""
    first = content.get("pre_tokenizer")
    spaced = isinstance(first, dict) and first.get("add_prefix_space") not in (None, False)
    return not spaced and content.get("padding") is None and content.get("truncation") is None


def _plain_settings(settings: dict[str, Any], added: dict[str, dict[str, Any]]) -> bool:
    for name, value in settings.items():
        if name in HARMLESS or (name in OFF and value in (None, False)):
            continue
        if name == "chat_template":
            plain = value is None or isinstance(value, str)
        elif name in TOKENS:
            plain = value is None or (_typed(value) and _known(value, added))
        elif name in EXTRA_TOKENS:
            plain = isinstance(value, list) and all(_typed(token) and _known(token, added) for token in value)
        elif name == "added_tokens_decoder":
            plain = isinstance(value, dict) and all(_same(token, number, added) for number, token in value.items())
        else:
            plain = False
        if not plain:
            return False
    return True


def _typed(token: Any) -> bool:
    return isinstance(token, str) or (isinstance(token, dict) and token.get("__type") == "AddedToken")


def _known(token: Any, added: dict[str, dict[str, Any]]) -> bool:
    """Whether a named token stands in tokenizer.json, special and without flags, so that naming it changes nothing."""
    text = token.get("content") if isinstance(token, dict) else token
    found = added.get(text) if isinstance(text, str) else None
    if found is None or found.get("special") is not True or any(found.get(flag) for flag in (*FLAGS, "normalized")):
        return False
    return not (isinstance(token, dict) and any(token.get(flag) for flag in (*FLAGS, "normalized")))


def _same(token: Any, number: Any, added: dict[str, dict[str, Any]]) -> bool:
    """Whether an entry of `added_tokens_decoder` repeats what tokenizer.json says."""
    found = added.get(str(token.get("content"))) if isinstance(token, dict) else None
    names = (*FLAGS, "normalized", "special")
    return (
        found is not None and str(found.get("id")) == str(number) and all(token.get(n) == found.get(n) for n in names)
    )


def _same_names(names: dict[str, Any], settings: dict[str, Any], added: dict[str, dict[str, Any]]) -> bool:
    """Whether special_tokens_map.json, which some versions read, says nothing new."""

    def text(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    for name, value in names.items():
        if name in EXTRA_TOKENS:
            if not isinstance(value, list) or not all(_known(token, added) for token in value):
                return False
        elif name not in TOKENS or not _known(value, added) or text(settings.get(name)) != text(value):
            return False
    return True
