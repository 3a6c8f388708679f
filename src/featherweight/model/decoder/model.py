"""`NativeModel`: a model folder, run by the native decoder on the CPU."""

from __future__ import annotations

import ctypes
import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError, FeatherWarning
from featherweight.model.decoder import native
from featherweight.model.decoder.native import Stats
from featherweight.model.decoder.network import Network, network_of
from featherweight.model.decoder.sampling import GenerationDefaults, Sampling, derived_seed, generation_defaults
from featherweight.model.decoder.weights import Weights, load_weights
from featherweight.model.decoder.worker import Task, Worker
from featherweight.native.library import CACHE_RANGE, INVALID, NO_MEMORY, NON_FINITE, OK
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.integrity import Verify
from featherweight.system.threads import thread_count

CHUNK = 512
"""Tokens of a prompt that go through the network together."""
SEQUENCES = 64
"""Sequences that can be generated at a time; one that is not used costs nothing."""

SHORT = 20_000_000
"""Bytes of weights and cache that are gone through in less than a twentieth of a second on any processor."""


class NativeModel:
    """A decoder with its weights and cache. Calls are made one after the other, also from several threads.

    Ctrl-C ends a call within a tenth of a second, wherever it is. What has gone through the network by then stays in
    the cache, and the model can be used again. Callbacks run in the thread that called; they cannot use this model.

    Attributes
    ----------
    network : sizes and settings.
    weights : packed layers.
    defaults : what the folder says about generation.
    context : most tokens of a sequence, prompt and answer.
    threads, kv_cache, precision : chosen when it was loaded.
    """

    def __init__(
        self,
        network: Network,
        weights: Weights,
        defaults: GenerationDefaults,
        *,
        threads: int | None = None,
        kv_cache: str = "float16",
        precision: str = "int8",
        context: int | None = None,
    ) -> None:
        self._c = native.functions()
        self.network, self.weights, self.defaults = network, weights, defaults
        self.threads = thread_count(threads)
        self.kv_cache = _choice("kv_cache", kv_cache, native.CACHES)
        self.precision = _choice("precision", precision, native.PRECISIONS)
        self.context = _context(context, network)
        self._calls = itertools.count()
        settings, keep = self._settings()
        place = ctypes.c_void_p()
        status = self._c.fw_decoder_new(ctypes.addressof(settings), ctypes.addressof(place))
        _check(status, "the network")
        self._place = int(place.value or 0)
        self._worker = Worker(partial(_halt, self._c, self._place))
        self._finalizer = weakref.finalize(self, _free, self._c, self._place, self._worker, (weights, keep))
        self._finalizer.atexit = False  # a thread of the user's may be in a call even then

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        kv_cache: str = "float16",
        precision: str = "int8",
        context: int | None = None,
        told: Callable[[int, int], None] | None = None,
        verify: Verify = None,
    ) -> NativeModel:
        """Open a folder, compressed or not.

        Parameters
        ----------
        folder : with config.json and safetensors.
        threads : default: FEATHERWEIGHT_THREADS, OMP_NUM_THREADS, or what the system lets us have.
        kv_cache : "float16", or "int8" with a scale for every head and token.
        precision : "int8" rounds the inputs of compressed layers; "float" computes exactly with them, more slowly.
        context : most tokens of a sequence; default: what the model was made for.
        told : gets (done, total) blocks while weights are packed.
        verify : whether each tensor is compared with its hash: "always", "never", or "auto", which here is always;
            default: what FEATHERWEIGHT_VERIFY says, else "auto".

        Raises
        ------
        UnsupportedModelError
            the native decoder does not run this model; transformers may.
        CheckpointError
            the folder is incomplete or damaged.
        """
        native.functions()  # before hours of packing
        thread_count(threads)
        with Checkpoint.open(folder) as checkpoint:
            network = network_of(checkpoint.config)
            for note in checkpoint.notes:
                warnings.warn(note, FeatherWarning, stacklevel=2)
            _context(context, network)
            weights = load_weights(checkpoint, network, threads, told, verify)
            defaults = generation_defaults(checkpoint.folder, checkpoint.config)
        return cls(network, weights, defaults, threads=threads, kv_cache=kv_cache, precision=precision, context=context)

    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        on_token: Callable[[int], object] | None = None,
        stops: Sequence[int] | None = None,
    ) -> list[int]:
        """Continue `tokens`; what the prompt has in common with the last one's text is not computed again.

        Parameters
        ----------
        tokens : the prompt, at least one.
        max_new_tokens : it ends there, at a stop token, or where the context does.
        sampling : default: the likeliest token. Its seed makes the call repeatable; without one, every call has
            random numbers of its own, the same in every run of a program.
        on_token : called with every new token; returning True ends the generation.
        stops : tokens that end the text and do not belong to it; default: those the folder names.

        Returns
        -------
        The new tokens.
        """

        def notify(made: list[int]) -> object:
            return on_token(made[0]) if on_token and made[0] >= 0 else None

        return self.generate_batch([tokens], max_new_tokens, sampling, notify if on_token else None, stops)[0]

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Sampling | Sequence[Sampling] | None = None,
        on_tokens: Callable[[list[int]], object] | None = None,
        stops: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue several prompts side by side, each as `generate` would.

        `sampling` is one for each, or one for all: then the first text has its seed and the others seeds derived from
        it, so that equal prompts give different texts. `on_tokens` gets each step's tokens, -1 for texts that have
        ended.
        """
        if not 1 <= len(prompts) <= SEQUENCES:
            raise FeatherError(f"{len(prompts)} prompts were given, the decoder takes 1 to {SEQUENCES} at a time")
        if max_new_tokens < 1:
            raise FeatherError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        most = min(max_new_tokens, self.context)
        flat = torch.cat([self._tokens(prompt) for prompt in prompts])
        each = self._seeded(sampling, len(prompts))
        samplings = (native.SamplingStruct * len(each))(*[native.sampling_struct(one) for one in each])
        ends = torch.tensor(list(self.defaults.stops if stops is None else stops), dtype=torch.int32)
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        made = torch.zeros(len(prompts), most, dtype=torch.int32)
        counts = torch.zeros(len(prompts), dtype=torch.int64)

        def call(task: Task[int]) -> int:
            notify = (
                native.OnTokens(lambda tokens, context: task.ask(tokens[: len(prompts)])) if on_tokens else _NO_TOKENS
            )
            request = native.GenerationStruct(
                len(prompts), flat.data_ptr(), lengths.data_ptr(), ctypes.addressof(samplings), ends.data_ptr(),
                len(ends), most, made.data_ptr(), counts.data_ptr(), notify, None,
            )  # fmt: skip
            return int(self._c.fw_decoder_generate(self._place, ctypes.addressof(request)))

        with self._worker.turn():
            status = self._worker.run(call, on_tokens)
        _check(status, "a generation")
        return [row[:count].tolist() for row, count in zip(made, counts.tolist(), strict=True)]

    def _seeded(self, sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
        """One sampling for each of `count` prompts, all with seeds."""
        own = derived_seed(0, next(self._calls) + 1)
        if sampling is None or isinstance(sampling, Sampling):
            one = sampling or Sampling()
            first = own if one.seed is None else one.seed
            return [replace(one, seed=derived_seed(first, place)) for place in range(count)]
        each = list(sampling)
        if len(each) != count:
            raise FeatherError(f"{len(each)} samplings were given for {count} prompts")
        return [
            replace(one, seed=derived_seed(own, place)) if one.seed is None else one for place, one in enumerate(each)
        ]

    def forward(self, tokens: Sequence[int]) -> Tensor:
        """Logits float32 [n, vocabulary] behind each of n tokens, from an empty cache."""
        flat = self._tokens(tokens)
        logits = torch.empty(len(flat), self.network.vocabulary)
        with self._worker.turn():
            self._worker.run_here(lambda: self._c.fw_decoder_truncate(self._place, 0, 0))
            self._feed(0, flat, logits)
        return logits

    def feed(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """Put tokens behind those a sequence has in the cache; logits float32 [vocabulary] of the last one."""
        logits = torch.empty(self.network.vocabulary)
        with self._worker.turn():
            self._feed(sequence, self._tokens(tokens, self.length(sequence)), logits)
        return logits

    def feed_all(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """As `feed`; logits float32 [n, vocabulary] behind each of the n tokens."""
        logits = torch.empty(len(tokens), self.network.vocabulary)
        with self._worker.turn():
            self._feed(sequence, self._tokens(tokens, self.length(sequence)), logits)
        return logits

    def keep(self, tokens: int, sequence: int = 0) -> None:
        """Forget what a sequence has in the cache behind its first `tokens` tokens."""
        if not 0 <= tokens <= self.length(sequence):
            raise FeatherError(f"sequence {sequence} has {self.length(sequence)} tokens, of which {tokens} are to stay")
        with self._worker.turn():
            self._worker.run_here(lambda: self._c.fw_decoder_truncate(self._place, sequence, tokens))

    def _feed(self, sequence: int, flat: Tensor, logits: Tensor) -> None:
        """In a turn: tokens into the cache; logits of all of them, or, if they are a vector, of the last one."""
        arguments = (self._place, sequence, flat.data_ptr(), len(flat), logits.data_ptr(), int(logits.dim() == 2))
        _check(self._run(len(flat), partial(self._c.fw_decoder_feed, *arguments)), "a forward pass")

    def _run(self, tokens: int, call: Callable[[], int]) -> int:
        """In a turn: call the library for so many tokens, in the worker if there may be time to interrupt it."""
        read = tokens * (self.weights.bytes_per_token + self.stats().cache_bytes)
        return self._worker.run_here(call) if read < SHORT else self._worker.run(lambda task: call())

    def step(self, tokens: dict[int, int]) -> Tensor:
        """One further token for each of several sequences {sequence: token}; logits float32 [n, vocabulary]."""
        sequences = torch.tensor(list(tokens), dtype=torch.int64)
        logits = torch.empty(len(tokens), self.network.vocabulary)
        with self._worker.turn():
            for sequence, token in tokens.items():
                self._tokens([token], self.length(sequence))
            flat = torch.tensor(list(tokens.values()), dtype=torch.int32)
            arguments = (self._place, sequences.data_ptr(), flat.data_ptr(), len(flat), logits.data_ptr())
            status = self._run(len(flat), partial(self._c.fw_decoder_step, *arguments))
        _check(status, "a step")
        return logits

    def length(self, sequence: int = 0) -> int:
        """Tokens that a sequence has in the cache."""
        if not 0 <= sequence < SEQUENCES:
            raise FeatherError(f"there is no sequence {sequence}, only 0 to {SEQUENCES - 1}")
        return int(self._c.fw_decoder_length(self._place, sequence))

    def reset(self) -> None:
        """Forget all sequences, give their memory back and begin to count anew."""
        with self._worker.turn():
            for sequence in range(SEQUENCES):
                self._worker.run_here(partial(self._c.fw_decoder_truncate, self._place, sequence, 0))
        self.stats(reset=True)

    def stats(self, reset: bool = False) -> Stats:
        """What has been done, and how long it took, since the last reset."""
        found = native.StatsStruct()
        self._c.fw_decoder_get_stats(self._place, ctypes.addressof(found), int(reset))
        return Stats(**{str(name): getattr(found, str(name)) for name, *_ in found._fields_})

    def _settings(self) -> tuple[native.SettingsStruct, list[Any]]:
        """The struct, and what it points to beside the weights."""
        network, weights = self.network, self.weights
        frequencies = network.rope.frequencies.to(torch.float32).contiguous()
        structs = [
            native.LayerStruct(
                window=window,
                **{role: norm.data_ptr() for role, norm in layer.norms.items()},
                **{role: linear.address for role, linear in layer.linears.items()},
            )
            for layer, window in zip(weights.layers, network.windows, strict=True)
        ]
        layers = (native.LayerStruct * network.layers)(*structs)
        dynamic = network.rope.dynamic
        settings = native.SettingsStruct(
            layers=network.layers,
            hidden=network.hidden,
            heads=network.heads,
            kv_heads=network.kv_heads,
            head_dim=network.head_dim,
            ffn=network.ffn,
            vocabulary=network.vocabulary,
            context=self.context,
            sequences=SEQUENCES,
            chunk=CHUNK,
            layer=ctypes.addressof(layers),
            embedding=weights.embedding.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=weights.head.address,
            frequencies=frequencies.data_ptr(),
            rope_scale=network.rope.scale,
            dynamic_base=dynamic.base if dynamic else 0.0,
            dynamic_factor=dynamic.factor if dynamic else 0.0,
            dynamic_length=dynamic.length if dynamic else 0,
            epsilon=network.epsilon,
            cache=native.CACHES[self.kv_cache],
            precision=native.PRECISIONS[self.precision],
            threads=self.threads,
        )
        return settings, [frequencies, layers]

    def _tokens(self, tokens: Sequence[int], before: int = 0) -> Tensor:
        """Tokens int32 [n] that fit the vocabulary and the context, behind `before` others."""
        if len(tokens) == 0:
            raise FeatherError("the prompt is empty; give at least one token")
        if before + len(tokens) > self.context:
            raise FeatherError(
                f"{before + len(tokens)} tokens do not fit the context of {self.context}; shorten the prompt"
            )
        flat = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        if int(flat.min()) < 0 or int(flat.max()) >= self.network.vocabulary:
            wrong = next(t for t in flat.tolist() if not 0 <= t < self.network.vocabulary)
            raise FeatherError(f"there is no token {wrong}, the vocabulary has {self.network.vocabulary}")
        return flat.to(torch.int32)


_NO_TOKENS = native.OnTokens()


def _halt(c: Any, place: int, stop: bool) -> None:
    c.fw_decoder_stop(place, int(stop))


def _free(c: Any, place: int, worker: Worker, keep: Any) -> None:
    """`keep` holds what the decoder points to until it is gone. No call is on its way: it would hold the model."""
    worker.close()
    c.fw_decoder_free(place)


def _choice(name: str, value: str, choices: dict[str, int]) -> str:
    if value not in choices:
        raise FeatherError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    return value


def _context(context: int | None, network: Network) -> int:
    if context is None:
        return network.context
    if context < 1:
        raise FeatherError(f"context is {context}, expected at least 1")
    return context


def _check(status: int, what: str) -> None:
    if status == OK:
        return
    if status == NO_MEMORY:
        raise MemoryError(f"the native decoder could not get memory for {what}")
    if status == NON_FINITE:
        raise FeatherError("the model's output is not a number: its weights are damaged, or the model overflows")
    if status == CACHE_RANGE:
        raise FeatherError(
            "a key or value of the model's attention is beyond 65504, the largest number of the half-precision cache: "
            "use --kv-cache int8 (kv_cache='int8'), which has scales, or --engine transformers"
        )
    assert status == INVALID
    raise FeatherError(f"the native decoder refused {what}")
