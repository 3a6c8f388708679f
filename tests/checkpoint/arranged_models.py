"""Tiny models with no parameter at its usual start, and what transformers computes of them with other tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featherweight.storage.checkpoint.anatomy.geometry import Geometry, read_geometry
from featherweight.storage.checkpoint.anatomy.residual import Residual, read_residual
from featherweight.storage.checkpoint.anatomy.units import Unit
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from models import FAMILIES, VOCABULARY, make_tiny

DECLARED = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe", "gemma", "gemma2", "gemma3"),
    *("phi", "phi3", "gpt2", "opt", "gpt-neox", "bert"),
]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "phi-norms": ("phi", {"qk_layernorm": True}),
}


class Made:
    """A tiny model with no parameter at its usual start, and what it computes with other tensors."""

    def __init__(self, name: str, folder: Path) -> None:
        import transformers

        self.family, overrides = VARIANTS.get(name, (name, {}))
        if not hasattr(transformers, FAMILIES[self.family][0]):
            pytest.skip(f"transformers {transformers.__version__} does not know {self.family}")
        self.folder = make_tiny(self.family, folder, torch.float32, **overrides)
        self.tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        for value in self.tensors.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})

    def geometry(self) -> Geometry:
        with Checkpoint.open(self.folder) as checkpoint:
            return read_geometry(checkpoint)

    def residual(self) -> Residual:
        with Checkpoint.open(self.folder) as checkpoint:
            return read_residual(checkpoint)

    def model(self, tensors: dict[str, Tensor], folder: Path, **config: Any) -> Any:
        import transformers

        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        stored = json.loads((self.folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stored | config))
        cls = getattr(transformers, FAMILIES[self.family][1])
        return cls.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

    def logits(self, tensors: dict[str, Tensor], folder: Path, **config: Any) -> Tensor:
        return logits_of(self.model(tensors, folder, **config))


def logits_of(model: Any) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


def under_another_name(one: Made, folder: Path) -> Path:
    """The same checkpoint, of a type for which there is no family file."""
    folder.mkdir(exist_ok=True)
    shutil.copy(one.folder / "model.safetensors", folder)
    config = json.loads((one.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    return folder


def shuffled(count: int, seed: int = 0) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1))


def by_owner(units: tuple[Unit, ...]) -> list[list[Unit]]:
    owners: dict[tuple[str, int | None], list[Unit]] = {}
    for unit in units:
        owners.setdefault((unit.owner, None if unit.kind == "expert" else unit.expert), []).append(unit)
    return list(owners.values())
