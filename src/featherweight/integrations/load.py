"""`featherweight.load`: a model, compressed or not, as transformers gives it, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import FeatherError

if TYPE_CHECKING:
    import torch


def load(
    model: str | Path,
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    *,
    cache: bool = False,
    verify: bool | str | None = None,
    size: int | str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a model, compressed or not, and its tokenizer.

    Parameters
    ----------
    model : str or Path
        A folder, one .safetensors file with its config.json beside it, or a hub id; `~` is the home folder.
    dtype : str or torch.dtype, optional
        Of everything that is not compressed, and of the computation. Default: what config.json says.
    device_map : str or dict, optional
        As in transformers. Default: the CPU.
    cache : bool
        Keep each layer's matrix [out_features, in_features] once it is decoded: faster from the second call on, as
        large as uncompressed.
    verify : bool or str, optional
        Whether the tensors of a compressed model are compared with their hashes: "always" (or True), "never" (or
        False), "auto" for models of up to 8 GiB. Default: what FEATHERWEIGHT_VERIFY says, else "auto". It reads the
        files once, at 1.5 GB a second and thread.
    size : int or str, optional
        Of a stack (`feather stack`): as many of its blocks as fit into a weight file of so many bytes, 60_000_000 or
        "60MB". That prefix is kept as a folder in the cache; `featherweight.resize` changes the size later. Default:
        all blocks.
    trust_remote_code : bool
        Run the code that a folder brings for its model class or tokenizer.
    kwargs
        Passed on to `from_pretrained`; `revision` and `token` are those of a hub id.

    Returns
    -------
    model : torch.nn.Module
        Of the class that config.json names (a causal language model where it names none), in evaluation mode. It
        takes token ids int64 [batch, tokens] as any model of transformers does.
    tokenizer : object or None
        That of transformers; None if the folder has none.

    Raises
    ------
    CheckpointError
        There is no such model, or it is incomplete, damaged, or of a kind that transformers does not know. Tensors that
        are missing are named; transformers alone would make them up. A kind of code that is not known here is named
        as well: a newer release, or a package that is not installed, wrote it.
    FeatherError
        `dtype` is no dtype; `size` is less than the stack's smallest model, which the text says.

    Warns
    -----
    FeatherWarning
        Tensors that the model does not use, and whatever else is odd about the folder.

    Examples
    --------
    >>> model, tokenizer = featherweight.load("small")
    >>> ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))
    """
    from featherweight.storage.checkpoint.resolve import resolve

    place = resolve(model, revision=kwargs.pop("revision", None), token=kwargs.pop("token", None))
    of_stack: tuple[Path, int] | None = None
    if size is not None:
        from featherweight.storage.stack.writing import sized_folder

        folder, blocks = sized_folder(place.folder, size)
        place, of_stack = resolve(folder), (place.folder.resolve(), blocks)
    import torch
    import transformers

    from featherweight.integrations.hooks import install
    from featherweight.integrations.loading import load_model, load_tokenizer
    from featherweight.integrations.resize import remember
    from featherweight.model.layers.modules import set_cache
    from featherweight.storage.checkpoint.integrity import verifying

    install()
    default_dtype = torch.get_default_dtype()
    dtype_argument = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    kwargs[dtype_argument] = _dtype(dtype)
    try:
        with verifying(verify):
            loaded = load_model(place, trust_remote_code, device_map=device_map, **kwargs)
        tokenizer = load_tokenizer(place.folder, trust_remote_code)
    finally:
        torch.set_default_dtype(default_dtype)  # transformers 4.x leaves its own behind when loading fails
    set_cache(loaded, cache)
    if of_stack is not None:
        remember(loaded, *of_stack)
    return loaded, tokenizer


def _dtype(dtype: str | torch.dtype | None) -> Any:
    """`auto` or a torch dtype."""
    import torch

    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise FeatherError(f"dtype is {dtype!r}, expected one of float32, bfloat16, float16")
    return found
