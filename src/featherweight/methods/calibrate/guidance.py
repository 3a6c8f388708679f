"""Guided statistics: tokens weighted by the squared gradients of the loss at a layer's output (GuidedQuant, arXiv
2505.07004), and the Kronecker factors of the loss's Fisher information (YAQA's sketch B, ICML 2026, from its formulas).

One backward pass over all windows, before anything is compressed. With z = W x the output of a layer [out], J_k its
k-th of g runs of neighbouring rows and l the negative log-likelihood of the text,

    s_k[t] = mean over j in J_k of (dl / dz_tj)^2        H_k = sum_t s_k[t] x_t x_t'

where H_k takes the place of the input's second moment for the rows of J_k. For two-sided rounding labels are drawn from
the model's own softmax, and G = sum_t (dl / dz_t) x_t' of every window gives H_I = mean G'G / out, H_O = mean GG' / in.

Memory is one block and one more stream: windows go through the network in rounds, as many in each as have hidden states
before all blocks that take as much as one stream of all windows. Blocks run forward without gradients, then backward
from the last one on, each computed once more. What a round found is kept, so that a pass that was killed goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.feed import Feed
from featherweight.methods.calibrate.fitting import fitting
from featherweight.methods.calibrate.loss import EndLoss
from featherweight.methods.calibrate.statistics.moments import symmetric
from featherweight.model.network.gradients import GradientRecorder
from featherweight.model.network.observe import Probe, Seen
from featherweight.model.network.streams import hidden_of, to_device, to_host

WEIGHTS, FACTORS = "guidance-weights-", "guidance-factors-"
LEAST_SHARE = 8
"""The effective number of tokens is at least one over this of all, and a layer's width. Of 8192 tokens SmolLM2-135M's
layers feel as few as six: the first of each window takes nearly all of some layers of values. With 28,000 tokens 3-bit
codes have a KL of .299 with an eighth, .304 with a half, .312 unguided."""
STEPS = 60
"""Halvings in the search of the value at which heavy weights are cut."""


class GuidanceStore(Protocol):
    """Where rounds are kept: see `featherweight.storage.run.store.Store`."""

    def keep(self, key: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None: ...
    def record(self, key: str) -> dict[str, Any] | None: ...
    def tensors(self, key: str) -> dict[str, Tensor]: ...
    def names(self, prefix: str = "") -> list[str]: ...
    def drop(self, key: str) -> None: ...


@dataclass
class HeldGuidance:
    """A `GuidanceStore` in memory."""

    held: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = field(default_factory=dict)

    def keep(self, key: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.held[key] = (dict(tensors), dict(record))

    def record(self, key: str) -> dict[str, Any] | None:
        return self.held[key][1] if key in self.held else None

    def tensors(self, key: str) -> dict[str, Tensor]:
        return self.held[key][0]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self.held if key.startswith(prefix))

    def drop(self, key: str) -> None:
        self.held.pop(key, None)


@dataclass
class Guidance:
    """What a backward pass over the windows of a calibration found.

    groups : runs of output rows that have weights of their own; 0 where only factors were gathered
    factors : whether they were
    """

    feed: Feed
    store: GuidanceStore
    groups: int
    factors: bool
    _rounds: list[dict[str, Tensor]] = field(default_factory=list)
    _factors: tuple[int, dict[str, Tensor]] | None = None  # of the block that was asked for last

    def weights(self, layer: str, least: int) -> tuple[Tensor, float] | None:
        """float32 [g, windows, T] with mean one over real tokens of each g, and the effective number of tokens.

        That number is (sum s)^2 / sum s^2, of the group in which it is least. Gradients are heavy-tailed: where it is
        below `least`, the heaviest weights are cut down to the one value with which it is `least`. None for a layer
        that no gradient reached.
        """
        if not self._rounds:
            self._rounds = [self.store.tensors(key) for key in sorted(self.store.names(WEIGHTS))]
        parts = [tensors[layer] for tensors in self._rounds if layer in tensors]
        if len(parts) != len(self._rounds) or not parts:
            return None
        found = torch.cat(parts, 1).double()
        if not bool((found.flatten(1).sum(1) > 0).all()):
            return None
        masks = [self.feed.mask_of(number) for number in range(len(self.feed.batches))]
        real = None if masks[0] is None else torch.cat([mask.cpu() for mask in masks if mask is not None])
        count = found[0].numel() if real is None else int(real.sum())
        found = torch.stack([capped(one, least) for one in found])
        effective = min(effective_number(one) for one in found)
        return (found * (count / found.flatten(1).sum(1)).view(-1, 1, 1)).float(), effective

    def fisher_factors(self, layer: str, block: int) -> tuple[Tensor, Tensor] | None:
        """H_I float32 [in, in] and H_O [out, out] of a layer; None where no gradient reached it."""
        if self._factors is None or self._factors[0] != block:
            self._factors = block, self.store.tensors(f"{FACTORS}{block:06d}")
        tensors = self._factors[1]
        if f"{layer}.inputs" not in tensors:
            return None
        return symmetric(tensors[f"{layer}.inputs"]), symmetric(tensors[f"{layer}.outputs"])


def effective_number(weights: Tensor) -> float:
    """(sum s)^2 / sum s^2."""
    return float(weights.sum() ** 2 / weights.square().sum())


def capped(weights: Tensor, least: int) -> Tensor:
    """min(s, c) with the largest c at which the effective number is at least `least`; float64, of any shape.

    With fewer than `least` weights that are not zero, these all become the same.
    """
    above = weights[weights > 0]
    if len(above) == 0 or effective_number(weights) >= least:
        return weights
    low, high = float(above.min()), float(above.max())
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_number(above.clamp(max=middle)) >= least else (low, middle)
    return weights.clamp(max=low)


def guide(feed: Feed, layers: Sequence[str], groups: int, factors: bool, store: GuidanceStore) -> Guidance:
    """Run the original network forward and backward over all windows; the feed's streams stand before its first block.

    Parameters
    ----------
    layers : those that are wanted
    groups : see `Guidance`
    factors : also (or, with groups 0, only) the Fisher factors; labels are drawn from the model's own softmax then
    store : rounds that it holds are not run again

    Raises
    ------
    CalibrationError
        The gradient of a layer is not finite, or the network is one that cannot be run backward block by block.
    """
    if feed.whole or feed.ids is None:
        raise CalibrationError(
            "calibration.guidance runs a language model backward block by block, and this network has no list of "
            "blocks or reads no tokens; set it to 0"
        )
    found = Guidance(feed, store, groups, factors)
    windows = len(feed.ids)
    size = max(1, windows // (len(feed.host.blocks) + 1))
    done = begun_at = _finished(store, groups, factors)
    begun = time.monotonic()
    while done < windows:
        done = fitting(feed, _Round(feed, layers, groups, factors, store, done, size).run)
        left = (time.monotonic() - begun) / (done - begun_at) * (windows - done)
        feed.notify({"event": "gradients", "step": done, "of": windows, "seconds_left": left})
    return found


def _finished(store: GuidanceStore, groups: int, factors: bool) -> int:
    """Windows whose rounds are kept, one after the other from the first; what lies behind a gap is dropped."""
    wanted, end = {"groups": groups, "factors": factors}, 0
    for key in sorted(store.names(WEIGHTS)):
        record = store.record(key)
        if record is None or record.get("first") != end or {name: record.get(name) for name in wanted} != wanted:
            store.drop(key)
        else:
            end = int(record["last"])
    return end


@dataclass
class _Round:
    """Some windows through the network and back. first : the number of the first; size : about how many"""

    feed: Feed
    layers: Sequence[str]
    groups: int
    factors: bool
    store: GuidanceStore
    first: int
    size: int

    def run(self) -> int:
        """The number of the window behind the round's last; everything it found is kept."""
        feed, blocks = self.feed, len(self.feed.host.blocks)
        self.batches, self.starts = self._chosen()
        self.length = int(feed.length or 0)
        self.count = sum(len(feed.batches[number]["input_ids"]) for number in self.batches)
        self.found = {
            name: torch.zeros(self.groups, self.count, self.length, device="cpu") for name in self.layers if self.groups
        }
        self.reached: set[str] = set()
        self.sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        hidden = {number: feed.original_hidden[number] for number in self.batches}
        before: list[dict[int, Tensor]] = []
        for block in range(blocks):
            feed.host.load_block(block)
            before.append(hidden)
            with torch.no_grad():
                hidden = {number: to_host(feed.call(block, x, number)) for number, x in hidden.items()}
            feed.host.drop_block(block)
        gradients = {number: self._of_end(number, x) for number, x in hidden.items()}
        self._keep_factors(blocks)
        for block in reversed(range(blocks)):
            feed.host.load_block(block)
            self._gather(block, before.pop(), gradients)
            feed.host.drop_block(block)
            self._check(block)
            self._keep_factors(block)
        last = self.first + self.count
        kept = {name: value for name, value in self.found.items() if name in self.reached}
        about = {"first": self.first, "last": last, "groups": self.groups, "factors": self.factors}
        self.store.keep(f"{WEIGHTS}{self.first:08d}", kept, about)
        return last

    def _chosen(self) -> tuple[list[int], dict[int, int]]:
        """Batches of the round, and where in it their windows begin."""
        start, chosen, starts = 0, list[int](), dict[int, int]()
        for number, batch in enumerate(self.feed.batches):
            taken = start - self.first
            if start >= self.first and (not chosen or taken + len(batch["input_ids"]) <= self.size):
                chosen.append(number)
                starts[number] = taken
            elif chosen:
                break
            start += len(batch["input_ids"])
        return chosen, starts

    # Backward --------------------------------------------------------------------------------------------------------

    def _of_end(self, number: int, hidden: Tensor) -> Tensor:
        """The loss's gradient at the last block's output, window by window: logits take more than anything else."""
        feed, capture = self.feed, self.feed.capture
        assert capture is not None
        head = feed.head if feed.head in self.layers else None
        found = []
        for row in range(len(hidden)):
            sample = {name: value[row : row + 1] for name, value in feed.batches[number].items()}
            generator = torch.Generator("cpu").manual_seed(feed.settings.seed * 1_000_003 + self._window(number) + row)
            loss = EndLoss(feed.host.model, True, generator, drawn=self.factors, reduction="sum")
            x = to_device(hidden[row : row + 1], feed.host.device).detach().requires_grad_()
            with torch.enable_grad():
                probes = {} if head is None else {head: self._probe(head)}
                recorder = GradientRecorder(feed.host.model, probes, self._taker(number, row))
                output = recorder.called(lambda s=sample, x=x: capture.after(s, x))  # type: ignore[misc]
                logits = output.logits if hasattr(output, "logits") else hidden_of(output)
                loss(logits, sample).backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            found.append(to_host(x.grad))
        return torch.cat(found)

    def _gather(self, block: int, before: dict[int, Tensor], gradients: dict[int, Tensor]) -> None:
        """Put the gradients before a block in the place of those behind it, taking what its layers feel."""
        feed = self.feed
        names = [name for name in self.layers if feed.host.layers[name].block == block]
        probes = {name: self._probe(name) for name in names}
        self.sums = {}
        for number in self.batches:
            x = to_device(before.pop(number), feed.host.device).detach().requires_grad_()
            recorder = GradientRecorder(feed.host.model, probes, self._taker(number, None))
            with torch.enable_grad():
                output = recorder.called(lambda x=x, n=number: feed.call(block, x, n))  # type: ignore[misc]
                torch.autograd.backward(output, to_device(gradients[number], feed.host.device).to(output.dtype))
            assert x.grad is not None
            gradients[number] = to_host(x.grad)

    def _probe(self, name: str) -> Probe:
        return Probe(self.feed.host.slots[name], self.feed.host.layers[name].expert)

    def _window(self, number: int) -> int:
        return self.first + self.starts[number]

    def _taker(self, number: int, row: int | None) -> Callable[[str, Seen, Tensor], None]:
        """Takes gradients of a batch, or of one window of it."""
        first = self.starts[number] + (row or 0)
        count = 1 if row is not None else len(self.feed.batches[number]["input_ids"])

        def take(name: str, seen: Seen, rows: Tensor) -> None:
            tokens = seen.tokens
            if tokens is None and len(rows) != count * self.length:
                return  # not one row a token
            self.reached.add(name)
            if self.groups:
                # Gradients times 1e3 in the paper, for the range of float16; here they are squared in float32.
                parts = rows.float().square().tensor_split(self.groups, 1)
                values = torch.stack([part.mean(1) for part in parts]).cpu()
                place = self.found[name][:, first : first + count].view(self.groups, -1)
                if tokens is None:
                    place.copy_(values)
                else:
                    place[:, tokens.cpu()] += values
            if self.factors and number < self.feed.batches_seen:  # the others only judge
                self._add_factors(name, seen.rows.float(), rows.float(), tokens, count)

        return take

    # Fisher factors --------------------------------------------------------------------------------------------------

    def _add_factors(self, name: str, inputs: Tensor, rows: Tensor, tokens: Tensor | None, count: int) -> None:
        of = (torch.arange(len(rows), device=rows.device) if tokens is None else tokens) // self.length
        for window in range(count):
            own = of == window
            outer = rows[own].T @ inputs[own]
            inner, other = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (inner + outer.T @ outer / len(outer), other + outer @ outer.T / outer.shape[1])

    def _keep_factors(self, block: int) -> None:
        """Add what this round found of a block to what earlier rounds have."""
        if not self.factors:
            return
        key, last = f"{FACTORS}{block:06d}", self.first + self.count
        record = self.store.record(key)
        if self.first and (record is None or record["last"] not in (self.first, last)):
            raise CalibrationError(
                f"the Fisher factors of block {block} are those of other windows than the {self.first} that are done: "
                "remove the run's folder and begin again"
            )
        if record is not None and self.first and record["last"] == last:
            return  # kept by a process that was killed before its round ended
        former = self.store.tensors(key) if self.first else {}
        kept = {}
        for name, sums in self.sums.items():
            for what, value in zip(("inputs", "outputs"), sums, strict=True):
                place = f"{name}.{what}"
                share = torch.as_tensor(value).cpu() / last
                kept[place] = share if place not in former else former[place] * (self.first / last) + share
        kept |= {name: value * (self.first / last) for name, value in former.items() if name not in kept}
        self.store.keep(key, kept, {"last": last})

    def _check(self, block: int) -> None:
        """CalibrationError where a gradient of the block's layers is not finite."""
        for name in self.layers:
            if self.feed.host.layers[name].block != block:
                continue
            bad = None
            if name in self.found:
                bad = ~torch.isfinite(self.found[name]).all(2).all(0)
            elif name in self.sums and not bool(torch.isfinite(torch.as_tensor(self.sums[name][0])).all()):
                bad = torch.ones(1, dtype=torch.bool, device="cpu")
            if bad is not None and bool(bad.any()):
                raise CalibrationError(
                    f"the loss's gradients at the output of {name} are not finite in window "
                    f"{self.first + int(bad.nonzero()[0])} of the calibration text: leave that text out, set "
                    "calibration.dtype to float32, or do without calibration.guidance"
                )
