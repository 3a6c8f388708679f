"""The model that quality_vs_peers.py gives to all tools: its files, its sizes, the statistics some of them ask for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def mean_squares(model: Any, windows: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """float32 [in] by weight name: the mean square of every input column of the linear layers inside the blocks."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].square().flatten(0, -2).sum(0).double()

        return add

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    hooks = [module.register_forward_pre_hook(watch(f"{name}.weight")) for name, module in layers.items()]
    try:
        with torch.inference_mode():
            for first in range(0, len(windows), batch):
                model.model(input_ids=windows[first : first + batch], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


class Remembered(torch.nn.Module):
    """A causal language model that remembers by input what its output layer is given: run once for all rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.known: dict[bytes, Tensor] = {}

    def get_output_embeddings(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.get_output_embeddings()
        return head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.get_output_embeddings()(self.known[key]))


def copy_side_files(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (model / name).is_file():
            shutil.copy(model / name, folder / name)
    config = json.loads((model / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True)
class Original:
    """What the original's own file spends on embedding and output layer and on all else outside the blocks' linear
    layers, in bytes; whether its weights lie on a grid of 4 bits in groups of 32 columns, as far as can be seen."""

    embedding_bytes: int
    embedding_weights: int
    kept_bytes: int
    four_bit_grid: bool


def write_original(model: Path, folder: Path) -> Original:
    """The model as a float32 folder, which every peer can read. A tied output layer is not stored twice."""
    copy_side_files(model, folder)
    tensors = {n: t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}
    if json.loads((model / "config.json").read_text()).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    dense = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    linears = [name for name in tensors if ".layers." in name and name.endswith("_proj.weight")]
    embeddings = [tensors[name] for name in EMBEDDINGS if name in tensors]
    return Original(
        sum(tensor.nbytes for tensor in embeddings),
        sum(tensor.numel() for tensor in embeddings),
        sum(tensor.nbytes for name, tensor in tensors.items() if name not in linears),
        all(levels(dense[name]) <= 16 for name in linears),
    )


def levels(weight: Tensor, group: int = 32) -> int:
    """Distinct values that a group of so many columns has at most; all columns for widths that groups do not divide."""
    if weight.shape[1] % group:
        return weight.shape[1]
    ordered = weight.reshape(-1, group).sort(dim=1).values
    return 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max())
