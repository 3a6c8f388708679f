"""How fast this machine multiplies with each way's codes when it decodes: measured once, kept in the cache.

    seconds(layer, way) = bytes of its code / rate(way)

The rate of a way is taken as the decoder meets it: the codes of the model's layers are packed, and one vector goes
through one after the other, so that a model that does not fit into the processor's caches is read from memory. Rates
are kept by the way, the threads, and the size that was read, to a power of two.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from featherweight.model.products.pack import PackedLinear, pack_code
from featherweight.native import library
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.system.files import read_object, to_json, write_text
from featherweight.system.places import cache_folder
from featherweight.system.threads import thread_count
from featherweight.tasks.fit.curves import Curves, Measured

MOST_BYTES = 1 << 29
"""Of codes that are packed to take a rate: beyond the caches of servers."""
REPEATS = 5
"""Rounds, of which the best counts: interference only makes one slower."""


def place_of_rates() -> Path:
    """The file that they are kept in."""
    return cache_folder() / "kernel-rates.json"


def layer_seconds(
    curves: Curves, layers: Sequence[LinearLayer], read: Callable[[LinearLayer], bool], told: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """By layer, what each of its ways takes for one token; 0 where `read` says that no token reads it whole."""
    kinds: dict[str, list[tuple[LinearLayer, Measured]]] = {}
    for layer in layers:
        for one in curves.measured[layer.name]:
            kinds.setdefault(_kind(one), []).append((layer, one))
    path = place_of_rates()
    known = {name: float(value) for name, value in read_object(path).items()}
    rates = {}
    for number, (kind, users) in enumerate(kinds.items()):
        told(number, len(kinds))
        some = _some(users)
        key = f"{kind}-{_machine()}-{sum(one.nbytes for _, one in some).bit_length()}"
        if key not in known:
            known[key] = _rate(curves, some)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_json(known))
        rates[kind] = known[key]
    told(len(kinds), len(kinds))
    return {
        layer.name: [one.nbytes / rates[_kind(one)] if read(layer) else 0.0 for one in curves.measured[layer.name]]
        for layer in layers
    }


def _kind(one: Measured) -> str:
    settings = json.dumps([one.way.transforms, one.way.grid], sort_keys=True)
    return f"{one.way.name} {hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _machine() -> str:
    found = library.get()
    isa = "none" if found is None else str(getattr(found, "isa", ""))
    about = f"{platform.node()} {platform.machine()} {isa}"
    return f"{hashlib.sha256(about.encode()).hexdigest()[:12]}-{thread_count(None)}"


def _some(users: Sequence[tuple[LinearLayer, Measured]]) -> list[tuple[LinearLayer, Measured]]:
    """The first layers, up to MOST_BYTES; one at least."""
    found: list[tuple[LinearLayer, Measured]] = []
    total = 0
    for layer, one in users:
        if found and total + one.nbytes > MOST_BYTES:
            break
        found.append((layer, one))
        total += one.nbytes
    return found


def _rate(curves: Curves, users: Sequence[tuple[LinearLayer, Measured]]) -> float:
    """Bytes of codes a second."""
    packed: list[PackedLinear] = [pack_code(curves.code(one)) for _, one in users]
    inputs = {n: torch.ones(1, n, device="cpu") for n in {layer.shape[1] for layer, _ in users}}
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for (layer, _), matrix in zip(users, packed, strict=True):
            matrix(inputs[layer.shape[1]], "int8")
        best = min(best, time.perf_counter() - begun)
    return sum(one.nbytes for _, one in users) / max(best, 1e-9)


def seconds_of(chosen: Mapping[str, int], seconds: Mapping[str, Sequence[float]]) -> float:
    """Of a choice, for one token."""
    return sum(seconds[name][place] for name, place in chosen.items())
