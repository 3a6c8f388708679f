#!/usr/bin/env python
"""Orders of blocks beside controls: which blocks can go to few bits first.

    python benchmarks/orders.py                          # the bundled model, three choices of text
    python benchmarks/orders.py --model FOLDER --calibration FILE --seeds 1

All blocks have 4 bits (groups of 64, swept), and one after the other goes to 2, least important first, by LIM, ZD,
random orders, the reverse of each, and the order of the true divergence that each block alone causes. Given is the
area: the mean divergence from the original over the numbers of coarse blocks, all put together from the same codes;
and the rank correlation of each order with the true one. The tokens are the last ones of the text: an eighth of all its
windows was kept from the codes, so with the defaults they have seen three quarters of them. The true order is taken on
the same tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

from featherweight.cli.demo import reference_model
from featherweight.methods.budget.importance import lim_of, zd_of
from featherweight.model.network.source import open_source
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.tasks.compress.plan import make_plan
from featherweight.tasks.fit import fitting
from featherweight.tasks.fit.settings import FitSettings
from featherweight.tasks.fit.study import Study
from featherweight.tasks.fit.ways import ROTATION, SWEEP, Way

RANDOM = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=reference_model())
    parser.add_argument("--calibration")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="on which divergences are taken")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        for name, area, correlation in one_seed(options, seed):
            found.setdefault(name, []).append((area, correlation))
    print("| order | mean KL over numbers of coarse blocks | rank correlation with the true order |\n|---|---|---|")
    for name, rows in found.items():
        print(f"| {name} | {shown([row[0] for row in rows], 4)} | {shown([row[1] for row in rows], 2)} |")


def shown(values: list[float], digits: int) -> str:
    """The mean, and its spread where there is one."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def ranks(scores: dict[int, float]) -> list[float]:
    """Of every block, its place in the order."""
    order = sorted(scores, key=lambda block: scores[block])
    return [float(order.index(block)) for block in sorted(scores)]


def one_seed(options: argparse.Namespace, seed: int) -> list[tuple[str, float, float]]:
    """Of one choice of text: each order's name, area, and correlation."""
    settings = FitSettings(windows=options.windows, length=512, tokens=options.tokens, seed=seed, score=0)
    grids = {bits: {"kind": "uniform", "bits": bits, "group_size": 64, "clip": "mse"} for bits in (2, 4)}
    ways = [Way(f"{bits} bits", tuple(ROTATION), grid, SWEEP) for bits, grid in grids.items()]
    with tempfile.TemporaryDirectory() as place, open_source(options.model) as checkpoint:
        folder, base = Path(place), fitting._base(checkpoint, settings)
        plan = make_plan(checkpoint, base)
        windows = fitting._windows(checkpoint, base, options.calibration, folder, lambda event: None)
        study = Study(
            options.model, checkpoint, plan, settings, windows, options.calibration, folder, lambda event: None
        )
        study.curves.measure(lambda layer: ways, lambda done, total: None)
        layers = [layer for layer in study.layers if layer.block is not None]
        blocks = range(plan.anatomy.blocks)
        codes = {x.name: [study.curves.code(one).decode() for one in study.curves.measured[x.name]] for x in layers}
        with study.network() as network:
            assert network is not None

            def divergence(coarse: set[int]) -> float:
                return network.divergence({x.name: codes[x.name][0 if x.block in coarse else 1] for x in layers})

            alone = {block: divergence({block}) for block in blocks}
            reads = {
                b: [(lambda x=x: LayerWeight(checkpoint, x).rows(0, x.shape[0])) for x in layers if x.block == b]
                for b in blocks
            }
            lim = dict(enumerate(lim_of(network.block_states())))
            zd = {block: -zd_of(reads[block]) for block in blocks}
            scores = {"true, each alone": alone, "LIM": lim, "ZD": zd}
            scores |= {f"{name}, reversed": {b: -s for b, s in scores[name].items()} for name in ("LIM", "ZD")}
            for number in range(RANDOM):
                draw = random.Random(1000 * seed + number)
                scores[f"random {number}"] = {block: draw.random() for block in blocks}
            rows = []
            for name, score in scores.items():
                order = sorted(blocks, key=lambda block, score=score: score[block])  # least important first
                area = statistics.mean(divergence(set(order[:n])) for n in range(1, len(blocks)))
                correlation = statistics.correlation(ranks(score), ranks(alone))
                rows.append((name, area, correlation))
    chance = [row for row in rows if row[0].startswith("random")]
    mean = [statistics.mean(row[i] for row in chance) for i in (1, 2)]  # type: ignore[misc]
    return [*(row for row in rows if row not in chance), (f"random (mean of {RANDOM})", mean[0], mean[1])]


if __name__ == "__main__":
    main()
