"""A model with low-bit layers as a folder of codes, like those that `compress` makes."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from featherweight.errors import FeatherError, OutputError
from featherweight.methods.train.attention import low_bit_attentions
from featherweight.methods.train.layer import LowBitLinear
from featherweight.methods.train.prepare import check_exportable, low_bit_layers
from featherweight.methods.train.recipe import TrainRecipe, train_recipe
from featherweight.model.layers.replace import packed_layer, put_in_place
from featherweight.model.text.tokenizer import FILES as TOKENIZER_FILES
from featherweight.storage.checkpoint.format import FORMAT_VERSION
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import Blob, write_safetensors
from featherweight.storage.codes import Code, describe_code
from featherweight.storage.run.card import model_card, plain_card
from featherweight.storage.run.folder import RunFolder
from featherweight.storage.run.ownership import MANIFEST, RECORD, first_foreign
from featherweight.storage.run.publishing import occupants
from featherweight.storage.run.record import compression_record
from featherweight.system.files import disk_errors, read_object, to_json, write_text
from featherweight.system.machine import now_text
from featherweight.system.transformers_calls import asking_transformers
from featherweight.version import __version__

COPIED = (*TOKENIZER_FILES, "chat_template*")


@dataclass(frozen=True)
class Exported:
    """What was written.

    out : the folder
    bytes : of all tensors
    bits_per_weight : stored bits of the low-bit layers, biases and low-rank terms counted, a weight; 32 without any
    layers : a record of each
    """

    out: Path
    bytes: int
    bits_per_weight: float
    layers: list[dict[str, Any]]


def export(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Any = None,
    recipe: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model that was trained with low-bit layers as a folder that `featherweight.load` and the decoder read.

    Parameters
    ----------
    model : torch.nn.Module
        Of transformers, with layers that `prepare` has made; it is not changed, and may be trained further.
    out : str or Path
        Folder to make. It appears complete or not at all.
    tokenizer : PreTrainedTokenizer, str or Path, optional
        Saved beside the weights; or a folder whose tokenizer files are copied.
    recipe : str, Path, mapping or TrainRecipe, optional
        What it was trained by, for the record.
    overwrite : bool
        Replace an existing output of featherweight's.

    Returns
    -------
    Exported

    Raises
    ------
    FeatherError
        The model is none of transformers, or has layers that no folder can hold.
    OutputError
        OUT exists already, or cannot be written.
    """
    out = Path(out).expanduser().absolute()
    held = occupants(out) if out.is_dir() else []
    foreign = first_foreign(out, held) if held else None
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{out} is a file; choose a folder")
    if foreign is not None or (held and not overwrite):
        what = f"holds {foreign.name}, which featherweight did not write" if foreign else "is an output already"
        raise OutputError(f"{out} {what}; choose another folder{'' if foreign else ', or overwrite=True'}")
    chosen = None if recipe is None else train_recipe(recipe)
    identity = {"exported": True}
    with RunFolder.opened(out, identity, overwrite) as run:
        with disk_errors(run.assembled):
            shutil.rmtree(run.assembled)  # of an attempt that was killed
            run.assembled.mkdir()
        written = write_folder(model, run.assembled, chosen, tokenizer, identity)
        run.publish()
    return Exported(out, written.bytes, written.bits_per_weight, written.layers)


def write_folder(
    model: Any,
    folder: Path,
    recipe: TrainRecipe | None,
    tokenizer: Any,
    identity: dict[str, Any],
    facts: dict[str, Any] | None = None,
) -> Exported:
    """Weights, config, manifest, card and record into an empty folder that exists; see `export`.

    identity : of the work, for the manifest
    facts : of the training, for the record
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise FeatherError(f"{type(model).__name__} is no model of transformers, so it has no folder to be saved as")
    layers = low_bit_layers(model)
    for layer in layers.values():
        if layer.choices.activation.unstorable:
            raise FeatherError(f"{layer.name}: {layer.choices.activation.unstorable}")
    for name in low_bit_attentions(model):
        raise FeatherError(f"the attention {name} rounds what no folder says: train without attention.* to store it")
    if recipe is not None:
        check_exportable(recipe)
    codes = {name: layer.code() for name, layer in layers.items()}
    records = [_record(name, layers[name], code) for name, code in codes.items()]
    dumped = {"name": "trained", "paper": ""} if recipe is None else recipe.dump()
    with _as_codes(model, layers, codes, dumped), asking_transformers(f"save the model to {folder}", error=OutputError):
        model.save_pretrained(folder, max_shard_size="4GB")
    for path in sorted(folder.glob("*.safetensors")):
        _rewrite(path, coded=bool(codes))
    _save_tokenizer(tokenizer, folder)
    manifest = _manifest(model, folder, records, dumped, identity)
    config = read_object(folder / "config.json")
    card = model_card(manifest, config) if records else plain_card(manifest, config, "all trained")
    write_text(folder / "README.md", card)
    made = {"featherweight": __version__, "recipe": dumped["name"], "source": "a training", "finished": now_text()}
    write_text(folder / RECORD, compression_record(made | (facts or {})))
    manifest["files"] = sorted({path.name for path in folder.iterdir()} | {MANIFEST})
    write_text(folder / MANIFEST, to_json(manifest))
    return Exported(folder, manifest["bytes"], manifest["bits_per_weight"], records)


def _record(name: str, layer: LowBitLinear, code: Code) -> dict[str, Any]:
    """What is known of a layer; the error is that of rounding its latents."""
    weight = layer.weight.detach().double().cpu()
    missed = (weight - code.decode().double()).square().sum() / weight.square().sum().clamp(min=1e-300)
    bias = layer.stored_bias() if layer.bias is None else None
    nbytes = code.nbytes + (0 if bias is None else bias.numel() * bias.element_size())
    block = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return {
        "name": name,
        "role": name.rpartition(".")[2],
        "block": block,
        "code": describe_code({**code.spec, "shape": list(code.shape)}),
        "spec": {**code.spec, **({} if bias is None else {"bias": True})},
        "bits_per_weight": 8 * nbytes / math.prod(code.shape),
        "nbytes": nbytes,
        "relative_error": float(missed.sqrt()),
    }


@contextlib.contextmanager
def _as_codes(
    model: Any, layers: dict[str, LowBitLinear], codes: dict[str, Code], recipe: dict[str, Any]
) -> Iterator[None]:
    """Within, the model's low-bit layers are compressed ones, and it is marked as such."""
    if not codes:
        yield
        return
    from featherweight.integrations.transformers import mark_compressed

    placed: dict[nn.Module, nn.Module] = {}
    specs = {}
    for name, code in codes.items():
        layer, bias = layers[name], layers[name].stored_bias()
        made = packed_layer(layer, code, name)
        made._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
        placed[layer] = made
        given: dict[str, Any] = {"bias": True} if bias is not None and layer.bias is None else {}
        specs[name] = {**code.spec, "shape": list(code.shape), **given}
    marks = ("hf_quantizer", "quantization_method")
    before = {mark: model.__dict__[mark] for mark in marks if mark in model.__dict__}
    put_in_place(model, placed)
    try:
        mark_compressed(model, specs, recipe)
        yield
    finally:
        put_in_place(model, {made: layer for layer, made in placed.items()})
        for mark in marks:
            model.__dict__.pop(mark, None)
        model.__dict__.update(before)
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config


def _rewrite(path: Path, coded: bool) -> None:
    """A file of safetensors in our order of tensors, so that equal values are equal bytes, and with their hashes."""
    other = path.with_name(path.name + ".ordered")
    with SafetensorsFile.open(path) as file:
        blobs = [
            Blob(name, e.dtype, e.shape, e.nbytes, partial(file.raw_windows, name)) for name, e in file.entries.items()
        ]
        write_safetensors(other, blobs, {}, coded=coded)
    with disk_errors(path):
        os.replace(other, path)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | Path):
        with disk_errors(folder):
            for pattern in COPIED:
                for path in sorted(Path(tokenizer).glob(pattern)):
                    if path.is_file():
                        shutil.copyfile(path, folder / path.name)
        return
    with asking_transformers(f"save the tokenizer to {folder}", error=OutputError):
        tokenizer.save_pretrained(folder)


def _manifest(
    model: nn.Module, folder: Path, records: list[dict[str, Any]], recipe: dict[str, Any], identity: dict[str, Any]
) -> dict[str, Any]:
    """What was made, layer by layer; free of times and paths."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsFile.open(path) as file:
            total += sum(entry.nbytes for entry in file.entries.values())
    layers = low_bit_layers(model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    code_bytes = sum(record["nbytes"] for record in records)
    own = {id(p) for layer in layers.values() for n, p in layer.named_parameters(recurse=False) if n != "weight"}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in own)
    bits = 8 * code_bytes / weights if weights else 8 * total / max(1, parameters)
    return {
        "format_version": FORMAT_VERSION,
        "featherweight": __version__,
        "identity": identity,
        "recipe": recipe,
        "family": str(getattr(getattr(model, "config", None), "model_type", "")),
        "parameters": parameters,
        "weights": weights,
        "linear_weights": weights,
        "bits_per_weight": bits,
        "bits_per_weight_linear": bits,
        "bits_per_weight_model": 8 * total / max(1, parameters),
        "bytes": total,
        "tensors": {"source": 0, "replaced": len(records), "copied": 0, "dropped": {}},
        "layers": records,
    }
