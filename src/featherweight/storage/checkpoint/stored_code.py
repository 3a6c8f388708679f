"""One compressed module's code from a folder, whole or the first of its terms, with no other tensors read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featherweight.errors import CheckpointError, FeatherError
from featherweight.registry import nearest
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_layout, module_specs
from featherweight.storage.codes import Code, code_from, code_prefix
from featherweight.storage.codes.base import Cut


def load_code(checkpoint: Checkpoint, module: str, terms: int | None = None) -> Code:
    """The code of a compressed module, or the sum of its first `terms` terms (`Code.prefix`).

    Only the tensors of these terms are read: of a sum those of the others stay untouched, of planes their digits;
    scales that are stored for all planes side by side are read as a whole. Hashes are not compared (`feather verify`
    does).

    Parameters
    ----------
    checkpoint : Checkpoint
        An open folder that featherweight has written.
    module : str
        Name of the module in the checkpoint, without `.weight`.
    terms : int, optional
        How many terms, from the first; default: all.

    Returns
    -------
    Code
        Its tensors may be views of the mapped file.

    Raises
    ------
    CheckpointError
        The folder has no such compressed module, or it is damaged; UnknownCodeError where it takes a newer release.
    FeatherError
        The code has fewer terms.
    """
    specs = module_specs(checkpoint.quantization_config or {})
    if module not in specs:
        raise CheckpointError(f"{checkpoint.folder} has no compressed module {module!r}{nearest(module, specs)}")
    spec = specs[module]
    cuts = {name: Cut(name) for name in module_layout(module, spec)}
    if terms is not None:
        try:
            spec, cuts = code_prefix(spec, terms)
        except ValueError as error:
            raise FeatherError(f"the module {module!r} of {checkpoint.folder} has no such part: {error}") from None
    return read_code(checkpoint, module, spec, cuts)


def read_code(checkpoint: Checkpoint, module: str, spec: dict[str, Any], cuts: Mapping[str, Cut] | None = None) -> Code:
    """The code of a module whose spec is known; `cuts`, of a part, what its tensors are cut from.

    Raises
    ------
    CheckpointError
        It is damaged.
    """
    cuts = {name: Cut(name) for name in module_layout(module, spec)} if cuts is None else cuts
    try:
        return code_from(spec, {name: _read(checkpoint, module, cut) for name, cut in cuts.items()})
    except ValueError as error:
        raise CheckpointError(
            f"the compressed layer {module!r} of {checkpoint.folder} is damaged ({error}): download or compress the "
            "model again"
        ) from None


def _read(checkpoint: Checkpoint, module: str, cut: Cut) -> Tensor:
    name = f"{module}.{cut.tensor}"
    if cut.dim == 0 and checkpoint.entry(name).shape[:1] >= (cut.size,):
        return checkpoint.rows(name, 0, cut.size)
    tensor = checkpoint.tensor(name)
    if cut.dim is not None and (cut.dim >= tensor.dim() or tensor.shape[cut.dim] < cut.size):
        return tensor  # a damaged file: whoever makes the code of it says what does not fit
    return cut.of(tensor)
