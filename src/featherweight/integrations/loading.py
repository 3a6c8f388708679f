"""Loading a folder with transformers so that it is the model that config.json describes, or an error."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, FeatherWarning
from featherweight.integrations.transformers import LOADS_BY_CONVERSION
from featherweight.model.network.accounting import account_from, check_complete, judge, unexpected_text
from featherweight.storage.checkpoint.accounting import architecture_of, refuse_impossible_depth, refuse_other_kinds
from featherweight.storage.checkpoint.anatomy import own_head, own_head_text
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import METHOD
from featherweight.storage.checkpoint.prefixes import as_key_mapping
from featherweight.storage.checkpoint.resolve import Place
from featherweight.storage.checkpoint.view import View
from featherweight.system.transformers_calls import asking_transformers, knows_quant_method

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(place: Place, trust_remote_code: bool = False, **options: Any) -> Any:
    """The model in a folder, of the class that config.json names, in evaluation mode.

    options : for `from_pretrained`
    Raises CheckpointError naming what is missing, of another shape, or coded by a method that is not there. Warns
    (FeatherWarning) of tensors that are not used.
    """
    with Checkpoint.at(place) as checkpoint:
        refuse_impossible_depth(checkpoint)
        checkpoint.trust_remote_code = trust_remote_code
        foreign = _check_method(checkpoint)
        notes = checkpoint.notes
        if checkpoint.quantization_config is None:
            notes = check_complete(checkpoint).notes
        else:
            refuse_other_kinds(checkpoint, True)
        view = View(checkpoint, place)
        if own_head(checkpoint):  # transformers 5 sees by itself that it differs from the embedding, 4 does not
            options["tie_word_embeddings"] = False
            notes = (*notes, own_head_text(checkpoint))
        if foreign:
            _keep_dtype(checkpoint, options)
        for note in notes:
            warnings.warn(note, FeatherWarning, stacklevel=4)
        try:
            model, info = _load(place, checkpoint, view.folder, options)
        except BaseException:
            view.close()
            raise
        weakref.finalize(model, view.close)
        model.config.name_or_path = str(place.folder)
        _check_loaded(checkpoint, model, info)
    return model.eval()


def _check_method(checkpoint: Checkpoint) -> bool:
    """Whether another tool has compressed the model; CheckpointError if transformers does not know which."""
    config = checkpoint.quantization_config
    if config is None or config.get("quant_method") == METHOD:
        return False
    method = config.get("quant_method")
    if method is None and not config.get("load_in_8bit") and not config.get("load_in_4bit"):
        raise CheckpointError(
            f"{checkpoint.folder} has a quantization_config in its config.json that names no quant_method, so nobody "
            "knows what its tensors mean: restore the config.json, or remove the entry if the weights are plain"
        )
    loads_bits = config.get("load_in_8bit") or config.get("load_in_4bit")
    if not loads_bits and (not isinstance(method, str) or not knows_quant_method(method)):
        raise CheckpointError(
            f"{checkpoint.folder} is quantised by {str(method)[:40]!r}, which the installed transformers does not "
            "know: start from the original weights"
        )
    return True


def _keep_dtype(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    """Other tools' layers compute in the dtype they were made for, and fail with float32 inputs."""
    import torch

    for name in ("dtype", "torch_dtype"):
        if options.get(name) is torch.float32:
            options[name] = "auto"


def _load(place: Place, checkpoint: Checkpoint, folder: Path, options: dict[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    import transformers

    named = architecture_of(checkpoint.config)
    cls = getattr(transformers, named, None) if named else None
    if cls is None or not hasattr(cls, "from_pretrained"):
        cls = transformers.AutoModelForCausalLM
    custom = isinstance(checkpoint.config.get("auto_map"), dict)
    if checkpoint.trust_remote_code and custom:
        cls = transformers.AutoModelForCausalLM
        options["trust_remote_code"] = True
        if "AutoModelForCausalLM" not in checkpoint.config["auto_map"]:
            cls = transformers.AutoModel
    elif custom and cls is transformers.AutoModelForCausalLM and not _knows(checkpoint):
        raise CheckpointError(
            f"{place.folder} brings the code of its own model class: if you trust it, allow that it runs with "
            "--trust-remote-code (in Python trust_remote_code=True)"
        )
    mapping = as_key_mapping(checkpoint.renamed)
    with asking_transformers(f"load {place.folder}"):
        if mapping and not LOADS_BY_CONVERSION:
            return _load_renamed(cls, checkpoint, folder, options)
        if mapping:
            options["key_mapping"] = mapping
        model, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    return model, info


def _load_renamed(
    cls: Any, checkpoint: Checkpoint, folder: Path, options: dict[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """transformers 4 looks for the base model's prefix before it renames: it gets the tensors under their own names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if "tie_word_embeddings" in options:
        config.tie_word_embeddings = options.pop("tie_word_embeddings")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    model, info = cls.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, info


def _knows(checkpoint: Checkpoint) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return checkpoint.config.get("model_type") in CONFIG_MAPPING


def _check_loaded(checkpoint: Checkpoint, model: Any, info: Mapping[str, Any]) -> None:
    """What transformers says of the loading itself; of the tensors of plain checkpoints it was asked before."""
    account = account_from(model, info, checkpoint)
    judge(checkpoint, account)
    if account.unexpected and checkpoint.quantization_config is not None:
        warnings.warn(unexpected_text(checkpoint, account), FeatherWarning, stacklevel=5)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, None if there is none."""
    from featherweight.model.text.tokenizer import auto_tokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return auto_tokenizer(folder, trust_remote_code)
