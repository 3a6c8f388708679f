"""A whole network in memory, for choices that see all of it: distillation, rotations, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.feed import Feed
from featherweight.methods.calibrate.fitting import halve_training
from featherweight.methods.calibrate.loss import EndLoss, has_logits
from featherweight.model.network.host import parameter_of
from featherweight.model.network.overrides import override_values
from featherweight.model.network.placement import Slot
from featherweight.model.network.streams import hidden_of
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer


@dataclass(frozen=True)
class WholeState:
    """Tensors and fields of config.json that had been set at some time; see `WholeModel.state`."""

    replaced: dict[str, Tensor]
    changed: dict[str, Tensor]
    config_changes: dict[str, Any]


class WholeModel:
    """All blocks loaded at once; a context manager that drops them again. Made by `Calibration.whole_model`.

    What is set here stays: blocks that are loaded later have it too.

    Attributes
    ----------
    layers : the linear layers of all blocks, and the head if it is one
    windows, held_out : token ids int64 [T] of the windows that methods may see, and of the others
    config_changes : fields of config.json that must change with them
    """

    def __init__(self, calibration: Feed) -> None:
        self.calibration, self.host = calibration, calibration.host
        self.layers: dict[str, LinearLayer] = self.host.layers
        self._changed: dict[str, Tensor] = {}
        self._altered: dict[str, None] = {}  # set since `changed` was last asked for
        self.config_changes: dict[str, Any] = {}
        self._base: dict[str, Tensor] = {}  # parameters under an override
        self._head_is_last: bool | None = None
        for number in range(len(self.host.blocks)):
            self.host.load_block(number)

    def __enter__(self) -> WholeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the blocks' memory back; what was set is kept for when they are loaded again."""
        self._keep()
        for number in range(len(self.host.blocks)):
            self.host.drop_block(number)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.host.device

    @property
    def model(self) -> Any:
        return self.host.model

    @property
    def anatomy(self) -> Anatomy:
        """Of the checkpoint; CalibrationError for a module that comes from none."""
        found = getattr(self.host, "anatomy", None)
        if not isinstance(found, Anatomy):
            raise CalibrationError(f"{type(self.model).__name__} comes from no checkpoint whose anatomy is known")
        return found

    @property
    def predicts(self) -> bool:
        """Whether outputs are logits over a vocabulary; those of an encoder are hidden states."""
        return has_logits(self.model)

    @property
    def windows_a_pass(self) -> int | None:
        """Windows that fit into the device's memory at once, if that is known."""
        return self.calibration.windows_a_pass

    def halve(self, windows: int) -> int:
        """How many to run at once where so many are too much; CalibrationError after one."""
        return halve_training(self.calibration, windows)

    @property
    def windows(self) -> list[Tensor]:
        return self._windows(self.calibration.batches[: self.calibration.batches_seen])

    @property
    def held_out(self) -> list[Tensor]:
        return self._windows(self.calibration.batches[self.calibration.batches_seen :])

    def _windows(self, batches: Sequence[Any]) -> list[Tensor]:
        if self.calibration.ids is None:
            raise CalibrationError(f"{type(self.model).__name__} has no token ids to be calibrated with")
        return [row for batch in batches for row in batch["input_ids"]]

    def weight(self, name: str) -> Tensor:
        """float32 [out, in], a copy; float64 where the model is."""
        slot = self.host.slots[name]
        return self._copy(slot).contiguous()

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace a linear layer's weight [out, in]."""
        layer, slot = self.layers[name], self.host.slots[name]
        part = slot.view(parameter_of(self.host, slot.parameter))
        if part.shape != weight.shape:
            raise ValueError(f"{name} takes {list(part.shape)}, not {list(weight.shape)}")
        part.copy_(weight.detach())
        self._note(layer.tensor)

    def tensor(self, tensor_name: str) -> Tensor:
        """float32 (float64) copy of any tensor, by its name in the checkpoint and as it is stored there."""
        return self._copy(self.host.tensor_slot(tensor_name))

    def _copy(self, slot: Slot) -> Tensor:
        part = slot.view(parameter_of(self.host, slot.parameter))
        return part.to("cpu", torch.promote_types(part.dtype, torch.float32), copy=True)

    def set_tensor(self, tensor_name: str, value: Tensor) -> None:
        """Replace any tensor. A head that the checkpoint lacks, because it is tied, gets a tensor of its own."""
        self.host.untie(tensor_name)
        slot = self.host.tensor_slot(tensor_name)
        slot.view(parameter_of(self.host, slot.parameter)).copy_(self.host.as_stored(tensor_name, value))
        self._note(tensor_name)

    @property
    def changed(self) -> Mapping[str, Tensor]:
        """Tensors that were set, by name in the checkpoint. Copied when asked for, not each time one of the experts in
        a stacked tensor is set."""
        self._keep()
        return self._changed

    def _keep(self) -> None:
        for name in self._altered:
            self._changed[name] = self.host.replaced[name] = self.tensor(name)
        self._altered.clear()

    def _note(self, tensor_name: str) -> None:
        self._altered[tensor_name] = None

    def state(self) -> WholeState:
        """What was set so far, to come back to."""
        changed = dict(self.changed)  # first: what was set and not yet noted in the host is noted there by this
        return WholeState(dict(self.host.replaced), changed, dict(self.config_changes))

    def back_to(self, state: WholeState) -> None:
        """Undo what was set since `state`."""
        self._keep()  # what was set is then known to the host, which undoes it
        self.host.revert(state.replaced)
        for number in range(len(self.host.blocks)):
            self.host.load_block(number)
        self._changed = dict(state.changed)
        self.config_changes.clear()
        self.config_changes.update(state.config_changes)

    @contextlib.contextmanager
    def overridden(self, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Within, the model computes with these weights (by layer) and tensors (by name); gradients flow into them."""
        before = {path: self._current(path) for path in self._base}
        values = override_values(self.host, {**weights, **(tensors or {})})
        added = [path for path in values if path not in self._base]
        self._base.update({path: self._current(path) for path in added})
        self._put(values)
        try:
            yield
        finally:
            self._put({**self._base, **before})
            for path in added:
                del self._base[path]

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """Within, no override counts."""
        now = {path: self._current(path) for path in self._base}
        self._put(self._base)
        try:
            yield
        finally:
            self._put(now)

    def _current(self, path: str) -> Tensor:
        module, leaf = self.host.owners(path)[0]
        found = module._parameters[leaf]
        assert found is not None
        return found

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for path, value in values.items():
            for module, leaf in self.host.owners(path):
                module._parameters[leaf] = value  # type: ignore[assignment]  # any tensor will do

    # Running --------------------------------------------------------------------------------------------------------

    def run(self, batch: Any) -> Tensor:
        """Logits (or the output, where there is no head) for a batch as the calibration has them, or token ids."""
        output = self.calibration.forward({"input_ids": batch} if self._are_ids(batch) else batch)
        logits = getattr(output, "logits", None)
        return logits if isinstance(logits, Tensor) else hidden_of(output)

    def _are_ids(self, batch: Any) -> bool:
        return isinstance(batch, Tensor) and self.calibration.ids is not None

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output layer reads [B, T, hidden] for token ids [B, T]; the logits themselves if more follows it."""
        if self._head_is_last is None:
            self._head_is_last = self._check_head(ids[:1, :4])
        ids = ids.to(self.host.device)
        return self._states(ids) if self._head_is_last else self.run(ids).float()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of what `hidden` gave."""
        if not self._head_is_last:
            return hidden.float()
        head = self.model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype)).float()  # type: ignore[no-any-return]

    def _states(self, ids: Tensor) -> Tensor:
        states: Tensor = self.model.base_model(ids).last_hidden_state
        return states

    def _check_head(self, ids: Tensor) -> bool:
        """Whether logits are the output layer of the base model's last hidden states and nothing else."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        base = getattr(self.model, "base_model", self.model)
        if head is None or base is self.model:
            return False
        ids = ids.to(self.host.device)
        with torch.no_grad():
            states = getattr(base(ids), "last_hidden_state", None)
            whole = self.model(ids).logits
        return isinstance(states, Tensor) and torch.allclose(head(states), whole, rtol=1e-4, atol=1e-5)

    # Gradients ------------------------------------------------------------------------------------------------------

    def fisher(self, names: Collection[str] | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Fisher information of layers' weights: float32 [out, in], the mean over sequences of squared gradients.

        The loss of a causal language model is its mean negative log-likelihood on the window (SqueezeLLM, arXiv
        2306.07629). Other models are their own reference: labels are drawn from a masked language model's own
        distribution, and outputs without one are taken as means of unit normal distributions.

        Takes three times the memory of the model's weights. Held-out windows do not count.
        """
        wanted = list(self.layers if names is None else names)
        paths = list(dict.fromkeys(self.host.slots[name].parameter for name in wanted))
        parameters: dict[str, nn.Parameter] = {}
        for path in paths:
            module, leaf = self.host.owners(path)[0]
            found = module._parameters[leaf]
            assert isinstance(found, nn.Parameter)
            found.requires_grad_(True)
            parameters[path] = found
        squares = {path: torch.zeros_like(p, dtype=torch.float32) for path, p in parameters.items()}
        generator = torch.Generator("cpu").manual_seed(seed)
        loss = EndLoss(self.model, self.calibration.ids is not None, generator)
        samples = 0
        try:
            for number, sample in enumerate(self._samples()):
                loss(self.run(sample), sample).backward()  # type: ignore[no-untyped-call]
                samples += 1
                for path, parameter in parameters.items():
                    if parameter.grad is not None:
                        squares[path].addcmul_(parameter.grad.float(), parameter.grad.float())
                        parameter.grad = None
                self.calibration.notify({"event": "fisher", "sample": number + 1})
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        for value in squares.values():
            value.div_(max(1, samples))
        return {name: self.host.slots[name].view(squares[self.host.slots[name].parameter]) for name in wanted}

    def _samples(self) -> Iterator[Any]:
        """One sequence at a time; batches of other modules as they are."""
        for batch in self.calibration.batches[: self.calibration.batches_seen]:
            if self.calibration.ids is None:
                yield batch
                continue
            for row in range(len(batch["input_ids"])):
                yield {name: value[row : row + 1] for name, value in batch.items()}
