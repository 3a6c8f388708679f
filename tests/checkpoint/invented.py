"""Checkpoints of invented names and shapes, some of which look like a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

PARTS = st.sampled_from(
    [
        "model",
        "layers",
        "h",
        "0",
        "1",
        "01",
        "2",
        "mlp",
        "experts",
        "gate",
        "up_proj",
        "q_proj",
        "norm",
        "weight",
        "bias",
    ]
    + ["", "embed_tokens", "lm_head", "gate_up_proj", "gate_up_proj_bias", "self_attn", "²", "९"]
)
GOOD = [f"model.layers.{i}.{path}.weight" for i in (0, 1) for path in ("self_attn.q_proj", "mlp.experts.1.up_proj")]
NAMES = (
    st.sampled_from(GOOD)
    | st.lists(PARTS, min_size=1, max_size=7).map(".".join)
    | st.builds(
        "model.layers.{}.{}.{}".format,
        st.integers(0, 2),
        PARTS,
        st.sampled_from(["weight", "q_proj.weight", "gate_up_proj"]),
    )
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4) | st.lists(st.sampled_from([2, 3]), min_size=2, max_size=3)


def write_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "architectures": ["StrangeNet"]} | config))
    return folder
