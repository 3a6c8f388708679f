"""One block of a network in memory: gathers statistics, takes new weights, moves the streams on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.methods.calibrate.accumulate import Accumulator, difference_of
from featherweight.methods.calibrate.feed import Feed
from featherweight.methods.calibrate.fitting import fitting, halve, split
from featherweight.methods.calibrate.groups import groups_of, stages_of
from featherweight.methods.calibrate.guided import LayerWeights
from featherweight.methods.calibrate.statistics import gathered_names, known_statistics
from featherweight.model.network.host import parameter_of
from featherweight.model.network.observe import InputRecorder, Probe, Seen
from featherweight.model.network.overrides import overridden
from featherweight.model.network.placement import Slot
from featherweight.model.network.replay import PRESENT, Replay
from featherweight.model.network.streams import Captured, to_host
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer

TARGETS = "targets"
"""A need that is no statistic: outputs of the original blocks."""


class BlockSession:
    """A block with its weights loaded, and the samples in front of it.

    Attributes
    ----------
    index : number of the block; the number of blocks for the head, which is a session of its own
    names : its linear layers
    layers : the anatomy's description of them
    groups : the names by shared input, in order of execution
    stages : the names by what can be gathered in one pass, in order of execution: all groups of a stage are upstream of
        the next; one single stage where the settings are not sequential
    module : the block, float, in evaluation mode
    inputs : hidden states of the stream that is measured, one [B, T, hidden] a batch; the held-out batches come last
    changed : tensors given to `set_tensor`, by name
    starved : layers whose last gathered statistics are of too few tokens -> tokens
    non_finite : layers into which NaN or infinity went -> where that began
    weighing : what tokens count for each layer, where the loss's gradients say so
    remembers : whether `restore` is wanted; then what the block was loaded with is kept beside what replaces it. It is
        for the head, which nobody loads again: advancing gives it back what it had
    """

    def __init__(self, calibration: Feed, index: int, module: nn.Module, layers: Sequence[LinearLayer]) -> None:
        self.calibration, self.index, self.module = calibration, index, module
        self.host = calibration.host
        self.layers = {layer.name: layer for layer in layers}
        self.names = list(self.layers)
        self.groups = calibration.order_groups(self, groups_of(layers))
        self.stages = stages_of(self.groups, self.layers) if calibration.settings.sequential else [self.names]
        self.changed: dict[str, Tensor] = {}
        self.starved: dict[str, int] = {}
        self.non_finite: dict[str, dict[str, Any]] = {}
        self.effective_tokens: float | None = None
        self.weighing = LayerWeights(calibration)
        self.remembers = index >= len(self.host.blocks)
        self._originals: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._targets: list[Tensor] | None = None
        self._weights: Sequence[Tensor] | None = None
        self._advanced = False
        self._replay: Replay | None = None
        self._borrowed = 0  # how many overrides are in force
        self._showing_original = False

    @property
    def device(self) -> torch.device:
        """Where the block runs."""
        return self.host.device

    # Weights --------------------------------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """float32 [out, in], a copy of what the block computes with now."""
        slot = self.host.slots[name]
        return slot.view(parameter_of(self.host, slot.parameter)).to("cpu", torch.float32, copy=True).contiguous()

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Let the block compute with `weight` [out, in] from now on."""
        self._set(self.host.slots[name], weight)

    def tensor(self, tensor_name: str) -> Tensor:
        """float32 copy of another tensor of the checkpoint (a norm, a bias), as it is stored there."""
        slot = self.host.tensor_slot(tensor_name)
        return slot.view(parameter_of(self.host, slot.parameter)).to("cpu", torch.float32, copy=True)

    def set_tensor(self, tensor_name: str, value: Tensor) -> None:
        """Replace another tensor of the checkpoint; it is noted in `changed` as it will be stored, and used so."""
        slot = self.host.tensor_slot(tensor_name)
        stored = self.host.as_stored(tensor_name, value)
        self._set(slot, stored)
        self.changed[tensor_name] = stored.clone()

    def add_bias(self, name: str, bias: Tensor) -> None:
        """Add [out] to the bias of a layer; a layer without one gets one, noted in `changed` as NAME.bias."""
        layer = self.layers.get(name) or self.host.layers.get(name)
        tensor_name = (layer.bias if layer else None) or f"{name}.bias"
        self.set_tensor(tensor_name, self.tensor(tensor_name) + bias)

    def _set(self, slot: Slot, value: Tensor) -> None:
        self._before_change()
        data = self._remembered(slot)
        part = slot.view(data)
        if part.shape != value.shape:
            raise ValueError(f"{slot.parameter} takes {list(part.shape)}, not {list(value.shape)}")
        part.copy_(value.detach())

    @contextlib.contextmanager
    def overridden(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, the block computes with these weights [out, in] instead; gradients flow into them.

        Tensors of the checkpoint may be given by name too.
        """
        self._borrowed += 1
        try:
            with overridden(self.host, weights):
                yield
        finally:
            self._borrowed -= 1

    def rebase(self) -> None:
        """Take the present weights for the original ones: a transform has changed them, but not the function."""
        self._originals = {}
        self._forget()

    def restore(self) -> None:
        """Make the block what it was before anything was set; `remembers` must have been true since."""
        for path, value in self._loaded.items():
            parameter_of(self.host, path).copy_(value)
        self.changed.clear()
        self._originals = {}
        self._forget()

    @property
    def differs(self) -> bool:
        """Whether the block computes with other weights than the original's."""
        return bool(self._originals)

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """Within, the block computes with the original weights."""
        now = {path: parameter_of(self.host, path) for path in self._originals}
        self._put(self._originals)
        before, self._showing_original = self._showing_original, True
        try:
            yield
        finally:
            self._showing_original = before
            self._put(now)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for path, value in values.items():
            module, leaf = self.host.owners(path)[0]
            parameter = module._parameters[leaf]
            assert parameter is not None
            parameter.data = value

    # Samples --------------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> list[Tensor]:
        """Hidden states in front of the block, of the batches that methods may see."""
        return self.calibration.hidden[: self.calibration.batches_seen]

    @property
    def held_out_inputs(self) -> list[Tensor]:
        return self.calibration.hidden[self.calibration.batches_seen :]

    @property
    def targets(self) -> list[Tensor]:
        """Outputs of the original block on the full-precision stream, for every batch of `inputs`; made when asked.

        Needs "targets" among the calibration's needs.
        """
        return self.original_outputs()[: self.calibration.batches_seen]

    @property
    def held_out_targets(self) -> list[Tensor]:
        return self.original_outputs()[self.calibration.batches_seen :]

    def original_outputs(self) -> list[Tensor]:
        """Outputs of the original block on the full-precision stream, for every batch."""
        if not self.calibration.keeps_originals:
            raise ValueError("targets are there only if 'targets' or 'cross' is among the needs of the calibration")
        if self._targets is None:
            self._targets = fitting(self.calibration, self._originals_moved, self.halved)
        return self._targets

    def run(self, hidden: Any, batch_index: int, probed: Collection[str] = ()) -> Tensor:
        """The block's output for `hidden` with the arguments captured for a batch; differentiable.

        probed : paths of modules whose inputs somebody watches meanwhile
        """
        stream = None if torch.is_grad_enabled() or self._borrowed else self._stream_of(hidden, batch_index)
        if stream is None or self.index >= len(self.host.blocks):
            return self.calibration.call(self.index, hidden, batch_index)
        if self._replay is None:
            self._replay = self._replay_of_block()
        with self._replay.running((stream, batch_index), probed):
            return self.calibration.call(self.index, hidden, batch_index)

    def _stream_of(self, hidden: Any, batch_index: int) -> str | None:
        """By name, whose weights run and on which stream; None for hidden states that are in neither."""
        weights = "original" if self._showing_original else PRESENT
        for name, stream in (("hidden", self.calibration.hidden), ("original", self.calibration.original_hidden)):
            if hidden is stream[batch_index]:
                return f"{weights}:{name}"
        return None

    def _replay_of_block(self) -> Replay:
        stages = [[self.host.slots[name].parameter for name in stage] for stage in self.stages]
        root = next((path for path, module in self.host.model.named_modules() if module is self.module), "")
        return Replay(self.module, root, stages, self.calibration.spare_bytes)

    def _forget(self, path: str | None = None) -> None:
        """Drop what passes have kept that depends on a parameter, or all of it."""
        if self._replay is None:
            return
        if path is None:
            self._replay.clear()
        else:
            self._replay.changed(path)

    @property
    def output_layer(self) -> str | None:
        """Name of the output layer behind the last block; None for other blocks, and where no checkpoint names one."""
        anatomy = getattr(self.host, "anatomy", None)
        if self.index != len(self.host.blocks) - 1 or not isinstance(anatomy, Anatomy):
            return None
        return anatomy.head.name if anatomy.head else next((head for head, _ in anatomy.tied), None)

    def output_weight(self) -> Tensor:
        """float32 [vocabulary, hidden] of the output layer, a copy."""
        weight: Tensor = self._output_module().weight
        return weight.detach().to("cpu", torch.float32, copy=True)

    def output_inputs(self, hidden: Tensor, batch_index: int) -> Tensor:
        """What the output layer reads [B, T, hidden] for the last block's output; its product is not computed."""
        found: list[Tensor] = []

        def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.append(arguments[0])
            raise Captured

        handle = self._output_module().register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(Captured):
                self.calibration.call(len(self.host.blocks), hidden, batch_index)
        finally:
            handle.remove()
        return found[0]

    def _output_module(self) -> Any:
        model: Any = self.host.model
        return model.get_output_embeddings()

    def _originals_moved(self) -> list[Tensor]:
        with torch.no_grad(), self.original():
            return [to_host(self.run(hidden, i).detach()) for i, hidden in enumerate(self.calibration.original_hidden)]

    @property
    def whole_batches(self) -> list[list[int]]:
        """Numbers of the batches that make up each batch of the settings; a device may run one in parts."""
        found: dict[int, list[int]] = {}
        for number, planned in enumerate(self.calibration.planned):
            found.setdefault(planned, []).append(number)
        return list(found.values())

    def halve(self) -> None:
        """Split all batches, as passes do for which the device's memory does not suffice; a word goes to the log.

        Raises
        ------
        CalibrationError
            They are of one window.
        """
        self.halved(halve(self.calibration))

    def halved(self, parts: list[list[int]]) -> None:
        """The batches were split into parts of these sizes: do so with what is known of them."""
        self._forget()
        if self._targets is not None:
            self._targets[:] = split(self._targets, parts)
        self._weights = None if self._weights is None else split(self._weights, parts)

    # Statistics -----------------------------------------------------------------------------------------------------

    def gather(self, names: Collection[str], needs: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """Statistics of layers, from one run of the block over all samples with its present weights.

        Layers of one group share their tensors. `tokens` is always there; the others only where tokens were seen. Asked
        for "held_out_gram" alone, it runs held-out samples only: `tokens` is 0 then and no layer counts as starved.
        """
        unknown = [name for name in needs if name not in known_statistics() and name != TARGETS]
        if unknown:
            raise ValueError(f"no statistics are called {', '.join(unknown)}")
        known = gathered_names()
        wanted = [need for need in needs if need in known]
        groups = self._gathered_together(names)
        found: dict[str, dict[str, Tensor]] = {}
        self._before_change()
        accumulators = fitting(self.calibration, lambda: self._accumulate(list(groups), wanted), self.halved)
        for first, members in groups.items():
            statistics = accumulators[first].finish()
            tokens = int(statistics["tokens"])
            for name in members:
                found[name] = statistics
                self.starved.pop(name, None)
                if wanted != ["held_out_gram"] and tokens < self.calibration.settings.least_tokens(
                    self.layers[name].shape[1]
                ):
                    self.starved[name] = tokens
                if first in self.non_finite:
                    self.non_finite[name] = self.non_finite[first]
        return found

    def _gathered_together(self, names: Collection[str]) -> dict[str, list[str]]:
        """The layers that have the same statistics, by one of them: those that share an input, unless the loss's
        gradients weigh the tokens of each layer on its own."""
        if self.calibration.settings.guidance:
            return {name: [name] for group in self.groups for name in group if name in names}
        return {group[0]: [n for n in group if n in names] for group in self.groups if any(n in names for n in group)}

    def _accumulate(self, firsts: list[str], needs: list[str]) -> dict[str, Accumulator]:
        calibration = self.calibration
        kept = {
            name: Accumulator(self.layers[name].shape[1], needs, self.host.device, self.weighing.runs(name))
            for name in firsts
        }
        observer, probed = self._observer(firsts), [self._probe(name).module for name in firsts]
        stream = calibration.hidden
        for index in range(calibration.batches_seen if needs == ["held_out_gram"] else 0, len(stream)):
            held_out = index >= calibration.batches_seen
            if held_out and "held_out_gram" not in needs:
                break
            with torch.no_grad():
                with self.original() if calibration.settings.stream == "original" else contextlib.nullcontext():
                    seen = observer.run(lambda i=index: self.run(stream[i], i, probed))  # type: ignore[misc]
                other: dict[str, list[Seen]] = {}
                if "cross" in needs and not held_out and calibration.two_streams:
                    with self.original():
                        other = observer.run(lambda i=index: self.run(calibration.original_hidden[i], i, probed))  # type: ignore[misc]
                for name, accumulator in kept.items():
                    self._add(accumulator, name, index, seen.get(name, []), other.get(name, []), held_out)
            calibration.notify({"event": "gathered", "block": self.index, "batch": index + 1, "batches": len(stream)})
        return kept

    def _observer(self, firsts: list[str]) -> InputRecorder:
        probes = {name: self._probe(name) for name in firsts}
        experts = {(p.mixture, p.expert) for p in probes.values() if p.expert is not None}
        others = [self._probe(group[0]) for group in self.groups if not probes.keys() & set(group)]
        helpers = [probe for probe in others if probe.expert is not None and (probe.mixture, probe.expert) in experts]
        return InputRecorder(self.host.model, probes, helpers, stop=self.calibration.stoppable)

    def _probe(self, name: str) -> Probe:
        return Probe(self.host.slots[name], self.layers[name].expert)

    def _add(
        self, accumulator: Accumulator, name: str, batch: int, seen: list[Seen], other: list[Seen], held_out: bool
    ) -> None:
        for call, one in enumerate(seen):
            rows, tokens = one.rows, one.tokens
            partner = other[call] if call < len(other) else None
            difference = None if partner is None else difference_of(one, partner, self.calibration.batch_tokens(batch))
            block = None if self._weights is None else self._weights[batch]
            weights = self.weighing.of_rows(name, batch, rows, tokens, block)
            keep = self._kept(name, batch, rows, tokens, difference)
            if keep is not None:
                rows = rows[keep]
                weights = None if weights is None else weights[..., keep]
                difference = None if difference is None else difference[keep]
            if held_out:
                accumulator.add_held_out(rows, weights)
            else:
                accumulator.add(rows, weights, difference)

    def _kept(
        self, name: str, batch: int, rows: Tensor, tokens: Tensor | None, difference: Tensor | None
    ) -> Tensor | None:
        """Which rows count: those of real tokens with finite values. None for all."""
        if bool(torch.isfinite(rows.sum() if difference is None else rows.sum() + difference.sum())):
            finite = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        else:
            finite = torch.isfinite(rows).all(1)
        if difference is not None:
            finite &= torch.isfinite(difference).all(1)
        mask = self.calibration.mask_of(batch)
        if mask is not None:
            mask = mask.reshape(-1).to(rows.device)
            mask = mask if tokens is None else mask[tokens]
            mask = mask if len(mask) == len(rows) else None
        bad = ~finite if mask is None else ~finite & mask
        if bool(bad.any()) and name not in self.non_finite:
            row = int(bad.nonzero()[0])
            token = row if tokens is None else int(tokens[row])
            self.non_finite[name] = {"batch": batch, **self.calibration.place_of(batch, token)}
            self.calibration.notify(
                {"event": "non-finite", "layer": name, "block": self.index, **self.non_finite[name]}
            )
        if mask is None:
            return None if bool(finite.all()) else finite
        return finite & mask

    def _before_change(self) -> None:
        """Token weights of a block are found once, with the block as it was before any of its layers changed."""
        if self._weights is None:
            self._weights = fitting(self.calibration, lambda: self.calibration.token_weights(self), self.halved)

    # Moving on ------------------------------------------------------------------------------------------------------

    def skip(self, decoded: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
        """Finish a block that an earlier run has treated: set its weights and tensors, and advance."""
        for name, value in changed.items():
            slot = self.host.tensor_slot(name)
            self._keep_and_copy(slot, value)
            self.changed[name] = value
        for name, weight in decoded.items():
            self._keep_and_copy(self.host.slots[name], weight)
        self.advance()

    def _keep_and_copy(self, slot: Slot, value: Tensor) -> None:
        slot.view(self._remembered(slot)).copy_(value.detach())

    def _remembered(self, slot: Slot) -> Tensor:
        """The data of a slot's parameter, of which copies are kept where they are asked for before it changes."""
        self._forget(slot.parameter)
        data = parameter_of(self.host, slot.parameter)
        if self.calibration.keeps_originals and slot.parameter not in self._originals:
            self._originals[slot.parameter] = data.clone()
        if self.remembers and slot.parameter not in self._loaded:
            self._loaded[slot.parameter] = data.clone()
        return data

    def advance(self) -> None:
        """Move the streams through the block and drop its weights. Calling it again does nothing."""
        if not self._advanced:
            self._advanced = True
            self.calibration.move(self)
            if self.index >= len(self.host.blocks):
                for path, value in self._loaded.items():
                    parameter_of(self.host, path).copy_(value)
            self._forget()
            self._originals, self._loaded, self._targets, self._weights = {}, {}, None, None
