"""Asking transformers: does a checkpoint hold what its model class asks for, and what is left over?

transformers fills what is missing with random numbers. So its own loader is run on meta tensors of the stored names,
types and shapes, which costs no weights, and knows every renaming, fusing, tying and exception that the class has; its
report is then read instead of switched off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.accounting import (
    Account,
    architecture_of,
    expert_gaps,
    is_whole,
    listed_missing,
    missing_text,
    refuse_impossible_depth,
    refuse_other_kinds,
    some,
)
from featherweight.storage.checkpoint.anatomy.tensor_index import TensorIndex
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.safetensors_file import TORCH_NAMES
from featherweight.system.transformers_calls import asking_transformers, one_line

_asking = threading.Lock()

BESIDE = re.compile(r"(^|\.)pooler\.")
"""Parts of an encoder that nothing else reads: without them the rest is still the model."""


@dataclass(frozen=True)
class Verdict:
    """A checkpoint is the model that its config.json describes.

    notes : what is odd all the same, a sentence each
    unexpected : names of its tensors that the class `asked` does not use
    """

    notes: tuple[str, ...]
    unexpected: tuple[str, ...] = ()
    asked: str = ""


def check_complete(checkpoint: Checkpoint) -> Verdict:
    """What is to be said of a checkpoint that is the model its config.json describes.

    Only headers are read. For families whose file lists all tensors nobody is asked; else the model is built without
    weights by the installed transformers.

    Raises
    ------
    CheckpointError
        tensors are missing, of other shapes, or of another kind, by name.
    """
    refuse_impossible_depth(checkpoint)
    refuse_other_kinds(checkpoint, checkpoint.quantization_config is not None)
    if is_whole(checkpoint):
        return Verdict(checkpoint.notes)
    account = account_of(checkpoint, checkpoint.trust_remote_code)
    given = {f"{module}.bias" for module in checkpoint.given_biases}
    account = replace(account, unexpected=tuple(name for name in account.unexpected if name not in given))
    gaps = expert_gaps(checkpoint)
    if account.unknown:
        lost = gaps or listed_missing(checkpoint)
        if lost:
            raise CheckpointError(missing_text(checkpoint, lost))
        note = f"{account.unknown}, so nobody checked whether tensors are missing"
        return Verdict((*checkpoint.notes, note))
    judge(checkpoint, account, gaps)
    lacking = [name for name in account.missing if BESIDE.search(name)]
    notes = list(checkpoint.notes)
    if lacking:
        notes.append(f"{checkpoint.folder} lacks {some(lacking)}, which nothing else reads: transformers makes it up")
    if account.unexpected:
        notes.append(unexpected_text(checkpoint, account))
    return Verdict(tuple(notes), tuple(n for n in account.unexpected if checkpoint.has(n)), account.asked)


def check_compressed(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Notes about a folder that we compressed, if codes and plain tensors together are all that the class asks for.

    Raises CheckpointError naming what is missing.
    """
    from featherweight.storage.checkpoint.size import OriginalView

    refuse_other_kinds(checkpoint, True)
    view = OriginalView(checkpoint)
    refuse_impossible_depth(view)
    if is_whole(view):
        return checkpoint.notes
    account = account_of(view)
    if account.unknown:
        return (*checkpoint.notes, f"{account.unknown}, so nobody checked whether tensors are missing")
    gaps = [name for name in expert_gaps(view) if name.endswith((".weight", ".bias"))]  # else parts of unlisted codes
    # a code's shape is that of the matrix, which the class may store the other way round; verify compares it
    wrong = tuple(m for m in account.mismatched if checkpoint.has(m[0]) or _is_gap(m[0], gaps))
    judge(view, replace(account, mismatched=wrong), gaps)
    return checkpoint.notes


def judge(checkpoint: TensorIndex, account: Account, gaps: Iterable[str] = ()) -> None:
    """CheckpointError where an account shows another model than config.json describes."""
    missing = [name for name in account.missing if not BESIDE.search(name)]
    wrong = [m for m in account.mismatched if not _is_gap(m[0], gaps)]
    if len(wrong) < len(account.mismatched) or (missing and gaps and all(_is_gap(name, gaps) for name in missing)):
        raise CheckpointError(missing_text(checkpoint, list(gaps)))
    if wrong:
        name, stored, wanted = wrong[0]
        raise CheckpointError(
            f"{checkpoint.folder} holds {name} as {list(stored)}, but {account.asked} with this config.json has it as "
            f"{list(wanted)}{_and_more(len(wrong) - 1)}: config.json and the weights do not belong together"
        )
    if missing:
        raise CheckpointError(missing_text(checkpoint, missing))


def unexpected_text(checkpoint: TensorIndex, account: Account) -> str:
    """The note about tensors that the class does not use."""
    return (
        f"{checkpoint.folder} holds {some(account.unexpected)}, which {account.asked} does not ask for: not part of "
        "the model that runs"
    )


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _is_gap(name: str, gaps: Iterable[str]) -> bool:
    """Whether a parameter of a class is the one in which experts are missing."""
    lists = {gap.partition(".experts.")[0] for gap in gaps}
    return any(f"{prefix}.experts." in f"{name}." or name.endswith(f"{prefix}.experts") for prefix in lists)


def account_of(source: TensorIndex, trust_remote_code: bool = False) -> Account:
    """What the class of config.json makes of the tensors of a checkpoint."""
    import transformers

    entries = {name: source.entry(name) for name in source.names}
    tensors = {name: _meta(entry.shape, entry.dtype) for name, entry in entries.items()}
    unknown = f"transformers {transformers.__version__} does not know the model in {source.folder}"
    try:
        with quietly():
            config = _read_config(source, trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            return Account(unknown=f"{source.folder} brings its own model class, which only --trust-remote-code runs")
        if _is_known(source.config):
            unknown = f"transformers cannot read the config.json of {source.folder} ({one_line(error)[:150]})"
        return Account(unknown=unknown)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    accounts = []
    for cls in classes_of(source.config, config, trust_remote_code):
        accounts.append(_ask(cls, _config_for(cls, config, source), tensors, source))
        if not accounts[-1].missing and not accounts[-1].unknown:
            break
    return min(accounts, key=lambda one: (bool(one.unknown), len(one.missing)), default=Account(unknown=unknown))


def _read_config(source: TensorIndex, trust_remote_code: bool) -> Any:
    """By model_type; where that is none that transformers knows, by the class that is named, as loading does."""
    import transformers

    named = getattr(transformers, architecture_of(source.config) or "_", None)
    kind = getattr(named, "config_class", None)
    if kind is not None and not _is_known(source.config):
        return kind.from_pretrained(source.folder, local_files_only=True)
    return transformers.AutoConfig.from_pretrained(
        source.folder, local_files_only=True, trust_remote_code=trust_remote_code
    )


def _config_for(cls: Any, config: Any, source: TensorIndex) -> Any:
    """config.json as the class reads it, where that is not the class of its model_type; this is what loading does."""
    kind = getattr(cls, "config_class", None)
    if kind is None or isinstance(config, kind):
        return config
    try:
        with quietly():
            return kind.from_pretrained(source.folder, local_files_only=True)
    except Exception:
        return config


def _is_known(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(config.get("model_type"), str) and config["model_type"] in CONFIG_MAPPING


def classes_of(stored: Mapping[str, Any], config: Any, trust_remote_code: bool = False) -> list[Any]:
    """The class that config.json names; where it names none, those of its type that a checkpoint may be of."""
    import transformers

    named = architecture_of(stored)
    found = getattr(transformers, named, None) if named else None
    if found is not None and hasattr(found, "from_pretrained"):
        return [found]
    own = custom_class(stored, config.name_or_path) if trust_remote_code else None
    if own is not None:
        return [own]
    classes = []
    for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            one = mapping[type(config)]
            classes.append(one[0] if isinstance(one, tuple | list) else one)
    return classes


def custom_class(stored: Mapping[str, Any], folder: str | Path) -> Any:
    """The class that a folder's own code defines, whose code runs by this; None where config.json names none."""
    named = stored.get("auto_map")
    if not isinstance(named, dict):
        return None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = next((named[key] for key in ("AutoModelForCausalLM", "AutoModel") if key in named), None)
    if name is None:
        return None
    with asking_transformers(f"run the code in {folder}"):
        return get_class_from_dynamic_module(name, str(folder))


def _meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    kind = getattr(torch, TORCH_NAMES[dtype], torch.uint8)
    return torch.empty(shape, dtype=kind, device="meta")


def _ask(cls: Any, config: Any, tensors: dict[str, torch.Tensor], source: TensorIndex) -> Account:
    import transformers

    with _asking, quietly(), _without_accelerate():
        try:
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                output_loading_info=True,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                attn_implementation="eager",  # tensors are placed alike with all of them, and config.json may name none
            )
        except Exception as error:
            gaps = expert_gaps(source)
            if gaps and isinstance(error, RuntimeError):  # experts of which some lack a part cannot be fused
                raise CheckpointError(missing_text(source, gaps)) from error
            if "size mismatch" in str(error):
                raise CheckpointError(
                    f"the weights of {source.folder} do not fit its config.json: {one_line(error)}"
                ) from error
            known = f"transformers {transformers.__version__} cannot place the tensors of {source.folder}"
            return Account(unknown=f"{known} ({one_line(error)[:150]})")
    return account_from(model, info, source)


def account_from(model: Any, info: Mapping[str, Any], source: TensorIndex) -> Account:
    """The report of transformers 4 or 5 as an account, with names as the checkpoint has them where that is told."""
    return Account(
        asked=type(model).__name__,
        missing=tuple(sorted(str(name) for name in info.get("missing_keys", ()))),
        unexpected=tuple(sorted(as_stored(str(name), source) for name in info.get("unexpected_keys", ()))),
        mismatched=tuple(_mismatch(item, model, source) for item in sorted(info.get("mismatched_keys", ()), key=str)),
    )


def _mismatch(item: Any, model: Any, source: TensorIndex) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(name, stored shape, wanted shape), of which transformers 4 gives the name alone."""
    if not isinstance(item, str):
        name, stored, wanted = item
        return str(name), tuple(stored), tuple(wanted)
    found = as_stored(item, source)
    wanted = model.state_dict().get(item)
    return item, source.entry(found).shape if found in source.names else (), () if wanted is None else wanted.shape


def as_stored(name: str, source: TensorIndex) -> str:
    """A name of the class as the checkpoint has it: its base model may stand there without the prefix, or with one."""
    if name in source.names:
        return name
    without = name.partition(".")[2]
    return without if without in source.names else next((n for n in source.names if n.endswith(f".{name}")), name)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the library's own report, bars and warnings, which become ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # not even errors: what they say is raised
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _without_accelerate() -> Iterator[None]:
    """transformers wants accelerate for any device map; for a single device, such as meta, it then calls none of it."""
    if importlib.util.find_spec("accelerate") is not None:
        yield
        return
    from transformers import modeling_utils

    with contextlib.ExitStack() as stack:
        places = [modeling_utils]
        with contextlib.suppress(ImportError):
            from transformers.integrations import accelerate

            places.append(accelerate)
        for place in places:
            if hasattr(place, "is_accelerate_available"):
                stack.enter_context(mock.patch.object(place, "is_accelerate_available", return_value=True))
        yield
