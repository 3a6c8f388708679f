"""The network of a training: a configuration with seeded first weights, or a checkpoint to go on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import CheckpointError, FeatherError
from featherweight.integrations.load import load
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.system.files import read_object, sha256_of, to_json
from featherweight.system.transformers_calls import asking_transformers


@dataclass(frozen=True)
class Opened:
    """model : of transformers, float32, in training mode
    tokenizer : as `model.text` reads it
    folder : where the tokenizer's files are
    name : of the source, for people
    identity : says which weights the training begins with
    """

    model: Any
    tokenizer: Tokenizer
    folder: Path
    name: str
    identity: dict[str, Any]


def open_network(
    model: str | Path | None, config: str | Path | None, tokenizer: str | Path | None, seed: int, trust: bool
) -> Opened:
    """Exactly one of `model` and `config` must be given.

    Raises
    ------
    FeatherError
        Neither or both are given, there is no tokenizer, or the model cannot be made; the text says what to do.
    """
    if (model is None) == (config is None):
        both = "and both are given" if model is not None else "and neither is given"
        raise FeatherError(f"a training goes on from MODEL or begins with --config, {both}")
    if config is not None:
        network, folder, identity = _from_config(Path(config).expanduser(), seed, trust)
        name = Path(config).expanduser().resolve().name
    else:
        assert model is not None
        with Checkpoint.open(model) as checkpoint:
            if checkpoint.quantization_config is not None:
                raise FeatherError(f"{checkpoint.folder} is compressed: train the original model, or heal this one")
            folder, identity = checkpoint.folder, {"weights": sample_digest(checkpoint)}
        network, _ = load(model, dtype=torch.float32, trust_remote_code=trust)
        name = Path(model).expanduser().name
    if tokenizer is not None:
        folder = Path(tokenizer).expanduser()
    found = Tokenizer.open(folder, trust) if folder.is_dir() else None
    if found is None:
        raise FeatherError(f"{folder} has no tokenizer, and a training needs one: name a folder with --tokenizer")
    return Opened(network.train(), found, folder, name, identity)


def _from_config(path: Path, seed: int, trust: bool) -> tuple[Any, Path, dict[str, Any]]:
    import transformers

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"there is no configuration {file}: give a config.json of transformers, or its folder")
    settings = read_object(file)
    if not isinstance(settings.get("model_type"), str):
        raise CheckpointError(f"{file} is no configuration of transformers: it has no model_type")
    if settings.get("quantization_config"):
        raise CheckpointError(f"{file} has a quantization_config: take it out to train such a model from scratch")
    with asking_transformers(f"make a model of {file}"):
        config = transformers.AutoConfig.from_pretrained(path if path.is_dir() else file, trust_remote_code=trust)
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust).float()
    network.config.dtype = "float32"
    return network, file.parent, {"config": sha256_of(to_json(settings)), "transformers": transformers.__version__}
