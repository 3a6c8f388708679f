"""What learned choices minimise: a block's output error, or the divergence of the model's predictions.

Both take weights as leaf tensors, run the network with them in place, and accumulate gradients into them. Part of the
samples is held out: `held_out_loss` decides which step is kept, so that nothing learned ends worse than it began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from featherweight.model.network.access import BlockAccess, ModelAccess
from featherweight.system.precision import Chosen, autocast

Weights = Mapping[str, Tensor]

CHUNK_ELEMENTS = 1 << 23  # logits held at a time: 32 MiB in float32
CACHE_BYTES = 1 << 30  # of the teacher's hidden states; beyond, they are computed again


class Objective(Protocol):
    """A loss over `batches` training batches, computed on `device`."""

    batches: int
    device: torch.device

    def backward(self, weights: Weights, tensors: Weights, batch: int) -> float:
        """The loss of one batch; adds its gradient to the `.grad` of all weights and tensors that require one."""
        ...

    def held_out_loss(self, weights: Weights, tensors: Weights) -> float | None:
        """The loss over the held-out samples, in float32; None if nothing could be held out."""
        ...


@dataclass(frozen=True)
class ModelTrainingWork:
    """How many windows a training against the original's predictions runs: those it learns from, forwards and back;
    those that choose among its steps, forwards in float32; and those that the original runs once, in float32."""

    learned: int
    measured: int
    original: int


class BlockObjective:
    """||block(x; W) - y||^2 / ||y||^2: x the stream quantised so far, y the float block's output on the float stream.

    Weights and tensors may be on any device; `device` is where the block runs, and where they are best.
    A batch is one of the session's. Held out are the session's own held-out batches; where it has none,
    held_out_share : part of the batches, at least one where there are two, taken evenly from the whole
    """

    def __init__(self, session: BlockAccess, held_out_share: float = 0.125, precision: Chosen = "float32") -> None:
        self.session, self.device = session, session.device
        self.precision = precision
        self._targets = list(session.targets)  # first: making them may halve the batches
        self._inputs = list(session.inputs)
        count = len(self._inputs)
        apart = list(getattr(session, "held_out_inputs", ()))
        if apart:
            self._inputs += apart
            self._targets += list(session.held_out_targets)  # type: ignore[attr-defined]
            self._held_out = list(range(count, len(self._inputs)))
        else:
            self._held_out = evenly(count, held_out_share)
        self._training = [i for i in range(count) if i not in set(self._held_out)]
        self.batches = len(self._training)

    def backward(self, weights: Weights, tensors: Weights, batch: int) -> float:
        loss = self._loss(weights, tensors, self._training[batch], self.precision)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def held_out_loss(self, weights: Weights, tensors: Weights) -> float | None:
        if not self._held_out:
            return None
        with torch.no_grad():
            losses = [float(self._loss(weights, tensors, i, "float32")) for i in self._held_out]
        return sum(losses) / len(losses)

    def _loss(self, weights: Weights, tensors: Weights, index: int, precision: Chosen) -> Tensor:
        target = self._targets[index].to(self.device).float()
        with self.session.overridden({**weights, **tensors}), autocast(precision, self.device):
            output = self.session.run(self._inputs[index], index).float()
        return _relative(output, target)


class ModelObjective:
    """KL(original || student) of the next-token distributions, nats a token, on calibration windows.

    A network without an output layer over a vocabulary (an encoder) has no such distributions: there the loss is
    the relative squared error of its last hidden states plus that of their mean over the window, which is what
    sentence embeddings are made of.

    batch_size : windows a batch
    held_out_share : part of the windows, taken evenly, where the model has none apart
    token_share : part of a window's tokens, always the same ones, whose predictions are compared; the output layer of a
        small model with a large vocabulary costs as much as all its blocks
    """

    def __init__(
        self,
        model: ModelAccess,
        batch_size: int = 4,
        precision: Chosen = "float32",
        held_out_share: float = 0.125,
        token_share: float = 1.0,
    ) -> None:
        self.model, self.device = model, model.device
        self.precision = precision
        predicts = getattr(model, "predicts", True)
        self._divergence = self._of_predictions if predicts else self._of_states
        self._token_share = token_share if predicts else 1.0
        windows, held_out = list(model.windows), list(model.held_out)
        if not held_out:
            places = evenly(len(windows), held_out_share)
            held_out = [windows[i] for i in places]
            windows = [window for i, window in enumerate(windows) if i not in set(places)]
        self._training = _stacked(windows, batch_size)
        self._held_out = _stacked(held_out, batch_size)
        self.batches = len(self._training)
        self._teacher: dict[tuple[bool, int], Tensor] = {}
        self._teacher_bytes = 0

    def backward(self, weights: Weights, tensors: Weights, batch: int) -> float:
        ids = self._training[batch]
        teacher = self._original(False, batch, ids)
        with self.model.overridden(weights, tensors):
            with autocast(self.precision, self.device):
                states = self._compared(self.model.hidden(ids), False, batch)
            leaf = states.detach().float().requires_grad_()
            loss = self._divergence(leaf, teacher, backward=True)
        assert leaf.grad is not None
        states.backward(leaf.grad.to(states.dtype))  # type: ignore[no-untyped-call]
        return loss

    def held_out_loss(self, weights: Weights, tensors: Weights) -> float | None:
        if not self._held_out:
            return None
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch, ids in enumerate(self._held_out):
                teacher = self._original(True, batch, ids)
                with self.model.overridden(weights, tensors):
                    states = self._compared(self.model.hidden(ids), True, batch).float()
                    total += states[..., 0].numel() * self._divergence(states, teacher, backward=False)
                tokens += states[..., 0].numel()
        return total / tokens

    def _of_states(self, states: Tensor, teacher: Tensor, backward: bool) -> float:
        """Relative squared errors of hidden states [batch, tokens, hidden] and of their means over the tokens."""
        loss = _relative(states, teacher) + _relative(states.mean(1), teacher.mean(1))
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _of_predictions(self, states: Tensor, teacher: Tensor, backward: bool) -> float:
        """Mean over tokens; backward into `states` chunk by chunk, so that never all logits are held."""
        flat, original = states.flatten(0, -2), teacher.flatten(0, -2)
        with torch.no_grad():
            vocabulary = self._teacher_logits(original[:1]).shape[-1]
        step = max(1, CHUNK_ELEMENTS // vocabulary)
        total = 0.0
        for first in range(0, len(flat), step):
            with torch.no_grad():
                log_p = self._teacher_logits(original[first : first + step]).log_softmax(-1)
            log_q = self.model.head(flat[first : first + step]).log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(flat)
            if backward:
                loss.backward(retain_graph=first + step < len(flat))  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _teacher_logits(self, states: Tensor) -> Tensor:
        with self.model.original():
            return self.model.head(states)

    def _compared(self, states: Tensor, held_out: bool, batch: int) -> Tensor:
        """Of hidden states [batch, tokens, hidden] those of the tokens that count."""
        length = states.shape[1]
        count = max(1, round(self._token_share * length))
        if count == length:
            return states
        random = torch.Generator().manual_seed(2 * batch + held_out)
        chosen = torch.randperm(length, generator=random)[:count].sort().values
        return states[:, chosen.to(states.device)]

    def _original(self, held_out: bool, batch: int, ids: Tensor) -> Tensor:
        """What the original model's output layer reads: float32 [batch, tokens that count, hidden]."""
        known = self._teacher.get((held_out, batch))
        if known is not None:
            return known
        with torch.no_grad(), self.model.original():
            states = self._compared(self.model.hidden(ids), held_out, batch).float()
        size = states.numel() * 4
        if self._teacher_bytes + size <= CACHE_BYTES:
            self._teacher[held_out, batch] = states
            self._teacher_bytes += size
        return states


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """||found - wanted||^2 / ||wanted||^2."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def evenly(count: int, share: float) -> list[int]:
    """Places of a share of `count` samples, evenly spread; at least one of two or more, none of fewer."""
    kept = max(1, round(count * share)) if count > 1 and share > 0 else 0
    return [int((i + 0.5) * count / kept) for i in range(kept)]


def _stacked(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Batches [batch, tokens]; windows of different length are never stacked."""
    batches: list[list[Tensor]] = []
    for window in windows:
        if batches and len(batches[-1]) < batch_size and batches[-1][0].shape == window.shape:
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
