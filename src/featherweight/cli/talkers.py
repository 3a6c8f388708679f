"""What `generate` and `chat` talk to: a model behind the native decoder, or behind transformers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featherweight.errors import CheckpointError, FeatherError

if TYPE_CHECKING:
    from featherweight.engine.model import NativeModel
    from featherweight.engine.text import Tokenizer

CACHE_SHARE = 0.25
"""Decoded matrices may take this share of the free memory; they make every token after the first fast."""
ENGINES = ("auto", "native", "transformers")
CACHES = ("auto", "float16", "int8")
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Choices:
    """How an answer is made: see `engine.sampling.Sampling`. None: as the model's folder says."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float | None = None
    repetition_penalty: float | None = None


class AnswerStopped(KeyboardInterrupt):
    """Ctrl-C within an answer; `text` is what there is of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class Talker(Protocol):
    """A loaded model that continues texts."""

    has_template: bool

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special` adds what the model expects around one."""

    def prompt(self, messages: Messages) -> str:
        """What the chat template makes of a conversation."""

    def write(self, tokens: list[int], choices: Choices) -> str:
        """Continue `tokens`, print the text as it is made, return it. AnswerStopped at a Ctrl-C."""


def open_talker(folder: str, engine: str, dtype: str, threads: int | None, cache: str = "auto") -> Talker:
    """The native decoder where it runs the model and nothing speaks for transformers: a GPU, or a chosen dtype.

    A chosen KV cache speaks for the native decoder: transformers has none of ours.
    """
    for what, value, known in (("--engine", engine, ENGINES), ("--kv-cache", cache, CACHES)):
        if value not in known:
            raise FeatherError(f"{what} is {value!r}, expected one of {', '.join(known)}")
    if engine == "transformers" and cache != "auto":
        raise FeatherError(f"--kv-cache {cache} is the native decoder's: leave it out with --engine transformers")
    if engine == "native" or cache != "auto":
        return NativeTalker.open(folder, dtype, threads, cache)
    if engine == "transformers" or dtype != "auto" or not _is_folder(folder) or _has_gpu():
        return TransformersTalker(folder, dtype, threads)
    from featherweight.engine.families import UnsupportedModelError

    try:
        return NativeTalker.open(folder, dtype, threads, cache)
    except UnsupportedModelError as reason:
        talker = TransformersTalker(folder, dtype, threads)
        print(f"note: {reason}; transformers runs it instead", file=sys.stderr)
        return talker


def _is_folder(folder: str) -> bool:
    return Path(folder).is_dir()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _no_tokenizer(folder: str) -> CheckpointError:
    return CheckpointError(f"{folder} has no tokenizer; put the original model's tokenizer files beside the weights")


def _print(text: str) -> None:
    print(text, end="", flush=True)


class NativeTalker:
    """The native decoder; transformers is not needed, unless the folder has no tokenizer.json."""

    def __init__(self, model: NativeModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.has_template = tokenizer.chat_template is not None

    @classmethod
    def open(cls, folder: str, dtype: str, threads: int | None, cache: str) -> NativeTalker:
        """`dtype` float32 computes exactly with compressed weights; auto rounds their inputs to 8 bits."""
        from featherweight.engine.families import UnsupportedModelError
        from featherweight.engine.model import NativeModel
        from featherweight.engine.text import Tokenizer

        if dtype not in ("auto", "float32"):
            raise FeatherError(
                f"the native engine computes in auto or float32, not in {dtype}; --engine transformers does"
            )
        tokenizer = Tokenizer.open(Path(folder))
        kv_cache = "float16" if cache == "auto" else cache
        model = NativeModel.open(folder, threads, kv_cache, "float" if dtype == "float32" else "int8")
        if tokenizer is None:
            if any(Path(folder).glob("*token*")) or any(Path(folder).glob("vocab*")):
                raise UnsupportedModelError(f"the native decoder needs a tokenizer.json, which {folder} lacks")
            raise _no_tokenizer(folder)
        return cls(model, tokenizer)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, special)

    def prompt(self, messages: Messages) -> str:
        assert self.tokenizer.chat_template is not None
        return self.tokenizer.chat_template.render(messages)

    def write(self, tokens: list[int], choices: Choices) -> str:
        from featherweight.engine.sampling import Sampling
        from featherweight.engine.text import TextStream

        stream = TextStream(self.tokenizer.decode, _print)
        sampling = Sampling(choices.temperature, choices.top_k, choices.top_p, seed=choices.seed)
        sampling = self.model.defaults.apply(sampling, choices.min_p, choices.repetition_penalty)
        stopped = False
        try:
            self.model.generate(tokens, choices.max_tokens, sampling, stream.put)
        except KeyboardInterrupt:
            stopped = True
        finally:
            text = stream.end()
            print(flush=True)
        if stopped:
            raise AnswerStopped(text)
        return text


class TransformersTalker:
    """Any model that transformers loads."""

    def __init__(self, folder: str, dtype: str, threads: int | None) -> None:
        import torch

        from featherweight.api import load
        from featherweight.cli.commands import quiet_transformers
        from featherweight.kernels.library import thread_count

        quiet_transformers()
        torch.set_num_threads(thread_count(threads))
        chosen = ("auto" if torch.cuda.is_available() else "float32") if dtype == "auto" else dtype
        self.model, self.tokenizer = load(
            folder, dtype=chosen, device_map="auto" if torch.cuda.is_available() else None
        )
        if self.tokenizer is None:
            raise _no_tokenizer(folder)
        if not self.model.can_generate():
            raise FeatherError(f"{folder} is not a model that writes text (it is a {type(self.model).__name__})")
        self.has_template = self.tokenizer.chat_template is not None
        self._cache_if_small()

    def _cache_if_small(self) -> None:
        from featherweight.integrations.modules import CodedModule, set_cache
        from featherweight.memory import available_bytes

        coded = [module for module in self.model.modules() if isinstance(module, CodedModule)]
        decoded = sum(module.compute_dtype.itemsize * math.prod(module.spec["shape"]) for module in coded)
        set_cache(self.model, decoded < CACHE_SHARE * available_bytes())

    def encode(self, text: str, special: bool = True) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
        return tokens

    def prompt(self, messages: Messages) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def write(self, tokens: list[int], choices: Choices) -> str:
        import torch
        from transformers import TextStreamer

        torch.manual_seed(choices.seed)
        said: list[str] = []

        class Streamer(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                said.append(text)
                super().on_finalized_text(text, stream_end)

        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if choices.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": choices.temperature,
                "top_k": choices.top_k,
                "top_p": choices.top_p,
            }
            if choices.min_p is not None:
                sampling["min_p"] = choices.min_p
        if choices.repetition_penalty is not None:
            sampling["repetition_penalty"] = choices.repetition_penalty
        padding = self.tokenizer.pad_token_id
        prompt = torch.tensor([tokens], device=self.model.device)
        try:
            with torch.inference_mode():
                made = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=choices.max_tokens,
                    streamer=streamer,
                    pad_token_id=self.tokenizer.eos_token_id if padding is None else padding,
                    **sampling,
                )
        except KeyboardInterrupt:
            streamer.end()
            raise AnswerStopped("".join(said)) from None
        return str(self.tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True))
