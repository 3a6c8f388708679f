"""The anatomy of a model without a family file: the same description, inferred from names and shapes.

Blocks are numbered lists of modules that hold matrices; a linear layer is a floating-point 2-D `weight` in one that is
no embedding, or a 3-D tensor of experts. Which norm feeds a layer cannot be told from names safely, so none is tied.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.family import Family, InputGroup
from featherweight.storage.checkpoint.anatomy.tensor_index import FLOATING, TensorIndex

NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # "01" is no number: it could not be told from "1"
BLOCK_LIST = re.compile(r"(^|\.)(layers?|h|blocks?|resblocks)$")
NOT_TEXT = re.compile(r"(vision|visual|image|audio|speech|video)", re.IGNORECASE)
EMBEDDING = re.compile(
    r"(embed|(^|[._])w[tp]e([._]|$)|(^|\.)shared$|relative_attention_bias|position_ids)", re.IGNORECASE
)
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|output_layer|head|decoder|generator|unembed\w*)$")
ROUTER = re.compile(r"(^|\.)(gate|router|wg|shared_expert_gate)(\.(classifier|layer|wg|gate))?$")
ATTENTION = re.compile(r"(attn|attention)", re.IGNORECASE)
MLP = re.compile(
    r"(mlp|ffn|feed_?forward|intermediate|dense_?relu|(^|\.)(output|fc\d|wi|wi_\d|wo|w[123]|gate|up|down)(_proj)?(\.|$))",
    re.IGNORECASE,
)
CROSS_ATTENTION = re.compile(r"(encdec|cross|encoder_attn)", re.IGNORECASE)
QUERIES = ("q_proj", "q", "query", "wq", "to_q", "q_lin", "q_a_proj", "query_proj", "W_q")
KEYS_VALUES = ("k_proj", "v_proj", "k", "v", "key", "value", "wk", "wv", "to_k", "to_v", "k_lin", "v_lin") + (
    "kv_a_proj_with_mqa", "kv_proj", "key_proj", "value_proj", "W_k", "W_v", "key_value",
)  # fmt: skip
DOWNS = ("down_proj", "down", "w2", "wo", "fc2", "c_proj", "o_proj", "out_proj", "o", "linear_out")
GATES_UPS = ("gate_proj", "up_proj", "w1", "w3", "gate", "up", "wi_0", "wi_1", "linear_v", "linear_1")
FUSED = (
    (re.compile(r"^(qkv|qkv_proj|query_key_value|Wqkv|wqkv|W_pack|in_proj_qkv|c_attn)$"), ("q", "k", "v")),
    (re.compile(r"^(gate_up_proj|gate_up)$"), ("gate", "up")),
)


def infer_family(checkpoint: TensorIndex) -> Family:
    """Describe the checkpoint as a family of its own; a CheckpointError if it has no repeated blocks with matrices."""
    lists = _block_lists(checkpoint)
    if not lists:
        raise no_structure(checkpoint)
    linears = _linears(checkpoint, lists)
    votes = {path: _is_transposed(checkpoint, tensors) for path, tensors in linears.items()}
    embeddings, head = _outside(checkpoint, lists)
    return Family(
        name="structure",
        blocks=tuple(lists),
        input_groups=_input_groups(checkpoint, linears, votes),
        embeddings=embeddings,
        head=head,
        declared=False,
    )


def no_structure(checkpoint: TensorIndex) -> CheckpointError:
    """The error for a model that neither a family file nor its structure explains."""
    architecture = checkpoint.config.get("architectures") or checkpoint.config.get("model_type") or "none named"
    return CheckpointError(
        f"the architecture of {checkpoint.folder} ({repr(architecture)[:200]}) is not known: there is no family file "
        "for it, and among its tensors no numbered list of blocks with two-dimensional floating-point weights "
        "(such as model.layers.0.self_attn.q_proj.weight) was found"
    )


def _block_lists(checkpoint: TensorIndex) -> dict[str, int]:
    """Prefixes of the numbered lists that hold most matrix elements, with their counts, the largest first."""
    elements: Counter[str] = Counter()
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.names:
        parts = name.split(".")
        position = next((i for i, part in enumerate(parts) if _is_number(part)), None)
        if position and _is_matrix(checkpoint, name):
            prefix = ".".join(parts[:position])
            elements[prefix] += checkpoint.entry(name).elements
            numbers.setdefault(prefix, set()).add(int(parts[position]))
    repeated = {p: n for p, n in elements.most_common() if len(numbers[p]) > 1 or BLOCK_LIST.search(p)}
    text = {prefix: count for prefix, count in repeated.items() if not NOT_TEXT.search(prefix)} or repeated
    return {prefix: count for prefix, count in text.items() if count >= 0.1 * max(text.values())}


def _is_number(part: str) -> bool:
    return NUMBER.fullmatch(part) is not None


def _is_matrix(checkpoint: TensorIndex, name: str) -> bool:
    entry = checkpoint.entry(name)
    if entry.dtype not in FLOATING or EMBEDDING.search(name.removesuffix(".weight")) or min(entry.shape, default=0) < 1:
        return False
    if len(entry.shape) == 3:
        return "expert" in name and min(entry.shape[1:]) > 1
    return len(entry.shape) == 2 and name.endswith(".weight")


def _linears(checkpoint: TensorIndex, lists: Iterable[str]) -> dict[str, list[str]]:
    """Paths within a block, experts' numbers replaced by "{expert}", with their tensors; in the order of the first."""
    found: dict[str, list[str]] = {}
    prefixes = tuple(f"{prefix}." for prefix in lists)
    for name in checkpoint.names:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None or not _is_matrix(checkpoint, name):
            continue
        number, _, path = name[len(prefix) :].removesuffix(".weight").partition(".")
        if _is_number(number) and path:
            found.setdefault(_with_expert(path), []).append(name)
    return dict(sorted(found.items(), key=lambda item: _model_order(item[0])))


def _with_expert(path: str) -> str:
    parts = path.split(".")
    for i in range(1, len(parts)):
        if _is_number(parts[i]) and "expert" in parts[i - 1].lower():
            parts[i] = "{expert}"
    return ".".join(parts)


def _model_order(path: str) -> tuple[int, int]:
    """Attention before the rest, q, k, v and gate, up before what follows them: files are often alphabetical."""
    last = path.rpartition(".")[2]
    ranked: Sequence[str] = (*QUERIES, *KEYS_VALUES, *GATES_UPS)
    rank = ranked.index(last) if last in ranked else len(ranked) + (last in DOWNS)
    return (0 if ATTENTION.search(path) else 1, rank)


def _is_transposed(checkpoint: TensorIndex, tensors: list[str]) -> bool | None:
    """Whether the bias, or the model's width for stacked experts, shows weights lie as [in, out]; None if neither."""
    tensor = tensors[0]
    rows, columns = checkpoint.entry(tensor).shape[-2:]
    if rows == columns:
        return None
    module = tensor.removesuffix(".weight")
    bias = next((name for name in (f"{module}.bias", f"{module}_bias") if name in checkpoint.names), None)
    if bias is not None:
        width = checkpoint.entry(bias).shape[-1:]
        return width == (columns,) if width in ((columns,), (rows,)) else None
    hidden = _text_value(checkpoint.config, "hidden_size")
    if len(checkpoint.entry(tensor).shape) == 3 and hidden in (rows, columns):
        reads_hidden = not re.search(r"(down|w2|output)", module.rpartition(".")[2])
        return (rows == hidden) if reads_hidden else (columns == hidden)
    return None


def _input_groups(
    checkpoint: TensorIndex, linears: dict[str, list[str]], votes: dict[str, bool | None]
) -> tuple[InputGroup, ...]:
    stacked = {path: len(checkpoint.entry(tensors[0]).shape) == 3 for path, tensors in linears.items()}
    groups: dict[tuple[str, str, bool, bool], dict[str, str]] = {}
    for path in linears:
        alike = [vote for other, vote in votes.items() if stacked[other] == stacked[path] and vote is not None]
        vote = votes[path]
        transposed = vote if vote is not None else bool(alike) and all(alike)  # a square one lies as the others do
        kind = _kind(path, stacked[path], linears, checkpoint)
        groups.setdefault((_input(path), kind, transposed, stacked[path]), {})[path] = path
    return tuple(
        InputGroup(
            linears=_roles(paths),
            input=owner,
            kind=kind,
            transposed=transposed,
            stacked=is_stacked,
            fused={role: parts for role, path in _roles(paths).items() if (parts := _fused(path))},
        )
        for (owner, kind, transposed, is_stacked), paths in groups.items()
    )


def _roles(paths: Iterable[str]) -> dict[str, str]:
    return {path.rpartition(".")[2]: path for path in paths}


def _fused(path: str) -> tuple[str, ...]:
    last = path.rpartition(".")[2]
    return next((parts for pattern, parts in FUSED if pattern.search(last)), ())


def _input(path: str) -> str:
    """An id for what a layer reads: one for q, k and v under the same parent, one for gate and up, else its own."""
    parent, _, last = path.rpartition(".")
    if last in QUERIES and not CROSS_ATTENTION.search(parent):
        return f"{parent}.qkv".lstrip(".")
    if last in KEYS_VALUES:
        return f"{parent}.{'kv' if CROSS_ATTENTION.search(parent) else 'qkv'}".lstrip(".")
    if last in GATES_UPS and not ROUTER.search(path):
        return f"{parent}.gate_up".lstrip(".")
    return path


def _kind(path: str, stacked: bool, linears: dict[str, list[str]], checkpoint: TensorIndex) -> str:
    has_experts = any("expert" in other for other in linears)
    rows = checkpoint.entry(linears[path][0]).shape[0]
    if has_experts and ROUTER.search(path) and "{expert}" not in path and rows < 1024 and not stacked:
        return "router"
    if stacked or "{expert}" in path:
        return "expert"
    if ATTENTION.search(path):
        return "attention"
    return "mlp" if MLP.search(path) else "other"


def _outside(checkpoint: TensorIndex, lists: Iterable[str]) -> tuple[tuple[str, ...], str | None]:
    """Embeddings, the token embedding first, and the head, of what lies outside the blocks."""
    prefixes = tuple(f"{prefix}." for prefix in lists)
    vocabulary = _text_value(checkpoint.config, "vocab_size")
    embeddings: list[tuple[bool, str]] = []
    head = None
    for name in checkpoint.names:
        entry, module = checkpoint.entry(name), name.removesuffix(".weight")
        if name.startswith(prefixes) or len(entry.shape) != 2 or module == name or entry.dtype not in FLOATING:
            continue
        if HEAD.search(module) and (vocabulary is None or entry.shape[0] == vocabulary):
            head = module
        elif EMBEDDING.search(module):
            embeddings.append((entry.shape[0] != vocabulary, module))
    return tuple(module for _, module in sorted(embeddings, key=lambda item: item[0])), head or "lm_head"


def _text_value(config: dict[str, Any], key: str) -> int | None:
    """An integer of config.json, or of its text_config for models of several modalities."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, dict) else {}):
        value = holder.get(key)
        if isinstance(value, int):
            return value
    return None
