"""What a folder holds, compressed or not: the account behind `feather inspect`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, shown
from featherweight.storage.checkpoint.accounting import architecture_of
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer, read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import METHOD, module_layout, module_specs
from featherweight.storage.checkpoint.size import OriginalView
from featherweight.storage.codes import describe_code
from featherweight.tasks.compress.assemble import read_manifest


def inspect_folder(model: str | Path) -> dict[str, Any]:
    """Architecture, sizes, and per linear layer: shape, code, bits, relative error where a manifest records it."""
    with Checkpoint.open(model) as checkpoint:
        config = checkpoint.quantization_config or {}
        if config and config.get("quant_method") != METHOD:
            raise CheckpointError(
                f"{checkpoint.folder} is quantised by another tool ({shown(config.get('quant_method'))}); "
                "featherweight reads its own folders and unquantised ones"
            )
        specs = module_specs(config) if config else {}
        manifest = read_manifest(checkpoint.folder) or {}
        report: dict[str, Any] = {
            "architecture": architecture_of(checkpoint.config) or str(checkpoint.config.get("model_type")),
            "recipe": config.get("recipe"),
            "format_version": config.get("format_version"),
            "files": len(checkpoint.files),
            "tensors": len(checkpoint.names),
            "bytes": checkpoint.total_bytes,
        }
        if isinstance(manifest.get("source"), dict):
            report["source"] = manifest["source"]
        if specs:
            return report | _compressed(checkpoint, specs, manifest)
        report |= {"recipe": manifest.get("recipe"), "format_version": manifest.get("format_version")}  # a plain output
        return report | _original(checkpoint, read_anatomy(checkpoint), _errors_in(checkpoint, manifest))


def _compressed(checkpoint: Checkpoint, specs: dict[str, dict[str, Any]], manifest: dict[str, Any]) -> dict[str, Any]:
    try:
        errors = _errors_in(checkpoint, manifest)
        blocks = {record["block"] for record in manifest.get("layers", [])} - {None}
        layouts = {name: module_layout(name, spec) for name, spec in specs.items()}
        described = {name: describe_code(spec) for name, spec in specs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json or featherweight.json is malformed ({error})"
        ) from None
    stored = {f"{name}.{tensor}" for name, layout in layouts.items() for tensor in layout}
    layers = []
    for name, spec in specs.items():
        weights = math.prod(spec["shape"])
        nbytes = sum(tensor.nbytes for tensor in layouts[name].values())
        layers.append(
            {
                "name": name,
                "shape": spec["shape"],
                "code": described[name],
                "spec": spec,
                "bits_per_weight": 8 * nbytes / weights,
                "nbytes": nbytes,
                "relative_error": errors.get(name),
            }
        )
    weights = sum(math.prod(spec["shape"]) for spec in specs.values())
    view = OriginalView(checkpoint)
    anatomy = view.anatomy()
    linear = {layer.tensor for layer in anatomy.layers} if anatomy else set(view.compressed)
    linear_bits = 8 * sum(map(view.stored_bytes, linear)) / max(1, sum(view.entry(name).elements for name in linear))
    others = sum(checkpoint.entry(name).elements for name in checkpoint.names if name not in stored)
    parameters = manifest.get("parameters", weights + others)
    return {
        "family": manifest.get("family", anatomy.family if anatomy else "unknown family"),
        "blocks": len(blocks) or (anatomy.blocks if anatomy else 0),
        "parameters": parameters,
        "bits_per_weight": {
            "linear": manifest.get("bits_per_weight_linear", linear_bits),
            "model": 8 * checkpoint.total_bytes / parameters,
        },
        "tied": [["lm_head", "embedding"]] if checkpoint.config.get("tie_word_embeddings") else [],
        "layers": layers,
    }


def _errors_in(checkpoint: Checkpoint, manifest: dict[str, Any]) -> dict[str, float]:
    """Layer -> relative error as the manifest has them; CheckpointError where it is malformed."""
    try:
        return {record["name"]: record["relative_error"] for record in manifest.get("layers", [])}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: featherweight.json is malformed ({error})") from None


def _original(checkpoint: Checkpoint, anatomy: Anatomy, errors: dict[str, float]) -> dict[str, Any]:
    def row(layer: LinearLayer) -> dict[str, Any]:
        entry = checkpoint.entry(layer.tensor)
        bits = 8 * entry.nbytes / max(1, entry.elements)
        return {
            "name": layer.name,
            "shape": list(layer.shape),
            "code": f"dense {str(entry.torch_dtype).removeprefix('torch.')}",
            "bits_per_weight": bits,
            "nbytes": int(layer.parameters * bits / 8),
            "relative_error": errors.get(layer.name),
            "role": layer.role,
            "kind": layer.kind,
            "input_group": layer.input_group,
            "norm": layer.norm,
        }

    layers = [row(layer) for layer in (*anatomy.layers, *anatomy.outside)]
    linear = {layer.tensor for layer in anatomy.layers}
    linear_bytes = sum(checkpoint.entry(name).nbytes for name in linear)
    linear_weights = sum(checkpoint.entry(name).elements for name in linear)
    return {
        "family": anatomy.family,
        "blocks": anatomy.blocks,
        "parameters": checkpoint.parameters,
        "bits_per_weight": {
            "linear": 8 * linear_bytes / max(1, linear_weights),
            "model": 8 * checkpoint.total_bytes / max(1, checkpoint.parameters),
        },
        "tied": [list(pair) for pair in anatomy.tied],
        "layers": layers,
    }
