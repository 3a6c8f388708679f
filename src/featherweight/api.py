"""The three calls of the Python interface: compress, load, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import CheckpointError, FeatherError

if TYPE_CHECKING:
    import torch

    from featherweight.compress.engine import Compression
    from featherweight.evaluate.evaluation import Evaluation

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def compress(model: str | Path, recipe: Any, out: str | Path, **options: Any) -> Compression:
    """Compress a checkpoint into the folder `out`; see `featherweight.compress.engine.compress` for the options."""
    from featherweight.compress.engine import compress as run

    return run(model, recipe, out, **options)


def evaluate(model: Any, against: Any = None, **options: Any) -> Evaluation:
    """Measure a model, also against another; see `featherweight.evaluate.evaluation.evaluate` for the options."""
    from featherweight.evaluate.evaluation import evaluate as run

    return run(model, against, **options)


def load(
    model: str | Path,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    *,
    cache: bool = False,
    verify: bool | str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a model, compressed or not, and its tokenizer.

    Args:
        model: a folder, or the hub id (owner/name) of one.
        dtype: of everything that is not compressed, and of the computation; default: what config.json says.
        device_map: as in transformers; default: the CPU.
        cache: keep each layer's matrix once it is decoded: faster from the second call on, as large as uncompressed.
        verify: whether the tensors of a compressed model are compared with their hashes: "always" (or True), "never"
            (or False), "auto" for models of up to 8 GiB; default: what FEATHERWEIGHT_VERIFY says, else "auto". It
            reads the files once, at 1.5 GB a second and thread.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model, of the class that config.json names (a causal language model where it names none), in evaluation
        mode; and the tokenizer, or None if the folder has none.

    Raises:
        CheckpointError: there is no such folder, or it is incomplete, damaged, or of a kind transformers does not know.
    """
    folder, config = _folder(model, kwargs.pop("revision", None), kwargs.pop("token", None))
    import torch
    import transformers
    from safetensors import SafetensorError

    from featherweight.checkpoint.integrity import verifying
    from featherweight.integrations.hooks import install
    from featherweight.integrations.modules import set_cache

    install()
    default_dtype = torch.get_default_dtype()
    architectures = config.get("architectures") or [""]
    cls = getattr(transformers, str(architectures[0]), transformers.AutoModelForCausalLM)
    dtype_argument = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        with verifying(verify):
            loaded = cls.from_pretrained(
                folder, **{dtype_argument: _dtype(dtype)}, device_map=device_map, local_files_only=True, **kwargs
            )
        tokenizer = None
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {' '.join(str(error).split())}") from error
    finally:
        torch.set_default_dtype(default_dtype)  # transformers 4.x leaves its own behind when loading fails
    set_cache(loaded, cache)
    return loaded.eval(), tokenizer


def _folder(model: str | Path, revision: str | None, token: str | None) -> tuple[Path, dict[str, Any]]:
    """The local folder of a model, and its config.json."""
    folder = Path(model)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the weights")
    if not folder.is_dir():
        if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
            raise CheckpointError(f"{folder} does not exist: give a folder with config.json and weights, or a hub id")
        from featherweight.checkpoint.hub import download

        folder = download(str(model), revision, token)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object: restore the file")
    return folder, config


def _dtype(dtype: str | torch.dtype | None) -> Any:
    """`auto` or a torch dtype."""
    import torch

    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise FeatherError(f"dtype is {dtype!r}, expected one of float32, bfloat16, float16")
    return found
