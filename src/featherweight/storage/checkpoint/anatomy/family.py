"""Family files: a few declarative lines that say where a family of models keeps what.

family: llama
model_types: [llama]                  # config.json's model_type; else one of `architectures`
architectures: [LlamaForCausalLM]
base: [model, ""]                     # prefixes of everything but the head, the first that exists
blocks: layers                        # the numbered list, under the base
embeddings: [embed_tokens]            # under the base, the token embedding first
head: lm_head                         # absolute
head_norm: norm                       # the norm whose output the head reads, under the base
post_norm_when: {key: value}          # config values with which norms follow their layers and feed none alone
input_groups:                         # linear layers that read the same input, in model order
  - input: attention                  # id of the input; two groups may share one
    kind: attention                   # attention, mlp, expert, router, other
    norm: input_layernorm             # the norm that feeds it, or several names of which the first present counts
    producer: self_attn.v_proj        # the layer whose outputs enter this group's input linearly (see LinearLayer)
    linears: [self_attn.q_proj]       # paths in the block, "{expert}" for a number; or a mapping role: path
    transposed: true                  # stored as [in, out]
    stacked: true                     # 3-D, experts in the leading dimension
    fused: {qkv_proj: [q_proj, k_proj, v_proj]}
    interleaved: true                 # the fused parts lie head by head (neuron by neuron), not one behind the other
    post: post_attention_layernorm    # a norm between these layers and the residual stream, unless it feeds others
    convolution: true                 # stored as [out, in / groups, *kernel]
readers: [pooler.dense]               # layers outside the blocks that read the residual stream, or write it;
writers: [project_in]                 #   under the base, or absolute
norm_offset: 1                        # what norms add to their stored weights
whole:                                # all tensors of an ordinary checkpoint, so that transformers need not be asked
  architectures: [LlamaForCausalLM]   # classes that have exactly these
  unless: [attention_bias]            # not where config.json sets one of these
  needs: [head_dim]                   # nor where it leaves one of these to the class
  blocks: model.layers
  outside: {model.norm.weight: [hidden]}        # sizes: see storage/checkpoint/accounting.py
  head: {lm_head.weight: [vocabulary, hidden]}  # where it is not tied
  block: {input_layernorm.weight: [hidden]}
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "families"


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that read the same input; `linears` maps role to path."""

    linears: dict[str, str]
    input: str
    kind: str
    norm: tuple[str, ...] = ()
    producer: str | None = None
    transposed: bool = False
    stacked: bool = False
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False
    post: tuple[str, ...] = ()
    convolution: bool = False


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its tensors; see the module's docstring. `blocks` may be several lists."""

    name: str
    blocks: tuple[str, ...]
    input_groups: tuple[InputGroup, ...]
    embeddings: tuple[str, ...]
    head: str | None
    head_norm: str | None = None
    base: tuple[str, ...] = ("",)
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    tied_by_default: bool = False
    post_norm_when: dict[str, Any] = field(default_factory=dict)
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    norm_offset: float = 0.0
    whole: dict[str, Any] | None = None
    declared: bool = True

    def find_base(self, names: Set[str]) -> str | None:
        """The first of `base` under which there are blocks; None if there are none."""
        for base in self.base:
            prefix = f"{base}.{self.blocks[0]}.0." if base else f"{self.blocks[0]}.0."
            if any(name.startswith(prefix) for name in names):
                return base
        return None


def find_family(config: dict[str, Any]) -> Family | None:
    """The declared family of a config.json: by model_type, else by architectures; None if there is none."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    families = declared_families()
    for family in families:
        if model_type in family.model_types:
            return family
    if model_type is None and isinstance(architectures, list):
        return next((family for family in families if set(family.architectures) & set(map(str, architectures))), None)
    return None


@cache
def declared_families() -> tuple[Family, ...]:
    """All family files, by name."""
    return tuple(read_family(path) for path in sorted(FOLDER.glob("*.yaml")))


def read_family(path: Path) -> Family:
    """Read one family file. A key that is not known raises TypeError: the files are part of the package."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = tuple(_read_group(group) for group in values.pop("input_groups"))
    for key in ("base", "blocks", "embeddings", "model_types", "architectures", "readers", "writers"):
        values[key] = _texts(values.pop(key, ()))
    return Family(name=values.pop("family"), input_groups=groups, **values)


def _read_group(values: dict[str, Any]) -> InputGroup:
    linears = values.pop("linears")
    if isinstance(linears, list):
        linears = {path.rpartition(".")[2]: path for path in linears}
    fused = {role: tuple(parts) for role, parts in values.pop("fused", {}).items()}
    norm, post = (_texts(values.pop(key, ())) for key in ("norm", "post"))
    return InputGroup(linears=linears, norm=norm, fused=fused, post=post, **values)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
