"""Subset fidelity (ModHiFi, arXiv 2511.19566): how much of a layer's output a tenth of its inputs can carry.

    FS(C) = max over weights on C of 1 - E|Y - Y_C|^2 / E|Y|^2;   s_l = (1 - FS(C)) * its share of all weights

C the tenth of the inputs with the largest |W_:,i|^2 G_ii, refitted by least squares under the second moment G of the
inputs. A layer whose output few inputs carry has less to lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.tasks.fit.measures.base import Asked, Measure, register

SHARE = 0.1
DAMPING = 1e-4
"""Relative to the mean of G's diagonal."""


@register("sensitivity", "fidelity")
class Fidelity(Measure):
    """Share of the output that few inputs cannot carry (see the module)."""

    title = "what a tenth of its inputs cannot carry (subset fidelity)"
    passes = "none beside those of the second moments"
    needs_network = False

    @classmethod
    def worths(cls, asked: Asked) -> dict[str, float]:
        total = sum(layer.parameters for layer in asked.layers)
        assert asked.curves.statistics is not None
        found = {}
        with StatisticsFile.open(asked.curves.statistics, asked.checkpoint) as file:
            for number, layer in enumerate(asked.layers):
                asked.told(number, len(asked.layers))
                gram = file.statistics(layer.name).get("gram")
                weight = asked.weight(layer)
                missed = (
                    1.0 if gram is None else 1 - subset_fidelity(weight, gram, max(1, round(SHARE * layer.shape[1])))
                )
                found[layer.name] = missed * layer.parameters / total
        asked.told(len(asked.layers), len(asked.layers))
        return found


def subset_fidelity(weight: Tensor, gram: Tensor, count: int) -> float:
    """Of the `count` inputs of largest single scores, refitted; in [0, 1].

    weight : [out, in]; gram : second moment of the inputs [in, in]
    """
    w, g = weight.double(), gram.double()
    kept = (w.square().sum(0) * g.diagonal()).argsort(descending=True, stable=True)[:count]
    inner = g[kept][:, kept] + DAMPING * g.diagonal().mean() * torch.eye(count, dtype=torch.float64, device=g.device)
    cross = w @ g[:, kept]
    carried = float((torch.linalg.solve(inner, cross.T).T * cross).sum())
    whole = float(((w @ g) * w).sum())
    return min(1.0, max(0.0, carried / whole)) if whole > 0 else 1.0
