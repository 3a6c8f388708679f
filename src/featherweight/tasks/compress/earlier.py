"""What a source that is compressed already had lost before, for the manifest and the model card of what is made of it.

The error of a layer is that against the source as it decodes. With the source's own, e1, and this one, e2, a layer lies
within e1 + e2 (1 + e1) of the weights that the source was made from, relative to their norm: the triangle inequality.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.decoded import DecodedCheckpoint
from featherweight.storage.run.ownership import MANIFEST
from featherweight.system.files import read_object


def earlier_loss(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What is known of a compressed source; None for one of plain weights.

    Returns
    -------
    dict or None
        `recipe` (its name), `origin` (what an importer read it from, or empty), `bits_per_weight`, `bytes`,
        `relative_errors` (by layer, as far as its manifest has them), and `source`, the same of its own source.
    """
    if not isinstance(checkpoint, DecodedCheckpoint) or not checkpoint.compressed:
        return None
    manifest = read_object(checkpoint.folder / MANIFEST)
    before = manifest.get("source")
    return {
        "recipe": str(checkpoint.recipe.get("name", "")),
        "origin": checkpoint.origin,
        "bits_per_weight": checkpoint.bits_per_weight,
        "bytes": checkpoint.total_bytes,
        "relative_errors": _errors(manifest.get("layers")),
        **({"source": before} if isinstance(before, dict) else {}),
    }


def earlier_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Sentences that say that a source is compressed already; none for one of plain weights."""
    return checkpoint.said if isinstance(checkpoint, DecodedCheckpoint) else ()


def _errors(records: Any) -> dict[str, float]:
    found = records if isinstance(records, list) else []
    whole = [record for record in found if isinstance(record, dict)]
    return {
        str(record["name"]): float(record["relative_error"])
        for record in whole
        if "name" in record and isinstance(record.get("relative_error"), int | float)
    }


def kept_codes(names: Iterable[str], checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Module -> spec of the codes that tensors are copied with."""
    return {module: spec for name in names for module, spec in checkpoint.codes_of(name).items()}


def decoded_texts(changed: Iterable[str], checkpoint: Checkpoint) -> list[str]:
    """A sentence for each changed tensor that was coded and that the recipe leaves as it is: it becomes plain."""
    return [
        f"{name} was coded, and calibration changes its values: it is stored as plain {checkpoint.plain_dtype(name)}"
        for name in changed
        if checkpoint.codes_of(name)
    ]


def most_error(manifest: Mapping[str, Any]) -> tuple[float, str] | None:
    """The largest error that any layer can have against what its source was made from, by what both runs measured, and
    that layer's name; None where the source is plain or its errors are not known."""
    source = manifest.get("source")
    earlier = source.get("relative_errors", {}) if isinstance(source, dict) else {}
    bounds = []
    for record in manifest["layers"]:
        before = earlier.get(record["name"])
        if before is not None:
            bounds.append((before + record["relative_error"] * (1 + before), str(record["name"])))
    return max(bounds, default=None)


def earlier_text(manifest: Mapping[str, Any]) -> str:
    """What the source was, in a few words: "compressed before (recipe trit-2, 3.45 bits a weight)"; empty where it was
    plain."""
    source = manifest.get("source")
    if not isinstance(source, dict):
        return ""
    what = f"imported from {source['origin']}" if source.get("origin") else f"recipe {source.get('recipe')}"
    bits = source.get("bits_per_weight")
    return f"compressed before ({what}{f', {bits:.2f} bits a weight' if isinstance(bits, float) else ''})"
