"""What the calibration tests share: tiny checkpoints, and inputs of layers found by hooks on the whole model."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from models import FAMILIES, VOCABULARY, make_tiny

SMALL = CalibrationSettings(batch_tokens=48, starved_tokens=0, starved_floor=1)


def ids(sequences: int = 6, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def folder(family: str, **overrides: Any) -> Path:
    return make_tiny(family, Path(tempfile.mkdtemp()) / family, torch.float32, **overrides)


def opened(
    family: str, settings: CalibrationSettings = SMALL, needs: Any = ("gram",), path: Path | None = None, **rest: Any
) -> Calibration:
    checkpoint = Checkpoint.open(path or folder(family))
    windows = rest.pop("windows", None)
    windows = ids() if windows is None else windows
    return Calibration.open(checkpoint, read_anatomy(checkpoint), windows, settings, needs, **rest)


def whole(family: str, path: Path | None = None) -> Any:
    """The model, loaded by transformers itself."""
    import transformers

    loaded = getattr(transformers, FAMILIES[family][1]).from_pretrained(
        path or folder(family), attn_implementation="eager"
    )
    if hasattr(loaded.config, "_experts_implementation"):
        loaded.config._experts_implementation = "eager"
    return loaded.float().eval()


def layer_inputs(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Rows [n, in] that went into every linear layer, and into every slice of a 3-D expert parameter."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].detach().reshape(-1, args[0].shape[-1]))

    hooks = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__.endswith(("Conv1D", "Router"))
    ]
    with _expert_loops(model, seen), torch.no_grad():
        model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return seen


@contextmanager
def _expert_loops(model: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """Replace fused experts (gate and up concatenated) by a plain loop that notes inputs and tokens."""
    replaced = []
    for path, module in model.named_modules():
        if path.endswith("experts") and isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):

            def loop(hidden: Tensor, index: Tensor, weights: Tensor, module: Any = module, path: str = path) -> Tensor:
                out = torch.zeros_like(hidden)
                for expert in range(len(module.gate_up_proj)):
                    token, choice = (index == expert).nonzero(as_tuple=True)
                    gate, up = (hidden[token] @ module.gate_up_proj[expert].T).chunk(2, -1)
                    inner = module.act_fn(gate) * up
                    seen[f"{path}.{expert}.first"], seen[f"{path}.{expert}.second"] = hidden[token], inner
                    seen[f"{path}.{expert}.tokens"] = token
                    out.index_add_(0, token, (inner @ module.down_proj[expert].T) * weights[token, choice, None])
                return out

            module.__dict__["forward"] = loop
            replaced.append(module)
    yield
    for module in replaced:
        del module.__dict__["forward"]


def reference_name(name: str, seen: dict[str, Tensor]) -> str:
    """The key in `layer_inputs` for a layer of the anatomy."""
    for renamed in (name, name.replace("block_sparse_moe", "mlp"), name.replace("embed_out", "lm_head")):
        if renamed in seen:
            return renamed
    name = name.replace("block_sparse_moe", "mlp")
    path, _, leaf = name.rpartition(".")
    return f"{path}.{'second' if leaf in ('w2', 'down_proj') else 'first'}"


def gram(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    rows = rows.double()
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double().reshape(-1)
    return ((rows * weights[:, None]).T @ rows / weights.sum()).float()


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> bool:
    """Equal to a share of the largest value."""
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-12))
