"""Token perplexity: exp of the mean negative log-likelihood of the scored tokens.

Log-softmax in float32, sums in float64. The logits of a window are never held whole for the usual models: the
hidden states before the output layer are, and the output layer is applied to a slice of positions at a time, so a
vocabulary of 150,000 costs no more memory than one of 4,000.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featherweight.errors import EvaluationError, FeatherWarning
from featherweight.system.devices import give_back
from featherweight.system.transformers_calls import asking_transformers
from featherweight.tasks.evaluate.divergence import Divergence, DivergenceSum, ratio_error
from featherweight.tasks.evaluate.protocols import Protocol, Window

Progress = Callable[[int, int], None]

CHUNK_ELEMENTS = 1 << 23  # logits held at a time for each model: 32 MiB in float32
BATCH_TOKENS = 4096  # windows are batched up to so many tokens a forward pass
PROBE_SCALE = 64.0


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihood (nats) and number of scored tokens of every window."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Nats a token."""
        return math.fsum(self.sums) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def standard_error(self) -> float | None:
        """Of `mean`, from the spread between windows; None for a single window."""
        return ratio_error(self.sums, self.counts)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of `perplexity`, to first order."""
        error = self.standard_error
        return None if error is None else error * self.perplexity

    def log_ratio(self, other: Loss) -> tuple[float, float | None]:
        """log(perplexity / perplexity of `other`) on the same windows, and its standard error.

        Paired: the difficulty of a passage is the same for both models and cancels, so the error is far below that of
        either perplexity.
        """
        if self.counts != other.counts:
            raise ValueError("the two losses are of different windows")
        differences = tuple(a - b for a, b in zip(self.sums, other.sums, strict=True))
        return math.fsum(differences) / self.tokens, ratio_error(differences, self.counts)


@dataclass(frozen=True)
class Measurement:
    """What one pass over the windows gives; `against` and `divergence` only if a second model took part."""

    loss: Loss
    against: Loss | None = None
    divergence: Divergence | None = None


class _Positions:
    """The output of one forward pass, from which the logits of any slice of positions can be had."""

    def __init__(self, states: Tensor, head: torch.nn.Module | None) -> None:
        self.states, self.head = states, head

    def logits(self, row: int, first: int, stop: int) -> Tensor:
        """float32 [stop - first, vocabulary]."""
        part = self.states[row, first:stop]
        return (part if self.head is None else self.head(part)).float()


@dataclass
class LogitsReader:
    """Runs a causal language model without building the logits of all positions at once where it can.

    A hook before the output layer keeps the hidden states and lets one position through. If what the model returns for
    it is exactly the output layer's result, the model does nothing afterwards (no soft cap, no scale), and the layer
    can be applied to slices. Otherwise the model's own full logits are used.
    """

    model: Any
    sliceable: bool | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        first = next(iter(self.model.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def __call__(self, ids: Tensor) -> _Positions:
        """`ids` int64 [batch, context]."""
        ids = ids.to(self.device)
        head = self._head()
        if head is not None and self.sliceable is not False:
            states = self._states(ids, head)
            if states is not None:
                return _Positions(states, head)
        return _Positions(self.model(input_ids=ids, use_cache=False).logits, None)

    def _head(self) -> torch.nn.Module | None:
        get = getattr(self.model, "get_output_embeddings", None)
        head = get() if get is not None else None
        return head if isinstance(head, torch.nn.Module) else None

    def _states(self, ids: Tensor, head: torch.nn.Module) -> Tensor | None:
        kept: list[Tensor] = []

        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(inputs[0])
            # Scaled up, so that a soft cap shows even on the small logits of an untrained model.
            return (inputs[0][:, :1] * PROBE_SCALE, *inputs[1:])

        hook = head.register_forward_pre_hook(keep)
        try:
            returned = self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        if self.sliceable is None:
            whole = len(kept) == 1 and kept[0].dim() == 3 and kept[0].shape[:2] == ids.shape
            self.sliceable = whole and torch.equal(head(kept[0][:, :1] * PROBE_SCALE), returned)
        return kept[0] if self.sliceable else None


@dataclass
class KeptReader(LogitsReader):
    """A reader that runs its model once over each window, and gives later callers what it kept of it.

    Kept are the hidden states before the output layer (or the logits, where that is not all that the model does with
    them), float [context, width] a window in main memory: bit for bit what the model gave.

    room_bytes : what may be kept; windows beyond it are run again
    """

    room_bytes: int = 0
    _kept: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, ids: Tensor) -> _Positions:
        keys = [row.numpy().tobytes() for row in ids.cpu()]
        if all(key in self._kept for key in keys):
            states = torch.stack([self._kept[key] for key in keys]).to(self.device)
            return _Positions(states, self._head() if self.sliceable else None)
        positions = super().__call__(ids)
        if positions.states.nbytes <= self.room_bytes:
            self.room_bytes -= positions.states.nbytes
            self._kept |= {key: row.clone() for key, row in zip(keys, positions.states.cpu(), strict=True)}
        return positions


def measure(
    model: Any,
    tokens: Tensor,
    protocol: Protocol,
    against: Any = None,
    *,
    bos: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
    prefix: Sequence[int] = (),
) -> Measurement:
    """Loss of `model` on the windows of `protocol` over `tokens` int64 [n], and its divergence from `against`.

    Models are called as `model(input_ids=[batch, context], use_cache=False).logits`. `prefix`, `protocol.prefix`
    tokens, stands before each window; `bos` replaces the first token of each where the protocol asks for it (None: the
    tokenizer adds none). `against` may be a reader, which then keeps what it made. `batch` is windows a forward pass;
    `progress(done, total)` counts windows. EvaluationError where a model fails, or its output is not usable.
    """
    if len(prefix) != protocol.prefix:
        raise ValueError(f"the protocol has {protocol.prefix} tokens before a window, and {len(prefix)} are given")
    before = torch.tensor(list(prefix), dtype=torch.int64)
    windows = list(protocol.windows(len(tokens)))
    batch = batch or max(1, BATCH_TOKENS // protocol.context)
    reader = LogitsReader(model)
    other = against if against is None or isinstance(against, LogitsReader) else LogitsReader(against)
    sums: list[float] = []
    other_sums: list[float] = []
    divergence = DivergenceSum()
    with torch.inference_mode():
        while len(sums) < len(windows):
            group = windows[len(sums) : len(sums) + batch]
            ids = torch.stack([torch.cat([before, tokens[w.start : w.stop]]) for w in group])
            targets = ids.clone()
            if protocol.bos_each_window and bos is not None:
                ids[:, 0] = bos
            with asking_transformers("run the model on the text", error=EvaluationError):
                run = _run(ids, reader, other)
            if run is None:
                batch = smaller_batch(len(group), reader.device)
                continue
            positions, other_positions = run
            for row, window in enumerate(group):
                place = window.first - window.start + len(before)
                scored = _Scored(row, targets[row], window, place)
                loss, other_loss = _losses(positions, other_positions, scored, divergence)
                divergence.end_window()
                sums.append(loss)
                other_sums.append(other_loss)
            if progress is not None:
                progress(len(sums), len(windows))
    counts = tuple(w.scored for w in windows)
    if other is None:
        return Measurement(Loss(tuple(sums), counts))
    return Measurement(Loss(tuple(sums), counts), Loss(tuple(other_sums), counts), divergence.result())


def _run(ids: Tensor, reader: LogitsReader, other: LogitsReader | None) -> tuple[_Positions, _Positions | None] | None:
    """What both models make of some windows; None where a device's memory does not suffice."""
    try:
        return reader(ids), None if other is None else other(ids)
    except torch.OutOfMemoryError:
        return None


def smaller_batch(
    count: int, device: torch.device, what: str = "window", hint: str = "use a shorter --context, "
) -> int:
    """How many windows, or others, go together after so many did not fit; EvaluationError after one.

    hint : what else may help where one does not fit, for the error
    """
    if count == 1:
        raise EvaluationError(
            f"the memory of {device} does not suffice for one {what}: {hint}free memory of the "
            "device, or take --device cpu"
        )
    give_back(device)
    left = count // 2
    text = f"{device} ran out of memory: batches are of {left} {what}{'s' * (left != 1)} from here on"
    warnings.warn(text, FeatherWarning, stacklevel=2)
    return left


class _Scored(NamedTuple):
    """A window in a batch: its row, the row's tokens int64 [T], and the place of the first scored one among them."""

    row: int
    targets: Tensor
    window: Window
    first: int


def _losses(
    positions: _Positions, other: _Positions | None, scored: _Scored, divergence: DivergenceSum
) -> tuple[float, float]:
    """Summed losses of both models on one window, a slice of positions at a time; `divergence` is added to."""
    total = other_total = 0.0
    row, targets, window, first = scored
    stop = first + window.scored
    step = 1
    while first < stop:
        end = min(stop, first + step)
        log_p = torch.log_softmax(positions.logits(row, first - 1, end - 1), dim=-1)
        chosen = targets[first:end, None].to(log_p.device)
        total -= _sum_of(log_p, chosen)
        if other is not None:
            log_q = torch.log_softmax(other.logits(row, first - 1, end - 1), dim=-1).to(log_p.device)
            if log_q.shape != log_p.shape:
                raise EvaluationError(
                    f"the two models have vocabularies of {log_p.shape[-1]} and {log_q.shape[-1]} tokens: "
                    "KL divergence and agreement need models with the same tokenizer"
                )
            other_total -= _sum_of(log_q, chosen)
            divergence.add(original=log_q, compressed=log_p)
        first, step = end, max(1, CHUNK_ELEMENTS // log_p.shape[-1])
    if math.isnan(total) or math.isnan(other_total):
        raise EvaluationError(
            f"the model's logits are NaN or infinite within tokens {window.start} to {window.stop - 1} of the text: "
            "use a wider --dtype, or check the weights with `feather verify`"
        )
    return total, other_total


def _sum_of(log_p: Tensor, chosen: Tensor) -> float:
    if int(chosen.max()) >= log_p.shape[-1]:
        raise EvaluationError(
            f"the text has token {int(chosen.max())} and the model a vocabulary of {log_p.shape[-1]}: "
            "the tokenizer does not belong to this model"
        )
    return float(log_p.gather(1, chosen).cpu().sum(dtype=torch.float64))  # one number a token leaves the device
