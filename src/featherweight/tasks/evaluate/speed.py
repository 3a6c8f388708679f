"""Speed of a model beside the limit of the machine it runs on.

Generating one token reads every weight once, and the keys and values of all tokens before it, so memory bandwidth
bounds the rate: the share reached is bytes per token x tokens per second / bandwidth. The bandwidth is measured in the
same run, before and after, by reading a buffer far larger than any cache with all threads; the better figure counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from featherweight.errors import EvaluationError, FeatherError
from featherweight.native.measure import READ_BYTES
from featherweight.native.measure import read_bandwidth as native_read_bandwidth
from featherweight.storage.checkpoint.size import bytes_per_token
from featherweight.system.devices import device_named, give_back, peak_bytes, synchronise
from featherweight.system.memory import peak_memory_bytes, reset_peak_memory
from featherweight.system.transformers_calls import asking_transformers, cache_name
from featherweight.tasks.evaluate.model_checks import own_context
from featherweight.tasks.evaluate.opening import open_model

if TYPE_CHECKING:
    from featherweight.model.decoder.model import NativeModel

BUFFER_BYTES = READ_BYTES
REPEATS = 3
"""Each figure is the best of so many runs; interference only ever makes a run slower."""
ENGINES = ("auto", "native", "transformers")
CACHES = ("auto", "float16", "int8")
CPU = torch.device("cpu")
CPU_ONLY = "the native decoder, and its KV caches, are on the CPU"


class Runner(Protocol):
    """A loaded model as the measurement uses it. Its `device` is waited for, and its memory's bandwidth the limit."""

    name: str
    device: torch.device
    context: int | None  # positions the model was made for
    vocabulary: int
    facts: dict[str, Any]  # what the report says about it

    def prefill(self, tokens: Tensor) -> None:
        """Process int64 [length] from an empty cache, up to the logits of the last."""

    def generate(self, count: int) -> None:
        """Behind what was processed last, process `count` single tokens, each time the likeliest."""

    def weight_bytes(self) -> int | None:
        """Bytes of weights read for a token, in the form they have in memory; None if that is the stored one."""

    def cache_bytes(self) -> int:
        """Bytes of keys and values of one position."""

    def kernel_seconds(self) -> float | None:
        """Seconds within matrix products and attention since the start; None if that is not known."""


def measure_speed(
    folder: str | Path,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    *,
    dtype: str = "auto",
    context_tokens: int | None = None,
    engine: str = "auto",
    cache: str = "auto",
    threads: int | None = None,
    repeats: int = REPEATS,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Prompt processing, greedy generation (tokens a second), and the read bandwidth (1e9 bytes/s).

    context_tokens : tokens before the generated ones; the prompt if None
    engine : "native" decodes in C++, "transformers" takes any family; "auto" is the first that can
    cache : "float16" or "int8" keys and values (native only)
    device : where the model runs, see `featherweight.compress`; off the CPU transformers runs it. None: on the GPU, if
        there is one and `engine` does not say otherwise, else on the CPU

    `bytes_per_token` counts what is read for a token: all weights but the input embedding (of which one row is read,
    unless the output layer shares it) and the experts a token is not sent to, in the form they have in memory, and the
    cache in the middle of the generation. `stored_bytes_per_token` counts the weights as they are in the folder.
    """
    _check(prompt_tokens, new_tokens, context_tokens, engine, cache)
    runs_on = None if device is None else device_named(device)
    bandwidth = read_bandwidth(runs_on, threads=threads)
    give_back(runs_on or CPU)
    reset_peak_memory()
    begun = time.perf_counter()
    runner = open_runner(folder, dtype, engine, cache, threads, trust_remote_code, device=runs_on)
    load_seconds = time.perf_counter() - begun
    prompt_tokens, new_tokens = _fitting(runner.context, prompt_tokens, new_tokens)
    before = prompt_tokens if context_tokens is None else min(context_tokens, prompt_tokens)
    prompt = torch.arange(prompt_tokens).remainder_(runner.vocabulary)
    prefill = _best(lambda: runner.prefill(prompt), runner.device, repeats)
    decode, within = _decode(runner, prompt[:before], new_tokens, repeats)
    peak = peak_memory_bytes()
    bytes_read = bytes_read_per_token(runner, folder, before + new_tokens // 2)
    bandwidth = max(bandwidth, read_bandwidth(runner.device, threads=threads))
    rate = new_tokens / decode
    return {
        "decode_tokens_per_second": rate,
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "bytes_per_token": bytes_read,
        "bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_share": rate * bytes_read / bandwidth,
        "peak_memory_bytes": peak,
        "stored_bytes_per_token": bytes_per_token(folder),
        "load_seconds": load_seconds,
        "outside_kernels_share": None if within is None else max(0.0, 1 - within / decode),
        "prompt_tokens": prompt_tokens,
        "context_tokens": before,
        "new_tokens": new_tokens,
        "engine": runner.name,
        "device": str(runner.device),
        "peak_device_memory_bytes": peak_bytes(runner.device),
        "threads": torch.get_num_threads(),
        **runner.facts,
    }


def bytes_read_per_token(runner: Runner, folder: str | Path, positions: int) -> int:
    """Bytes of weights, as they lie in memory or else as stored, and of the cache at `positions` tokens."""
    weights = runner.weight_bytes()
    return (bytes_per_token(folder) if weights is None else weights) + runner.cache_bytes() * positions


def _check(prompt: int, new: int, context: int | None, engine: str, cache: str) -> None:
    if prompt < 1 or new < 1 or (context is not None and context < 1):
        raise EvaluationError(
            f"a speed measurement needs at least one token, got {prompt} of prompt, {new} new"
            + ("" if context is None else f" and {context} before them")
        )
    for what, value, known in (("engine", engine, ENGINES), ("KV cache", cache, CACHES)):
        if value not in known:
            raise EvaluationError(f"the {what} is {value!r}, expected {', '.join(known)}")


def _fitting(context: int | None, prompt: int, new: int) -> tuple[int, int]:
    """Shortened to the model's context, if that is small."""
    if context is None or prompt + new <= context:
        return prompt, new
    new = min(new, max(1, context // 2))
    return max(1, min(prompt, context - new)), new


def open_runner(
    folder: str | Path,
    dtype: str = "auto",
    engine: str = "auto",
    cache: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    *,
    device: torch.device | None = None,
) -> Runner:
    """Load a model for measurements; the arguments are those of `measure_speed`."""
    elsewhere = device is not None and device.type != "cpu"
    if elsewhere and (engine == "native" or cache != "auto"):
        raise EvaluationError(
            f"{CPU_ONLY}, not on {device}: take --device cpu, or --engine transformers without a cache"
        )
    gpu = elsewhere or (device is None and torch.cuda.is_available())
    if engine != "transformers" and not (engine == "auto" and gpu):
        try:
            return _native(folder, cache, threads)
        except FeatherError:
            if engine == "native":
                raise
    if cache != "auto":
        raise EvaluationError(f"only the native engine has a KV cache of {cache}, and it does not run this model")
    return TransformersRunner(folder, dtype, trust_remote_code, device)


def _native(folder: str | Path, cache: str, threads: int | None) -> Runner:
    from featherweight.model.decoder.model import NativeModel

    return NativeRunner(NativeModel.open(folder, threads=threads, kv_cache="float16" if cache == "auto" else cache))


class NativeRunner:
    """A model in the native decoder."""

    name = "native"
    device = torch.device("cpu")

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        network = model.network
        self.context: int | None = model.context
        self.vocabulary = network.vocabulary
        self.facts: dict[str, Any] = {
            "kv_cache": model.kv_cache,
            "precision": model.precision,
            "notes": list(model.weights.notes),
        }
        values = network.head_dim * 2 if model.kv_cache == "float16" else network.head_dim + 4  # and a scale
        self._cache_bytes = 2 * network.layers * network.kv_heads * values
        self._tokens: list[int] = []

    def prefill(self, tokens: Tensor) -> None:
        self.model.reset()
        self._tokens = tokens.tolist()
        self.model.feed(self._tokens)

    def generate(self, count: int) -> None:
        # The cache keeps all but the last token of the prompt: that one and count - 1 of the new ones are processed.
        self.model.generate(self._tokens, count, stops=[])

    def weight_bytes(self) -> int | None:
        return self.model.weights.bytes_per_token

    def cache_bytes(self) -> int:
        return self._cache_bytes

    def kernel_seconds(self) -> float | None:
        stats = self.model.stats()
        return stats.linear_seconds + stats.attention_seconds


class TransformersRunner:
    """A model loaded by transformers with the folder's modules."""

    name = "transformers"

    def __init__(
        self, folder: str | Path, dtype: str, trust_remote_code: bool = False, device: torch.device | None = None
    ) -> None:
        place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, _ = open_model(folder, dtype, place, trust_remote_code)
        if not self.model.can_generate() or getattr(self.model.config, "is_encoder_decoder", False):
            raise EvaluationError(f"{folder} does not continue a text (it is a {type(self.model).__name__})")
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.context = own_context(self.model)
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        self.facts = {"dtype": str(self.dtype).removeprefix("torch.")}
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        self._cache = cache_name(self.model)
        self._out: Any = None
        self._bytes = 0

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> None:
        self._out = None
        with asking_transformers("run this model", error=EvaluationError):
            self._out = self.model(input_ids=tokens[None].to(self.device), use_cache=True, **self._last)
            self._bytes = _cache_bytes(self._out[self._cache]) // len(tokens)

    @torch.inference_mode()
    def generate(self, count: int) -> None:
        with asking_transformers("generate with this model", error=EvaluationError):
            for _ in range(count):
                token = self._out.logits[:, -1:].argmax(-1)
                self._out = self.model(input_ids=token, use_cache=True, **{self._cache: self._out[self._cache]})

    def weight_bytes(self) -> int | None:
        return None

    def cache_bytes(self) -> int:
        return self._bytes

    def kernel_seconds(self) -> float | None:
        return None


def _cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values a cache of transformers holds; 0 where it is of another make."""
    found = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in found if isinstance(t, Tensor))


def _decode(runner: Runner, context: Tensor, count: int, repeats: int) -> tuple[float, float | None]:
    """Least seconds of `count` tokens, and those within kernels in that run."""
    best: tuple[float, float | None] = (float("inf"), None)
    for _ in range(repeats):
        runner.prefill(context)
        synchronise(runner.device)
        kernels = runner.kernel_seconds()
        begun = time.perf_counter()
        runner.generate(count)
        synchronise(runner.device)
        seconds = time.perf_counter() - begun
        after = runner.kernel_seconds()
        within = None if kernels is None or after is None else after - kernels
        best = min(best, (seconds, within), key=lambda pair: pair[0])
    return best


def read_bandwidth(device: torch.device | None = None, size: int | None = None, threads: int | None = None) -> float:
    """Bytes a second at which a buffer of `size` bytes (1.5 GiB) is read; less is used where memory is short.

    By the native library, or without it and on other devices by summing in PyTorch.
    """
    device, size = device or torch.device("cpu"), size or BUFFER_BYTES
    if device.type == "cpu":
        found = native_read_bandwidth(size, REPEATS, torch.get_num_threads() if threads is None else threads)
        if found is not None:
            return found
    while True:
        try:
            buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
            break
        except RuntimeError:  # out of memory
            if size < 1 << 20:
                raise
            size //= 2
    # A row for each thread and more, so that all take part.
    rows = buffer[: buffer.numel() // 64 * 64].view(64, -1)
    return rows.numel() * 4 / _best(lambda: rows.sum(1), device)


def _best(action: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Least seconds of `repeats` runs after a first that is not counted."""
    action()
    synchronise(device)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        synchronise(device)
        times.append(time.perf_counter() - begun)
    return min(times)
