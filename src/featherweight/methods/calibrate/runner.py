"""Runs a network block by block over calibration samples, one block's weights in memory at a time.

Two streams of hidden states go through the blocks where a method asks for it: the one of the network as compressed so
far, and the one of the original network; they are paired token by token (GPTAQ, arXiv 2504.02692).

    with Calibration.open(checkpoint, anatomy, windows, settings, needs=("gram",)) as calibration:
        for session in calibration.blocks():
            for stage in session.stages:
                statistics = session.gather(stage, ("gram",))
                ...
                session.set_weight(name, weight)
            session.advance()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.batches import batch_bounds, batch_size, check_ids, expanded, split_bounds
from featherweight.methods.calibrate.fitting import fitting, move_through
from featherweight.methods.calibrate.groups import EXPERT_NUMBER
from featherweight.methods.calibrate.guided import GuidedFeed
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.token_weights import weights_of_block
from featherweight.methods.calibrate.whole import WholeModel
from featherweight.model.network.host import Host
from featherweight.model.network.module import ModuleHost
from featherweight.model.network.observe import InputRecorder, Probe
from featherweight.model.network.overrides import overridden
from featherweight.model.network.query_blocks import in_query_blocks
from featherweight.model.network.skeleton import Skeleton
from featherweight.model.network.streams import Capture, capture_first, hidden_of, to_device, to_host
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.memory import available_bytes
from featherweight.system.transformers_calls import asking_transformers

SPARE_SHARE = 4
"""The part of the free memory that is one over this may be filled with what passes would compute again."""


class Calibration(GuidedFeed):
    """A network and samples; `blocks` walks through it. Made by `open` or `of_module`; a context manager.

    Attributes
    ----------
    settings : CalibrationSettings
    hidden : hidden states in front of the present block, one [B, T, hidden] a batch, of the measured stream
    original_hidden : the same of the full-precision stream; the same list as `hidden` while they do not differ
    batches_seen : the batches before this number are for methods, the others are held out
    planned : of every batch, the number of the settings' batch that it is, or is a part of
    windows_a_pass : windows that a training of the whole model runs at once; None for as many as it wants
    spare_bytes : memory that passes over a block may fill with what they would compute again, where the network runs
    embeddings : what embeddings decode to, by layer, with which the measured stream begins; set it before `blocks`
    """

    def __init__(
        self,
        host: Host,
        forward: Callable[[Any], Any],
        batches: Sequence[Any],
        settings: CalibrationSettings,
        needs: Collection[str],
        *,
        batches_seen: int | None = None,
        planned: Sequence[int] | None = None,
        masks: Sequence[Tensor] | None = None,
        ids: Tensor | None = None,
        length: int | None = None,
        head: str | None = None,
        whole: bool = False,
        traced: bool = False,
        notify: Observer | None = None,
    ) -> None:
        self.host, self.forward, self.batches, self.settings = host, forward, list(batches), settings
        self.needs = frozenset(needs)
        self.batches_seen = len(self.batches) if batches_seen is None else batches_seen
        self.planned = list(range(len(self.batches)) if planned is None else planned)
        self.windows_a_pass: int | None = None
        self.masks, self.ids, self.length, self.head = masks, ids, length, head
        self.whole, self.traced = whole, traced
        self.notify = notify or silent
        self.two_streams = settings.stream == "quantized" and bool(self.needs & {"cross", "targets"})
        self.keeps_originals = self.two_streams or settings.stream == "original"
        self.stoppable = not whole
        self.hidden: list[Any] = []
        self.original_hidden: list[Any] = []
        self.embeddings: dict[str, Tensor] = {}
        self.spare_bytes = available_bytes() // SPARE_SHARE
        self.capture: Capture | None = None
        self._fisher: dict[str, Tensor] = {}

    # Opening --------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        windows: Tensor,
        settings: CalibrationSettings | None = None,
        needs: Collection[str] = ("gram",),
        *,
        attention_mask: Tensor | None = None,
        head: bool = False,
        outside: Collection[str] = (),
        device: torch.device | str = "cpu",
        windows_a_pass: int | None = None,
        notify: Observer | None = None,
    ) -> Calibration:
        """Calibrate a checkpoint that transformers has a class for.

        Parameters
        ----------
        windows : token ids int64 [sequences, length], see `featherweight.model.text.windows.windows`.
        needs : the statistics that will be gathered, and "targets" if outputs of original blocks are wanted.
        attention_mask : [sequences, length], 0 for padding, which leaves no trace in statistics.
        head : a last session holds the output layer; where that is tied, the embedding as the layer that it is there.
        outside : names of matrices outside the blocks that are going to be changed.
        device : where blocks run; the streams stay in main memory.
        windows_a_pass : the most windows that run at once; batches of more are run in parts, and trainings add up
            the gradients of these.
        """
        settings = settings or CalibrationSettings()
        windows, attention_mask = expanded(windows, attention_mask, settings)
        dtype = settings.torch_dtype(notify, device)
        last = _last_layer(anatomy) if head else None
        outside = {*outside, last.name} if last else set(outside)
        host = Skeleton(checkpoint, anatomy, dtype, device, outside=outside)
        plain = settings.token_weights == "attention" and not in_query_blocks(host.model)
        if plain:  # its probabilities can only be had whole
            host = Skeleton(checkpoint, anatomy, dtype, device, "eager", outside)
        check_ids(windows, host)
        times = settings.expansion
        held_out = times * settings.held_out_of(len(windows) // times) if "held_out_gram" in needs else 0
        size = batch_size(windows, settings, host if plain else None)
        bounds, planned = split_bounds(batch_bounds(len(windows), held_out, size), windows_a_pass)
        masks = None if attention_mask is None else [attention_mask[a:b].bool() for a, b in bounds]
        batches = [
            {"input_ids": windows[a:b]} | ({} if attention_mask is None else {"attention_mask": attention_mask[a:b]})
            for a, b in bounds
        ]

        def forward(batch: dict[str, Tensor]) -> Any:
            given = {name: value.to(host.device) for name, value in batch.items()}
            with running():
                return host.model(**given)

        opened = cls(
            host,
            forward,
            batches,
            settings,
            needs,
            batches_seen=sum(b <= len(windows) - held_out for _, b in bounds),
            planned=planned,
            masks=masks,
            ids=windows,
            length=windows.shape[1],
            head=last.name if last else None,
            traced=anatomy.family != "structure",
            notify=notify,
        )
        opened.windows_a_pass = windows_a_pass
        return opened

    @classmethod
    def of_module(
        cls,
        module: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        batches: Sequence[Any],
        settings: CalibrationSettings | None = None,
        needs: Collection[str] = ("gram",),
        *,
        blocks: str | None = None,
        convolutions: bool = False,
        notify: Observer | None = None,
    ) -> Calibration:
        """Calibrate any module in memory; its linear layers are changed in place.

        Until `close` the module is in evaluation mode and its parameters take no gradients; then both are as before.

        Parameters
        ----------
        forward : runs the module on one batch.
        batches : whatever `forward` takes, one at a time.
        blocks : path of the list of blocks; None looks for the longest list of alike modules through which hidden
            states go one after the other, and takes the whole module as one block where there is none; "" does
            so in any case.
        convolutions : they are layers too, seen as matrices [out, in / groups * product of kernel] whose inputs are
            unfolded, one row a position of the output. Of those in groups no statistics are gathered, as every
            group has inputs of its own: they count as starved, and `notify` is told.
        """
        settings = settings or CalibrationSettings()
        if not batches:
            raise CalibrationError("calibration needs at least one batch")
        if settings.token_weights != "none":
            raise CalibrationError("calibration.token_weights can be used with language models only; set it to none")
        if settings.guidance:
            raise CalibrationError(
                "calibration.guidance can be used with token ids of language models only; set it to 0"
            )
        held_out = settings.held_out_of(len(batches)) if "held_out_gram" in needs else 0
        host = ModuleHost(module, forward, batches[0], blocks, convolutions)
        for name, reason in host.unmeasured.items():
            (notify or silent)({"event": "unmeasured", "layer": name, "reason": reason})
        return cls(
            host,
            lambda batch: forward(module, batch),
            batches,
            settings,
            needs,
            batches_seen=len(batches) - held_out,
            whole=host.whole,
            traced=True,
            notify=notify,
        )

    @classmethod
    def of_tokens(
        cls,
        model: nn.Module,
        windows: Tensor,
        settings: CalibrationSettings | None = None,
        needs: Collection[str] = ("gram",),
        *,
        blocks: str | None = None,
        notify: Observer | None = None,
    ) -> Calibration:
        """Calibrate a language model in memory; as `of_module`, with windows of tokens as `open` has them.

        Parameters
        ----------
        model : takes `input_ids` int64 [B, T], on the device of its parameters.
        windows : token ids int64 [sequences, length].

        Raises
        ------
        CalibrationError
            the windows are no token ids, or attention is wanted as weights and cannot be had.
        """
        settings = settings or CalibrationSettings()
        windows, _ = expanded(windows, None, settings)
        if settings.token_weights == "attention" and not in_query_blocks(model):
            raise CalibrationError(
                f"calibration.token_weights is 'attention', which {type(model).__name__} does not give; use 'first', "
                "'frequency' or 'none'"
            )
        times = settings.expansion
        held_out = times * settings.held_out_of(len(windows) // times) if "held_out_gram" in needs else 0
        bounds = batch_bounds(len(windows), held_out, batch_size(windows, settings, None))
        batches = [{"input_ids": windows[a:b]} for a, b in bounds]

        def forward(module: nn.Module, batch: dict[str, Tensor]) -> Any:
            return module(**{name: value.to(host_device) for name, value in batch.items()})

        host_device = next(model.parameters()).device
        host = ModuleHost(model, forward, batches[0], blocks)
        return cls(
            host,
            lambda batch: forward(model, batch),
            batches,
            settings,
            needs,
            batches_seen=sum(b <= len(windows) - held_out for _, b in bounds),
            ids=windows,
            length=windows.shape[1],
            whole=host.whole,
            traced=True,
            notify=notify,
        )

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the streams and the blocks' weights back."""
        self.hidden, self.original_hidden, self.capture = [], [], None
        for number in range(len(self.host.blocks)):
            self.host.drop_block(number)
        self.host.close()

    # Walking --------------------------------------------------------------------------------------------------------

    def blocks(self, first: int = 0) -> Iterator[BlockSession]:
        """A session for every block from number `first` on, and for the head if asked for.

        Blocks before `first` stay as they are. A session that was not advanced is advanced when the next is asked for.
        """
        if self._guidance is None:
            self.guide()
        fitting(self, self._start)
        for number, module in enumerate(self.host.blocks):
            self.host.load_block(number)
            layers = [layer for layer in self.host.layers.values() if layer.block == number]
            session = BlockSession(self, number, module, layers)
            if number >= first:
                yield session
            session.advance()
        if self.head:
            session = BlockSession(self, len(self.host.blocks), self.host.model, [self.host.layers[self.head]])
            yield session
            session.advance()

    def _start(self) -> None:
        """Find the hidden states in front of the first block, and the Fisher information if it is needed."""
        if "fisher" in self.needs and not self._fisher:
            with self.whole_model() as whole:
                self._fisher = whole.fisher(seed=self.settings.seed)
        if self.whole:
            self.hidden = list(self.batches)
            self.original_hidden = self.hidden
            return
        self.capture = Capture(self.forward, self.host.blocks, self._in_tuple())
        self.hidden, originals = [], list[Any]()
        for index, batch in enumerate(self.batches):
            hidden = to_host(self.capture.add(batch), copy=True)
            if self.embeddings and self.settings.stream == "quantized":
                originals += [hidden] if self.two_streams else []
                with overridden(self.host, self.embeddings):
                    hidden = to_host(capture_first(self.forward, self.host.blocks[0], batch)[0].detach(), copy=True)
            self.hidden.append(hidden)
            self.notify({"event": "embedded", "batch": index + 1, "batches": len(self.batches)})
        self.original_hidden = originals or self.hidden

    def _in_tuple(self) -> bool:
        """Whether a block gives a tuple, tried on the first block and the first batch."""
        block = self.host.load_block(0)
        hidden, arguments = capture_first(self.forward, block, self.batches[0])
        with torch.no_grad(), running():
            output = arguments.call(block, hidden)
        if hidden_of(output).shape != hidden.shape:
            raise CalibrationError(
                f"a block makes {list(hidden_of(output).shape)} of {list(hidden.shape)}, which block-by-block "
                "calibration cannot follow; calibrate the model as one whole module"
            )
        return isinstance(output, tuple | list)

    def call(self, index: int, hidden: Any, batch_index: int) -> Tensor:
        """The output of block `index` (or of what follows the last one) for hidden states of a batch."""
        if self.whole:
            return hidden_of(self.forward(hidden))
        assert self.capture is not None
        hidden = to_device(hidden, self.host.device)
        if index == len(self.host.blocks):
            output = self.capture.after(self.batches[batch_index], hidden)
            return hidden_of(getattr(output, "logits", output))
        return hidden_of(self.capture.arguments[batch_index][index].call(self.host.blocks[index], hidden))

    def move(self, session: BlockSession) -> None:
        """Both streams through a session's block; used by `BlockSession.advance`."""
        last = session.index == len(self.host.blocks) - 1 and not self.head
        if not last and not self.whole and session.index < len(self.host.blocks):
            self._move_streams(session)
        if session.index < len(self.host.blocks):
            self.host.drop_block(session.index)
        self.notify({"event": "advanced", "block": session.index, "of": len(self.host.blocks) + bool(self.head)})

    def _move_streams(self, session: BlockSession) -> None:
        apart = self.original_hidden is not self.hidden
        with torch.no_grad():
            if self.two_streams and (apart or session.differs):
                originals = session.original_outputs()
                move_through(self, session, self.hidden)
                self.original_hidden = originals
            elif self.settings.stream == "original":
                with session.original():
                    move_through(self, session, self.hidden)
            else:
                move_through(self, session, self.hidden)

    def whole_model(self) -> WholeModel:
        """All blocks in memory; a context manager. Use it before `blocks`, or instead."""
        return WholeModel(self)

    def fisher(self, name: str) -> Tensor:
        """float32 [out, in], of the original model; "fisher" must be among the needs."""
        if name not in self._fisher:
            raise ValueError(f"there is no Fisher information of {name}: declare 'fisher' in the calibration's needs")
        return self._fisher[name].contiguous().cpu()

    # What sessions ask ----------------------------------------------------------------------------------------------

    def order_groups(self, session: BlockSession, groups: list[list[str]]) -> list[list[str]]:
        """Groups in order of execution; found by running the first batch where no family file gives the order."""
        if self.traced or session.index >= len(self.host.blocks):
            return groups
        probes = {g[0]: Probe(self.host.slots[g[0]], session.layers[g[0]].expert) for g in groups}
        with torch.no_grad():
            recorder = InputRecorder(self.host.model, probes, stop=False)
            seen = fitting(self, lambda: recorder.run(lambda: self.call(session.index, self.hidden[0], 0)))
        order: dict[str, int] = {}
        keys = {g[0]: EXPERT_NUMBER.sub("", session.layers[g[0]].input_group) for g in groups}
        for place, name in enumerate(seen):
            order.setdefault(keys[name], place)
        return sorted(groups, key=lambda group: order.get(keys[group[0]], len(seen)))

    def mask_of(self, batch: int) -> Tensor | None:
        """bool [B, T], False for padding; None where there is none."""
        return None if self.masks is None else self.masks[batch]

    def batch_tokens(self, batch: int) -> int:
        """B * T of a batch of hidden states."""
        hidden = self.hidden[batch]
        return 0 if self.whole else hidden.numel() // hidden.shape[-1]

    def first_window(self, batch: int) -> int:
        """The number of a batch's first window."""
        return sum(len(b["input_ids"]) for b in self.batches[:batch])

    def place_of(self, batch: int, token: int) -> dict[str, int]:
        """Sequence and token in it, of a token of a batch."""
        if self.length is None:
            return {"token": token}
        return {"sequence": self.first_window(batch) + token // self.length, "token": token % self.length}

    def token_weights(self, session: BlockSession) -> list[Tensor] | None:
        """Weights [B, T] of every batch for a block, mean one in each sequence; None where tokens are equal."""
        return weights_of_block(self, session)


def running() -> AbstractContextManager[None]:
    """What a model's own class cannot do with a text becomes a sentence; a device that is full is halved for."""
    action, full = "run the network on the calibration text", (torch.OutOfMemoryError,)
    return asking_transformers(action, error=CalibrationError, passing=full)


def _last_layer(anatomy: Anatomy) -> LinearLayer | None:
    """The output layer; the token embedding where that is its weight."""
    return anatomy.embedding if anatomy.head is None and anatomy.tied_head is not None else anatomy.head
