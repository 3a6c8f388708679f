"""Names behind a wrapper's prefix: DistributedDataParallel's `module.`, torch.compile's `_orig_mod.`, and PEFT's
`base_model.model.` around a model whose adapters are merged. The wrapper is no part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from featherweight.errors import CheckpointError

WHOLE = ("module.", "_orig_mod.", "base_model.model.")
EXPERTS = re.compile(r"(?:model\.)*(?P<list>.*\bexperts)\.(?:_orig_mod\.)?(?=\d+\.)")
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # also around single modules


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Stored name -> name without the prefixes that all tensors carry, and without `_orig_mod.` anywhere.

    Raises CheckpointError if two tensors would have one name.
    """
    stored = list(names)
    plain = stored
    while plain and (prefix := next((p for p in WHOLE if all(name.startswith(p) for name in plain)), None)):
        plain = [name.removeprefix(prefix) for name in plain]
    plain = [COMPILED.sub(r"\1", name) for name in plain]
    found: dict[str, str] = {}
    for name, own in zip(plain, stored, strict=True):
        if name in found:
            raise CheckpointError(f"tensors {found[name]!r} and {own!r} are one tensor, {name!r}, without their prefix")
        found[name] = own
    _refuse_mixed_experts(found)
    return {own: name for name, own in found.items()}


def _refuse_mixed_experts(found: dict[str, str]) -> None:
    """CheckpointError if the experts of one list have different prefixes: transformers stacks them in the order of
    their stored names, so they would change places."""
    places: dict[str, str] = {}
    for name, own in found.items():
        plain, stored = EXPERTS.match(name), EXPERTS.match(own)
        if plain and stored and places.setdefault(plain["list"], stored[0]) != stored[0]:
            raise CheckpointError(
                f"the experts {plain['list']} are stored with different prefixes, such as {own!r}: save the model "
                "again without the wrapper around some of its modules"
            )


def as_key_mapping(names: dict[str, str]) -> dict[str, str]:
    """The same as patterns for the `key_mapping` of transformers' from_pretrained; empty where nothing is renamed."""
    if all(stored == name for stored, name in names.items()):
        return {}
    return {r"^((module|_orig_mod|base_model\.model)\.)+": "", r"\._orig_mod\.": "."}
