"""What writes the text for `generate` and `chat`: the native decoder, or transformers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featherweight.cli.answer import Answer, Clock
from featherweight.cli.console import note, put
from featherweight.errors import CheckpointError, FeatherError
from featherweight.storage.checkpoint.resolve import Place, resolve

if TYPE_CHECKING:
    import torch

    from featherweight.model.decoder.model import NativeModel
    from featherweight.model.decoder.sampling import GenerationDefaults, Sampling
    from featherweight.model.decoder.text import TextStream
    from featherweight.model.text.tokenizer import Tokenizer

PART = 512
"""Tokens of a prompt between two reports."""
CACHE_SHARE = 0.25
"""Decoded matrices may take this share of the free memory; they make every token after the first fast."""
ENGINES = ("auto", "native", "transformers")
CACHES = ("auto", "float16", "int8")
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class BackendSettings:
    """Which model writes, and how it is run.

    model : folder, .safetensors file or hub id
    engine, kv_cache : of ENGINES and CACHES
    dtype : compute type: auto, float32, bfloat16 or float16
    threads : None: as `featherweight.system.threads` decides
    trust_remote_code : run the code that the model's folder brings for its class or tokenizer
    device : where it runs, by name; None: on the GPU, if there is one and nothing speaks for the native decoder
    """

    model: str
    engine: str = "auto"
    dtype: str = "auto"
    kv_cache: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    device: str | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is made: see `featherweight.model.decoder.sampling.Sampling`. None: as the model's folder says."""

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    min_p: float | None = None
    repetition_penalty: float | None = None

    def sampling(self, defaults: GenerationDefaults, answers: int) -> Sampling:
        """Of a backend's next answer, after so many: each has random numbers of its own."""
        from featherweight.model.decoder.sampling import RANGES, derived_seed

        return defaults.sampling({name: getattr(self, name) for name in RANGES}, derived_seed(self.seed, answers))


class AnswerStopped(KeyboardInterrupt):
    """Ctrl-C within an answer; `text` is what there is of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class TextBackend(Protocol):
    """A loaded model that continues texts."""

    @property
    def context(self) -> int | None:
        """Most tokens of a text; None where the model has no limit."""

    @property
    def last(self) -> Answer | None:
        """How the last text was made; None if there is none, or it was stopped."""

    def read(self, tokens: list[int], told: Callable[[int, int], object]) -> None:
        """Go through a long prompt ahead of `write`; `told` gets (done, total) tokens, or nothing if it is short."""

    @property
    def has_template(self) -> bool:
        """Whether conversations are written as the model knows them."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special` adds what the model expects around one."""

    def prompt(self, messages: Messages) -> str:
        """What the chat template makes of a conversation."""

    def write(self, tokens: list[int], settings: GenerationSettings) -> str:
        """Continue `tokens`, print the text as it is made, return it. AnswerStopped at a Ctrl-C."""


def open_backend(settings: BackendSettings) -> TextBackend:
    """The native decoder where it runs the model and nothing speaks for transformers: a GPU, another device, or a
    chosen dtype.

    A chosen KV cache speaks for the native decoder: transformers has none of ours.
    """
    engine, dtype, cache, threads = settings.engine, settings.dtype, settings.kv_cache, settings.threads
    for what, value, known in (("--engine", engine, ENGINES), ("--kv-cache", cache, CACHES)):
        if value not in known:
            raise FeatherError(f"{what} is {value!r}, expected one of {', '.join(known)}")
    if engine == "transformers" and cache != "auto":
        raise FeatherError(f"--kv-cache {cache} is the native decoder's: leave it out with --engine transformers")
    device = _device(settings)
    place = resolve(settings.model)
    if device is not None and device.type != "cpu":
        if engine == "auto":
            note(f"the native decoder is on the CPU; transformers runs the model on {device}")
        return TransformersBackend(place.model, dtype, threads, settings.trust_remote_code, device)
    if engine == "native" or cache != "auto":
        return NativeBackend.open(place, dtype, threads, cache)
    if engine == "transformers" or dtype != "auto" or (device is None and _has_gpu()):
        return TransformersBackend(place.model, dtype, threads, settings.trust_remote_code, device)
    from featherweight.model.decoder.architectures import UnsupportedModelError

    try:
        return NativeBackend.open(place, dtype, threads, cache)
    except UnsupportedModelError as reason:
        backend = TransformersBackend(place.model, dtype, threads, settings.trust_remote_code, device)
        note(f"{reason}; transformers runs it instead")
        return backend


def _device(settings: BackendSettings) -> torch.device | None:
    """Of its name. FeatherError where it is not there, or what is on the CPU only was chosen for it."""
    if settings.device is None:
        return None
    from featherweight.system.devices import device_named

    device = device_named(settings.device)
    for what, chosen in (("--engine native", settings.engine == "native"), ("--kv-cache", settings.kv_cache != "auto")):
        if chosen and device.type != "cpu":
            raise FeatherError(f"{what} is for the native decoder, which is on the CPU, not on {device}: leave one out")
    return device


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _no_tokenizer(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder} has no tokenizer; put the original model's tokenizer files beside the weights")


class _TextSide:
    """What backends have in common: text to tokens, and conversations to prompts."""

    tokenizer: Tokenizer
    last: Answer | None = None

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, special)

    def prompt(self, messages: Messages) -> str:
        assert self.tokenizer.chat_template is not None
        return self.tokenizer.chat_template.render(messages)


class NativeBackend(_TextSide):
    """The native decoder; transformers is not needed, unless for the tokenizer."""

    def __init__(self, model: NativeModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, model.context
        self.answers = 0
        self._known: list[int] = []  # what the decoder has in its cache
        self._ahead = 0.0  # seconds that `read` took

    @classmethod
    def open(cls, place: Place, dtype: str, threads: int | None, cache: str) -> NativeBackend:
        """`dtype` float32 computes exactly with compressed weights; auto rounds their inputs to 8 bits.

        Raises
        ------
        UnsupportedModelError
            the native decoder lacks something that the model or its folder asks for.
        """
        from featherweight.model.decoder.architectures import UnsupportedModelError
        from featherweight.model.decoder.model import NativeModel
        from featherweight.model.decoder.sampling import FILE_NAME, generation_defaults
        from featherweight.model.text.plain import read_object
        from featherweight.model.text.tokenizer import Tokenizer

        if dtype not in ("auto", "float32"):
            raise FeatherError(
                f"the native engine computes in auto or float32, not in {dtype}; --engine transformers does"
            )
        folder = place.folder
        foreign = generation_defaults(folder, read_object(folder / "config.json")).foreign
        if foreign:
            raise UnsupportedModelError(
                f"{folder} asks in {FILE_NAME} or config.json for {', '.join(foreign)}, which the native decoder lacks"
            )
        kv_cache = "float16" if cache == "auto" else cache
        precision = "float" if dtype == "float32" else "int8"
        model = NativeModel.open(place.model, threads=threads, kv_cache=kv_cache, precision=precision)
        tokenizer = Tokenizer.open(folder)
        if tokenizer is None:
            raise _no_tokenizer(folder)
        return cls(model, tokenizer)

    def read(self, tokens: list[int], told: Callable[[int, int], object]) -> None:
        """In parts: what a part has in common with the one before is not computed again."""
        common = next((i for i, (a, b) in enumerate(zip(tokens, self._known, strict=False)) if a != b), None)
        first = min(len(tokens), len(self._known)) if common is None else common
        if len(tokens) > self.context:  # `write` says so
            return
        begun = time.monotonic()
        for end in range(first + PART, len(tokens), PART):
            told(end - PART, len(tokens))
            self.model.generate(tokens[:end], 1)
            self._known = tokens[:end]
        self._ahead = time.monotonic() - begun

    def write(self, tokens: list[int], settings: GenerationSettings) -> str:
        from featherweight.model.decoder.text import TextStream

        stream, clock = TextStream(self.tokenizer.decode, put), Clock(self._ahead)
        self._ahead = 0.0
        sampling = settings.sampling(self.model.defaults, self.answers)
        self.answers += 1
        self.last, stopped = None, False

        def put_token(token: int) -> None:
            clock.count()
            self._known.append(token)
            stream.put(token)

        self._known = list(tokens)
        try:
            self.model.generate(tokens, settings.max_tokens, sampling, put_token)
            self.last = clock.answer(len(tokens), settings.max_tokens, self.context)
        except KeyboardInterrupt:
            stopped = True
        finally:
            text = stream.end()
            put("\n")
        if stopped:
            raise AnswerStopped(text)
        return text


class TransformersBackend(_TextSide):
    """Any model that transformers loads."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        threads: int | None,
        trust_remote_code: bool = False,
        device: torch.device | None = None,
    ) -> None:
        import torch

        from featherweight.cli.console import quiet_transformers
        from featherweight.model.decoder.sampling import generation_defaults
        from featherweight.model.text.plain import read_object
        from featherweight.model.text.tokenizer import Tokenizer, refuse_useless
        from featherweight.system.threads import thread_count
        from featherweight.system.transformers_calls import asking_transformers
        from featherweight.tasks.evaluate.model_checks import own_context

        quiet_transformers()
        torch.set_num_threads(thread_count(threads))
        self.model, tokenizer = self._loaded(folder, dtype, trust_remote_code, device)
        if tokenizer is None:
            raise _no_tokenizer(folder)
        if not self.model.can_generate():
            raise FeatherError(f"{folder} is not a model that writes text (it is a {type(self.model).__name__})")
        self.tokenizer = Tokenizer.of(tokenizer)
        path = Path(str(self.model.config.name_or_path))
        with asking_transformers(f"turn text into tokens with the tokenizer of {path}"):
            refuse_useless(tokenizer, path)
        self.defaults = generation_defaults(path, read_object(path / "config.json"))
        self.context = own_context(self.model)
        self.answers = 0
        if self.model.device.type == "cpu" or device is None:
            self._cache_if_small()

    @staticmethod
    def _loaded(folder: Path, dtype: str, trust_remote_code: bool, device: torch.device | None) -> tuple[Any, Any]:
        """Model and tokenizer; on all GPUs there are, where no device is named."""
        import torch

        from featherweight.integrations.load import load
        from featherweight.tasks.evaluate.opening import open_model

        if device is None and torch.cuda.is_available():
            return load(folder, dtype=dtype, device_map="auto", trust_remote_code=trust_remote_code)
        return open_model(folder, dtype, device or torch.device("cpu"), trust_remote_code, needed=False)

    def _cache_if_small(self) -> None:
        from featherweight.model.layers.modules import CodedModule, set_cache
        from featherweight.system.memory import available_bytes

        coded = [module for module in self.model.modules() if isinstance(module, CodedModule)]
        decoded = sum(module.compute_dtype.itemsize * math.prod(module.spec["shape"]) for module in coded)
        set_cache(self.model, decoded < CACHE_SHARE * available_bytes())

    def read(self, tokens: list[int], told: Callable[[int, int], object]) -> None:
        """`generate` of transformers reads a prompt in one go."""

    def write(self, tokens: list[int], settings: GenerationSettings) -> str:
        import torch

        from featherweight.model.decoder.text import TextStream
        from featherweight.model.text.tokenizer import quiet
        from featherweight.system.transformers_calls import asking_transformers

        most = self._room(tokens, settings.max_tokens)
        sampling = settings.sampling(self.defaults, self.answers)
        self.answers += 1
        assert sampling.seed is not None
        torch.manual_seed(sampling.seed % 2**63)
        stream = _Streamer(TextStream(self.tokenizer.decode, put), self.defaults.stops)
        prompt = torch.tensor([tokens], device=self.model.device)
        self.last, stopped = None, False
        try:
            with asking_transformers("generate with this model", error=FeatherError), quiet(), torch.inference_mode():
                made = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=most,
                    **self._arguments(sampling, stream),
                )
            if not stream.used:  # beams are known at the end only
                whole = getattr(self.model.config, "is_encoder_decoder", False)
                stream.write(made[0, 0 if whole else len(tokens) :].tolist())
            self.last = stream.clock.answer(len(tokens), settings.max_tokens, self.context)
        except KeyboardInterrupt:
            stopped = True
        finally:
            text = stream.text.end()
            put("\n")
        if stopped:
            raise AnswerStopped(text)
        return text

    def _room(self, tokens: list[int], most: int) -> int:
        """New tokens that fit behind a prompt. FeatherError where it is too long, or has tokens without a row."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        if wrong := next((token for token in tokens if not 0 <= token < rows), None):
            raise FeatherError(f"there is no token {wrong}, the vocabulary has {rows}")
        if self.context is None or getattr(self.model.config, "is_encoder_decoder", False):
            return most
        if len(tokens) > self.context:
            raise FeatherError(f"{len(tokens)} tokens do not fit the context of {self.context}; shorten the prompt")
        return min(most, self.context + 1 - len(tokens))  # nothing follows the last one, so it needs no place

    def _arguments(self, sampling: Sampling, stream: _Streamer) -> dict[str, Any]:
        """What `generate` is told; the folder's settings that only transformers knows stay as they are."""
        from featherweight.integrations.sampling import sampling_arguments

        chosen = sampling_arguments(sampling) | {"return_dict_in_generate": False}
        source, named = self.tokenizer.source, {setting.split()[0] for setting in self.defaults.foreign}
        if named & {"stop_strings", "token_healing"}:
            chosen["tokenizer"] = source
        if not named & {"num_beams", "num_beam_groups", "penalty_alpha", "constraints", "force_words_ids"}:
            chosen["streamer"] = stream
        if self.defaults.stops:
            chosen["eos_token_id"] = list(self.defaults.stops)
        padding = getattr(source, "pad_token_id", None)
        stops = self.defaults.stops or (self.tokenizer.eos,)
        return chosen | {"pad_token_id": stops[0] if padding is None else padding}


class _Streamer:
    """What transformers puts new tokens into; the prompt, which comes first, and stop tokens are left out."""

    def __init__(self, text: TextStream, stops: Sequence[int]) -> None:
        self.text, self.stops = text, frozenset(stops)
        self.used, self.clock = False, Clock()

    def put(self, value: Any) -> None:
        if self.used:
            self.write(value.flatten().tolist())
        self.used = True

    def write(self, tokens: list[int]) -> None:
        for token in tokens:
            if token not in self.stops:
                self.clock.count()
                self.text.put(token)

    def end(self) -> None:
        """`TransformersBackend.write` ends the text."""
