"""What learned choices minimise: a block's output error, or the divergence of the model's predictions.

Both take weights as leaf tensors, run the network with them in place, and accumulate gradients into them. Part of the
samples is held out: `held_out_loss` decides which step is kept, so that nothing learned ends worse than it began. A
batch that a device's memory does not hold is run in parts, whose gradients add up to the batch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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

    With `huber`, the mean over all values of the Huber loss, which from an error of that size on rises linearly.

    Weights and tensors may be on any device; `device` is where the block runs, and where they are best.
    A batch is one of the calibration's settings; where the device's memory does not hold it, it is run in parts. Held
    out are the session's own held-out batches; where it has none,
    held_out_share : part of the batches, at least one where there are two, taken evenly from the whole
    """

    def __init__(
        self,
        session: BlockAccess,
        held_out_share: float = 0.125,
        precision: Chosen = "float32",
        *,
        huber: float | None = None,
    ) -> None:
        self.session, self.device = session, session.device
        self.precision, self.huber = precision, huber
        self._take_samples()
        seen = len(self.session.inputs)
        count = sum(parts[0] < seen for parts in self._parts)
        apart = list(range(count, len(self._parts)))
        self._held_out = apart or evenly(count, held_out_share)
        self._training = [i for i in range(count) if i not in set(self._held_out)]
        self.batches = len(self._training)

    def _take_samples(self) -> None:
        """Inputs and targets as the session has them now, and which of them make up a batch of the settings."""
        self._targets = list(self.session.targets)  # first: making them may halve the batches
        self._inputs = list(self.session.inputs)
        apart = list(getattr(self.session, "held_out_inputs", ()))
        if apart:
            self._inputs += apart
            self._targets += list(self.session.held_out_targets)  # type: ignore[attr-defined]
        self._parts = getattr(self.session, "whole_batches", None) or [[i] for i in range(len(self._inputs))]

    def _halve(self) -> None:
        self.session.halve()  # type: ignore[attr-defined]
        self._take_samples()

    def backward(self, weights: Weights, tensors: Weights, batch: int) -> float:
        def step() -> float:
            total = 0.0
            with all_or_no_gradients([*weights.values(), *tensors.values()]):
                for loss in self._losses(weights, tensors, self._training[batch], self.precision):
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += float(loss.detach())
            return total

        return self._fitting(step)

    def held_out_loss(self, weights: Weights, tensors: Weights) -> float | None:
        if not self._held_out:
            return None

        def measured() -> float:
            with torch.no_grad():
                losses = [sum(map(float, self._losses(weights, tensors, i, "float32"))) for i in self._held_out]
            return sum(losses) / len(losses)

        return self._fitting(measured)

    def _fitting(self, action: Callable[[], float]) -> float:
        return fitting_by(action, self._halve if hasattr(self.session, "halve") else None)

    def _losses(self, weights: Weights, tensors: Weights, batch: int, precision: Chosen) -> Iterator[Tensor]:
        """What the parts of a batch add to its loss, one after the other."""
        parts = self._parts[batch]
        whole = len(parts) > 1 and self.huber is None
        power = torch.stack([self._target(i).square().sum() for i in parts]).sum() if whole else None
        values = sum(self._targets[i].numel() for i in parts)
        for index in parts:
            target = self._target(index)
            with self.session.overridden({**weights, **tensors}), autocast(precision, self.device):
                output = self.session.run(self._inputs[index], index).float()
            if self.huber is None:
                yield _relative(output, target, power)
            else:
                yield torch.nn.functional.huber_loss(output, target, reduction="sum", delta=self.huber) / values

    def _target(self, index: int) -> Tensor:
        return self._targets[index].to(self.device).float()


class ModelObjective:
    """KL(original || student) of the next-token distributions, nats a token, on calibration windows.

    A network without an output layer over a vocabulary (an encoder) has no such distributions: there the loss is
    the relative squared error of its last hidden states plus that of their mean over the window, which is what
    sentence embeddings are made of.

    batch_size : windows a batch; where the device's memory does not hold so many, they are run in parts
    held_out_share : part of the windows, taken evenly, where the model has none apart
    token_share : part of a window's tokens, always the same ones, whose predictions are compared; the output layer of a
        small model with a large vocabulary costs as much as all its blocks
    original : the type of the passes of the original on batches that are learned from
    loss : "kl", or "states", what an encoder has, or "mixed", the sum of both
    """

    def __init__(
        self,
        model: ModelAccess,
        batch_size: int = 4,
        precision: Chosen = "float32",
        held_out_share: float = 0.125,
        token_share: float = 1.0,
        *,
        loss: Literal["kl", "states", "mixed"] = "kl",
        original: Chosen = "float32",
    ) -> None:
        self._original_precision = original
        self.model, self.device = model, model.device
        self.precision = precision
        predicts = getattr(model, "predicts", True)
        kinds = {"kl": self._of_predictions, "states": self._of_states, "mixed": self._of_both}
        self._divergence = kinds[loss] if predicts else self._of_states
        self._token_share = token_share if predicts else 1.0
        windows, held_out = list(model.windows), list(model.held_out)
        if not held_out:
            places = evenly(len(windows), held_out_share)
            held_out = [windows[i] for i in places]
            windows = [window for i, window in enumerate(windows) if i not in set(places)]
        self._training = _stacked(windows, batch_size)
        self._held_out = _stacked(held_out, batch_size)
        self.batches = len(self._training)
        self._at_once = min(batch_size, getattr(model, "windows_a_pass", None) or batch_size)
        self._teacher: dict[tuple[bool, int], Tensor] = {}
        self._teacher_bytes, self._teacher_room = 0, CACHE_BYTES

    def backward(self, weights: Weights, tensors: Weights, batch: int) -> float:
        ids = self._training[batch]

        def step() -> float:
            teacher = self._original(False, batch, ids)
            with all_or_no_gradients([*weights.values(), *tensors.values()]):
                parts = self._in_parts(ids, teacher)
                return sum(self._backward(weights, tensors, batch, *part, teacher) for part in parts)

        return self._fitting(step)

    def _backward(
        self, weights: Weights, tensors: Weights, batch: int, ids: Tensor, original: Tensor, whole: Tensor
    ) -> float:
        """What a part of a batch adds to its loss. whole : the original's states for all of the batch"""
        with self.model.overridden(weights, tensors):
            with autocast(self.precision, self.device):
                states = self._compared(self.model.hidden(ids), False, batch)
            leaf = states.detach().float().requires_grad_()
            loss = self._divergence(leaf, original, whole, backward=True)
        assert leaf.grad is not None
        states.backward(leaf.grad.to(states.dtype))  # type: ignore[no-untyped-call]
        return loss

    def held_out_loss(self, weights: Weights, tensors: Weights) -> float | None:
        if not self._held_out:
            return None

        def of_batch(batch: int, ids: Tensor) -> float:
            teacher = self._original(True, batch, ids)
            loss = 0.0
            for part, original in self._in_parts(ids, teacher):
                with self.model.overridden(weights, tensors):
                    states = self._compared(self.model.hidden(part), True, batch).float()
                    loss += self._divergence(states, original, teacher, backward=False)
            return loss

        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch, ids in enumerate(self._held_out):
                total += ids.numel() * self._fitting(lambda b=batch, i=ids: of_batch(b, i))  # type: ignore[misc]
                tokens += ids.numel()
        return total / tokens

    def _in_parts(self, ids: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and the original's states, as many windows as run at once."""
        return zip(torch.split(ids, self._at_once), torch.split(teacher, self._at_once), strict=True)

    def _fitting(self, action: Callable[[], float]) -> float:
        return fitting_by(action, self._make_room if hasattr(self.model, "halve") else None)

    def _make_room(self) -> None:
        """Keep no more of the original's states; where none are kept, run fewer windows at once."""
        if self._teacher:
            self._teacher.clear()
            self._teacher_bytes = self._teacher_room = 0
        else:
            self._at_once = self.model.halve(self._at_once)  # type: ignore[attr-defined]

    def _of_states(self, states: Tensor, teacher: Tensor, whole: Tensor, backward: bool) -> float:
        """Relative squared errors of hidden states [batch, tokens, hidden] and of their means over the tokens."""
        powers = whole.square().sum(), whole.mean(1).square().sum()
        loss = _relative(states, teacher, powers[0]) + _relative(states.mean(1), teacher.mean(1), powers[1])
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _of_both(self, states: Tensor, teacher: Tensor, whole: Tensor, backward: bool) -> float:
        found = self._of_predictions(states, teacher, whole, backward)
        return found + self._of_states(states, teacher, whole, backward)

    def _of_predictions(self, states: Tensor, teacher: Tensor, whole: Tensor, backward: bool) -> float:
        """Mean over tokens of the whole batch; backward into `states` chunk by chunk, so that never all logits are
        held."""
        flat, original, tokens = states.flatten(0, -2), teacher.flatten(0, -2), whole[..., 0].numel()
        with torch.no_grad():
            vocabulary = self._teacher_logits(original[:1]).shape[-1]
        step = max(1, CHUNK_ELEMENTS // vocabulary)
        total = 0.0
        for first in range(0, len(flat), step):
            with torch.no_grad():
                log_p = self._teacher_logits(original[first : first + step]).log_softmax(-1)
            log_q = self.model.head(flat[first : first + step]).log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / tokens
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
        chosen = torch.randperm(length, generator=random, device="cpu")[:count].sort().values
        return states[:, chosen.to(states.device)]

    def _original(self, held_out: bool, batch: int, ids: Tensor) -> Tensor:
        """What the original model's output layer reads: float32 [batch, tokens that count, hidden]."""
        known = self._teacher.get((held_out, batch))
        if known is not None:
            return known
        precision = "float32" if held_out else self._original_precision
        with torch.no_grad(), self.model.original(), autocast(precision, self.device):
            whole = (self.model.hidden(part) for part in torch.split(ids, self._at_once))
            parts = [self._compared(states, held_out, batch).float() for states in whole]
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        size = states.numel() * 4
        if self._teacher_bytes + size <= self._teacher_room:
            self._teacher[held_out, batch] = states
            self._teacher_bytes += size
        return states


def fitting_by(action: Callable[[], float], smaller: Callable[[], None] | None) -> float:
    """What `action` gives, begun again after `smaller` as often as a device runs out of memory."""
    while True:
        try:
            return action()
        except torch.OutOfMemoryError:
            if smaller is None:
                raise
        smaller()  # out here what the frames of `action` held is free


@contextlib.contextmanager
def all_or_no_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
    """What is within adds to the `.grad` of tensors; if it fails, they are as they were before."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    except BaseException:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient
        raise
    for leaf, gradient in zip(leaves, before, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else gradient + leaf.grad


def _relative(found: Tensor, wanted: Tensor, power: Tensor | None = None) -> Tensor:
    """||found - wanted||^2 / power, where that is None ||wanted||^2."""
    power = wanted.square().sum() if power is None else power
    return (found - wanted).square().sum() / power.clamp(min=torch.finfo(torch.float32).tiny)


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
