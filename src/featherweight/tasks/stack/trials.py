"""What orders are made of: errors of layers with so many blocks, and losses of the true model; all of it kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.codes import code_layout, code_prefix
from featherweight.storage.codes.column_scaled import ColumnScaled
from featherweight.storage.run.store import Store
from featherweight.system.memory import available_bytes
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.fit.sensitivity import ROWS, Network, network_of

Told = Callable[[int, int], None]
TYPICAL_ERROR = 0.05
"""A layer's worth is taken with the number of blocks whose error is nearest to this."""
NEEDED = 3
"""Float matrices of all layers that are in memory at once: the original, those of a level, and what computes."""


@dataclass
class Trials:
    """One decomposed model beside its original.

    plan : of the original, with the layers that are decomposed
    source : the original; made : the folder with all blocks
    blocks : of each layer that has several
    windows : of text, token ids int64 [n, T], on which losses are taken; None: there are none to be taken
    """

    plan: Plan
    source: Checkpoint
    made: Checkpoint
    specs: Mapping[str, dict[str, Any]]
    blocks: Mapping[str, int]
    store: Store
    windows: Tensor | None
    settings: CalibrationSettings

    @cached_property
    def layers(self) -> dict[str, LinearLayer]:
        return {job.layer.name: job.layer for job in self.plan.jobs if job.layer.name in self.blocks}

    def nbytes(self) -> dict[str, list[int]]:
        """By layer, bytes with one block, two, ..."""
        return {
            name: [
                sum(entry.nbytes for entry in code_layout(code_prefix(self.specs[name], level + 1)[0]).values())
                for level in range(count)
            ]
            for name, count in self.blocks.items()
        }

    def errors(self, told: Told) -> dict[str, list[tuple[float, float]]]:
        """By layer and level: relative squared error of the weight as it was decomposed, columns scaled, which stands
        for that of the layer's output; and relative error of the weight itself."""
        found = {}
        for number, (name, layer) in enumerate(self.layers.items()):
            told(number, len(self.layers))
            record = self.store.record(f"errors-{name}")
            if record is None:
                record = {"errors": self._errors(layer)}
                self.store.keep(f"errors-{name}", {}, record)
            found[name] = [(float(one), float(other)) for one, other in record["errors"]]
        told(len(self.layers), len(self.layers))
        return found

    def _errors(self, layer: LinearLayer) -> list[tuple[float, float]]:
        source = LayerWeight(self.source, layer)
        weight = source.rows(0, source.shape[0]).double()
        code = load_code(self.made, layer.name)
        scales = (
            1 / code.column_scales.double()
            if isinstance(code, ColumnScaled)
            else torch.ones(1, dtype=torch.float64, device="cpu")
        )
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        whole = [float((weight * s).square().sum()) or 1.0 for s in (scales, one)]
        found = []
        for level in range(self.blocks[layer.name]):
            rest = weight - code.prefix(level + 1).decode().double()
            squares = [float((rest * s).square().sum()) / w for s, w in zip((scales, one), whole, strict=True)]
            found.append((squares[0], math.sqrt(squares[1])))
        return found

    def decoded(self, name: str, level: int) -> Tensor:
        return load_code(self.made, name, level).decode()

    @contextlib.contextmanager
    def network(self, what: str) -> Iterator[Network]:
        """The original in memory; FeatherError where there is no room for it, or it predicts no tokens."""
        assert self.windows is not None
        needed, free = NEEDED * 4 * self.plan.parameters, available_bytes()
        if free and needed > free:
            raise FeatherError(
                f"--order {what} runs the model, which does not fit into memory whole: take --order local, which needs "
                "one layer at a time"
            )
        names = {layer.name for layer in self.plan.anatomy.outside}
        outside = [name for name in self.layers if name in names]
        with network_of(self.source, self.plan.anatomy, self.windows, self.settings, outside) as found:
            if not found.whole.predicts:
                raise FeatherError(f"--order {what} needs a model that predicts tokens: take --order local")
            yield found

    def losses(self, told: Told) -> list[dict[str, float]]:
        """Of each level b, by layer: the model's mean negative log-likelihood where all layers have b blocks and this
        one alone has the next."""
        top = max(self.blocks.values())
        keys = {(b, n): f"loss-{b}-{n}" for b in range(1, top) for n, count in self.blocks.items() if count > b}
        known = {place: self.store.record(key) for place, key in keys.items()}
        if any(record is None for record in known.values()):
            with self.network("average") as network:
                self._measure(network, keys, known, told)
        found: list[dict[str, float]] = [{} for _ in range(1, top)]
        for (b, name), record in known.items():
            assert record is not None
            found[b - 1][name] = float(record["loss"])
        return found

    def _measure(
        self, network: Network, keys: dict[tuple[int, str], str], known: dict[tuple[int, str], Any], told: Told
    ) -> None:
        done = 0
        for b in sorted({b for b, _ in keys}):
            wanted = [n for level, n in keys if level == b]
            if all(known[b, n] is not None for n in wanted):
                done += len(wanted)
                continue
            base = {name: self.decoded(name, min(b, count)) for name, count in self.blocks.items()}
            with network.whole.overridden(base):
                for name in wanted:
                    told(done, len(keys))
                    done += 1
                    if known[b, name] is None:
                        with network.whole.overridden({name: self.decoded(name, b + 1)}):
                            known[b, name] = {"loss": loss_of(network)}
                        self.store.keep(keys[b, name], {}, known[b, name])
        told(len(keys), len(keys))

    def worths(self, errors: Mapping[str, list[tuple[float, float]]], told: Told) -> dict[str, float]:
        """By layer, divergence of the predictions for an error of one."""
        levels = {
            n: min(range(len(own)), key=lambda p, own=own: abs(own[p][0] - TYPICAL_ERROR))  # type: ignore[misc]
            for n, own in errors.items()
        }
        known = {name: self.store.record(f"worth-{name}") for name in errors}
        if any(record is None for record in known.values()):
            with self.network("knapsack") as network:
                for number, name in enumerate(errors):
                    told(number, len(errors))
                    if known[name] is None:
                        record = {"divergence": network.divergence({name: self.decoded(name, levels[name] + 1)})}
                        self.store.keep(f"worth-{name}", {}, record)
                        known[name] = record
                told(len(errors), len(errors))
        return {
            n: float(record["divergence"]) / max(errors[n][levels[n]][0], 1e-12)
            for n, record in known.items()
            if record is not None
        }


def loss_of(network: Network) -> float:
    """Mean negative log-likelihood of the network's windows, nats a token, as the network is now."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in network.windows:
            states, following = network.whole.hidden(ids.unsqueeze(0))[0], ids[1:]
            for first in range(0, len(following), ROWS):
                part = following[first : first + ROWS]
                logits = network.whole.head(states[first : first + len(part)]).float()
                total += float(torch.nn.functional.cross_entropy(logits, part.to(logits.device), reduction="sum"))
                count += len(part)
    return total / max(1, count)
