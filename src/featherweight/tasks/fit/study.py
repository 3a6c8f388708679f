"""What is known of one model before its bytes are given out: curves, worths, and the choice for a budget, all kept."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.events import Observer
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.registry import find
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.run.store import Store
from featherweight.system.files import read_object, sha256_of, to_json, write_text
from featherweight.system.memory import available_bytes
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.plan import Plan
from featherweight.tasks.fit.checking import LinearModel, check_linear
from featherweight.tasks.fit.choosing import Problem, check_budget, groups_of
from featherweight.tasks.fit.curves import Curves, Measured
from featherweight.tasks.fit.measures.base import Asked, Measure
from featherweight.tasks.fit.rates import layer_seconds
from featherweight.tasks.fit.refining import Assembled, Refined, refine
from featherweight.tasks.fit.sensitivity import Network, network_of
from featherweight.tasks.fit.settings import DEFAULT, FitSettings
from featherweight.tasks.fit.sizes import file_bytes
from featherweight.tasks.fit.targets import readable, shareable
from featherweight.tasks.fit.ways import Chosen, Way, end_ways

NEEDS = ("gram", "held_out_gram")
LEAST_WORTH = 0.05
"""Of the median of its role: a layer on which nothing seems to hang may only seem so on this text."""
WHOLE_SHARE = 2
"""A model is loaded whole if so many times what it takes is free."""


@dataclass
class Study:
    """One model, opened.

    windows : of calibration text, token ids int64 [n, T]; None without data
    folder : what is measured is kept there
    """

    model: str | Path
    checkpoint: Checkpoint
    plan: Plan
    settings: FitSettings
    windows: Tensor | None
    calibration: Any
    folder: Path
    notify: Observer
    overhead: int = 0
    """Bytes of a GGUF beside its blocks, as far as they are known."""

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "measured")
        self.store.folder.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self._left_out: dict[str, list[str]] = {}
        self._specs: dict[str, dict[str, Any]] = {}
        self.layers: list[LinearLayer] = [job.layer for job in self.plan.jobs]
        self._outside = {layer.name for layer in self.plan.anatomy.outside}
        self.curves = self._curves()

    # Measuring ------------------------------------------------------------------------------------------------------

    def ways(self, layer: LinearLayer) -> tuple[Way, ...]:
        """What a layer may become."""
        found = end_ways() if layer.name in self._outside else self.settings.choices
        return self.possible(layer, found)

    def possible(self, layer: LinearLayer, ways: tuple[Way, ...]) -> tuple[Way, ...]:
        """Those of a layer's ways that the target reads and processes can share; what is left out is said."""
        found = readable(layer, ways) if self.settings.target == "vllm" else ways
        if not found:
            raise FeatherError(f"vLLM's own kernels read no choice for {layer.name}, {list(layer.shape)}")
        found = shareable(layer, found, self.settings.tensor_parallel)
        for way in ways:
            if way not in found:
                self._left_out.setdefault(way.name, []).append(layer.name)
        return found

    def _curves(self) -> Curves:
        return Curves(self.plan, self.checkpoint, self.store, self._statistics(), self.settings.seed)

    @property
    def statistics(self) -> Path | None:
        """The file of second moments that errors are measured with."""
        return self.curves.statistics

    def _statistics(self) -> Path | None:
        if self.windows is None:
            return None
        path = self.folder / "statistics.safetensors"
        if not path.exists():
            self.notify({"event": "note", "text": "gathering second moments of all layers' inputs"})
            gather_statistics(
                self.model, path, self.calibration, NEEDS, self.settings.calibration,
                trust_remote_code=self.checkpoint.trust_remote_code, notify=self.notify,
            )  # fmt: skip
        return path

    def measured(self) -> Problem:
        """What each way costs in each layer, and the worth of every layer; both from what is kept, where it is."""
        self.curves.measure(self.ways, self._telling("measuring choices"))
        for name, layers in self._left_out.items():
            count = len(dict.fromkeys(layers))
            self._note(f"{name} is left out for {layers[0]} and {count - 1} more: it cannot be read or shared there")
        groups = groups_of(self.layers, self.settings.together)
        problem = Problem(self.curves.measured, self._worths(), groups, solver=self.settings.solver)
        wanted = self.settings.tokens_per_second
        if wanted is None:
            return problem
        told = self._telling("measuring rates of kernels")
        seconds = layer_seconds(self.curves, self.layers, self._is_read, told)
        return replace(problem, seconds=seconds, most_seconds=1 / wanted)

    def _is_read(self, layer: LinearLayer) -> bool:
        """Whether every token reads all of it: not an embedding that is nothing else."""
        embedding = self.plan.anatomy.embedding
        return embedding is None or layer.name != embedding.name or self.plan.anatomy.tied_head is not None

    @contextlib.contextmanager
    def network(self) -> Iterator[Network | None]:
        """The original in memory; None where there is no text, not the memory, or it predicts no tokens."""
        needed = WHOLE_SHARE * 4 * self.plan.parameters
        free = available_bytes()
        if self.windows is None:
            yield None
        elif free and needed > free:
            self._note("the model does not fit into memory whole: layers count by their weights, and nothing is tried")
            yield None
        else:
            count = max(1, self.settings.tokens // self.windows.shape[1])
            length = min(self.windows.shape[1], self.settings.tokens)
            windows = self.windows[-count:, :length]  # the last ones are held out from the statistics
            settings = CalibrationSettings(**self.settings.calibration)
            outside = [layer.name for layer in self.layers if layer.name in self._outside]
            with network_of(self.checkpoint, self.plan.anatomy, windows, settings, outside) as found:
                if not found.whole.predicts:
                    self._note("the model predicts no tokens: layers count by their weights")
                yield found if found.whole.predicts else None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.notify({"event": "note", "text": text})

    def _by_weights(self) -> dict[str, float]:
        weights = sum(layer.parameters for layer in self.layers)
        return {layer.name: layer.parameters / weights for layer in self.layers}

    @property
    def measure(self) -> type[Measure]:
        """How worths are found. FeatherError for one that needs text where there is none; the default then is not."""
        name = self.settings.sensitivity
        found: type[Measure] = find("sensitivity", name)
        if self.windows is None and found.needs_text:
            if name != DEFAULT:
                raise FeatherError(f"--sensitivity {name} needs text: leave --data-free out, or take zd or weights")
            found = find("sensitivity", "weights")
        return found

    def _asked(self, network: Network | None, what: str) -> Asked:
        return Asked(self.checkpoint, self.layers, self.curves, network, self.settings.tokens, self._telling(what))

    def _worths(self) -> dict[str, float]:
        """Of all layers; those that are kept need no network."""
        measure = self.measure
        keys = [self._asked(None, "").typical(layer).key for layer in self.layers]
        key = f"worths-{measure.kind}-{sha256_of(' '.join(keys))[:24]}-{self.settings.tokens}"
        kept = self.store.record(key)
        if kept is None:
            kept = self._measured_worths(measure)
            if kept is None:
                return self._by_weights()
            self.store.keep(key, {}, kept)
        return self._raised(kept)

    def _measured_worths(self, measure: type[Measure]) -> dict[str, float] | None:
        what = f"measuring what hangs on each layer ({measure.kind})"
        if not measure.needs_network:
            return measure.worths(self._asked(None, what))
        with self.network() as network:
            return None if network is None else measure.worths(self._asked(network, what))

    def check(self, problem: Problem) -> LinearModel | None:
        """How far the linear model of the divergence holds; kept. None without text, or where it is not asked for."""
        if self.windows is None or self.settings.checks < 4:
            return None
        worths = sha256_of(json.dumps([self.settings.checks, *sorted(problem.worth.items()), *problem.groups]))[:24]
        ways = sha256_of(" ".join(m.key for found in problem.measured.values() for m in found))[:24]
        key = f"linear-{worths}-{ways}-{self.settings.tokens}"
        kept = self.store.record(key)
        if kept is None:
            with self.network() as network:
                if network is None:
                    return None
                asked = self._asked(network, "checking that errors add up")
                found = check_linear(problem, asked, self.settings.checks, self.settings.seed, asked.told)
            kept = {"found": None if found is None else found.to_json()}
            self.store.keep(key, {}, kept)
        return None if kept["found"] is None else LinearModel.from_json(kept["found"])

    def _raised(self, found: Mapping[str, float]) -> dict[str, float]:
        """No worth is below LEAST_WORTH of its role's median."""
        roles: dict[str, list[float]] = {}
        for layer in self.layers:
            roles.setdefault(layer.role, []).append(found[layer.name])
        return {x.name: max(found[x.name], LEAST_WORTH * median(roles[x.role])) for x in self.layers}

    # Sizes ----------------------------------------------------------------------------------------------------------

    def file_bytes(self, problem: Problem, chosen: Mapping[str, int]) -> int:
        """Of the weight files of a choice."""
        specs = {name: self._spec(problem.measured[name][place].key) for name, place in chosen.items()}
        return file_bytes(self.plan, self.checkpoint, specs)

    def _spec(self, key: str) -> dict[str, Any]:
        if key not in self._specs:
            self._specs[key] = self.store.load(key)[0]["spec"]
        return self._specs[key]

    def code_budget(self, problem: Problem, budget: int) -> int:
        """Bytes that codes may take for files of `budget` bytes. FeatherError where that cannot be."""
        least = {name: _smallest(ways) for name, ways in problem.measured.items()}
        smallest = self.file_bytes(problem, least)
        source = sum(file.size for file in self.checkpoint.files)
        check_budget(budget, smallest, source, "the budget")
        return budget - (smallest - problem.nbytes(least))

    # Choosing -------------------------------------------------------------------------------------------------------

    def choose(self, problem: Problem, budget: int | None, less: int = 0) -> tuple[dict[str, int], Refined | None]:
        """The way of every layer for files of at most `budget` bytes, `less` of them left free; kept, so that the same
        question has the same answer."""
        path = self.folder / f"choice-{self._digest(problem, budget, less)}.json"
        kept = read_object(path)
        if kept.get("chosen"):
            refined = Refined(**kept["refined"]) if kept.get("refined") else None
            return kept["chosen"], refined
        pools = self.settings.pools
        room = 0 if budget is None else self.code_budget(problem, budget - less)
        while True:
            chosen, refined = self._chosen(problem, room)
            over = 0 if budget is None else self.file_bytes(problem, chosen) - (budget - less)
            if over <= 0 or pools:
                break
            room -= over
        write_text(path, to_json({"chosen": chosen, "refined": None if refined is None else vars(refined)}))
        return chosen, refined

    def _chosen(self, problem: Problem, room: int) -> tuple[dict[str, int], Refined | None]:
        first = problem.solved(room, self.settings.pools)  # says what is wrong before anything is loaded
        if not self.settings.refine or problem.solver == "greedy":
            return first, None
        with self.network() as network:
            if network is None:
                return first, None
            refined = refine(
                problem, self.layers, Assembled(network, self.curves), room, pools=self.settings.pools,
                rounds=self.settings.refine, told=self._telling("trying choices on the whole model"),
            )  # fmt: skip
        return refined.chosen, refined

    def _digest(self, problem: Problem, budget: int | None, less: int) -> str:
        ways = {name: [(m.way.name, m.nbytes, m.error) for m in found] for name, found in problem.measured.items()}
        pools = [vars(pool) for pool in self.settings.pools]
        tried = [self.settings.refine, self.settings.tokens, self.overhead]
        about: list[Any] = [budget, less, ways, dict(problem.worth), problem.groups, tried, pools]
        about += (
            [problem.most_seconds, dict(problem.seconds), problem.solver]
            if problem.seconds or problem.solver != "knapsack"
            else []
        )
        return sha256_of(json.dumps(about, sort_keys=True))[:24]

    def ways_of(self, problem: Problem, chosen: Mapping[str, int]) -> Chosen:
        """The choice as ways, for a recipe. FeatherError never: every layer has one."""
        layers, ends = {}, {}
        anatomy = self.plan.anatomy
        for name, place in chosen.items():
            way = problem.measured[name][place].way
            if name not in self._outside:
                layers[name] = way
            elif anatomy.embedding is not None and name == anatomy.embedding.name:
                ends["embedding"] = way
                if anatomy.tied_head is not None:
                    ends["head"] = way
            else:
                ends["head"] = way
        return Chosen(layers, ends)

    def _telling(self, what: str) -> Callable[[int, int], None]:
        """Tells of steps, with the time that is left if the others take as long."""
        begun: list[tuple[float, int]] = []

        def told(done: int, total: int) -> None:
            now = time.monotonic()
            if not begun:
                begun.append((now, done))
            (start, first), left = begun[0], None
            if done > first and now - start > 1:
                left = (now - start) / (done - first) * (total - done)
            self.notify({"event": what, "step": done, "of": total, "seconds_left": left})

        return told


def _smallest(ways: Sequence[Measured]) -> int:
    return min(range(len(ways)), key=lambda place: ways[place].nbytes)
