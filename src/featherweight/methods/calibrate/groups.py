"""Which layers of a block are gathered together: those that share an input, and in one pass those of all experts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

from featherweight.storage.checkpoint.anatomy import LinearLayer

EXPERT_NUMBER = re.compile(r"\.\d+$")


def groups_of(layers: Iterable[LinearLayer]) -> list[list[str]]:
    """Names of layers by the input they share."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.input_group, []).append(layer.name)
    return list(groups.values())


def stages_of(groups: list[list[str]], layers: Mapping[str, LinearLayer]) -> list[list[str]]:
    """Consecutive groups that differ only in the expert are one stage."""

    def key(group: list[str]) -> str:
        layer = layers[group[0]]
        return layer.input_group if layer.expert is None else EXPERT_NUMBER.sub("", layer.input_group)

    return [list(itertools.chain.from_iterable(part)) for _, part in itertools.groupby(groups, key)]
