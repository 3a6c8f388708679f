"""`evaluate`: one model, or a compressed one against its original, on one text under one protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import EvaluationError, FeatherWarning
from featherweight.model.layers.modules import CodedModule
from featherweight.model.text.files import read_text
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.storage.checkpoint.size import Size, measure_size
from featherweight.system.devices import device_named
from featherweight.system.memory import peak_memory_bytes, reset_peak_memory
from featherweight.system.places import ASSETS
from featherweight.system.threads import chosen_threads, use_threads
from featherweight.system.transformers_calls import one_line
from featherweight.tasks.evaluate.control_tokens import ControlTokens, compare, control_tokens, read_conversations
from featherweight.tasks.evaluate.divergence import Divergence
from featherweight.tasks.evaluate.opening import ModelLike, evaluating, open_model
from featherweight.tasks.evaluate.perplexity import LogitsReader, Measurement, Progress, measure
from featherweight.tasks.evaluate.protocols import Setting, protocol_named

Report = Callable[[str], None]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BUNDLED_TEXT = "evaluation.txt"
# Where configurations keep the number of positions; the first is the common name, the others are families' own.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation. Losses in nats a token, KL in nats; `size` None for a model given as an object;
    `control` what was measured on conversations.

    `log_ratio` is log(perplexity / perplexity of the original), paired over windows, with its standard error.
    """

    perplexity: float
    perplexity_standard_error: float | None
    tokens: int
    windows: int
    setting: Setting
    description: str
    seconds: float
    peak_memory_bytes: int
    size: Size | None = None
    against: str | None = None
    perplexity_against: float | None = None
    log_ratio: float | None = None
    log_ratio_standard_error: float | None = None
    divergence: Divergence | None = None
    window_losses: tuple[float, ...] = ()
    control: ControlTokens | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite become null, as are `kl` and `top1_agreement` without an original."""
        protocol, size, kl = self.setting.protocol, self.size, self.divergence
        report = {
            "perplexity": self.perplexity,
            "perplexity_standard_error": self.perplexity_standard_error,
            "tokens": self.tokens,
            "text_tokens": self.setting.tokens,
            "windows": self.windows,
            "protocol": protocol.name,
            "context": protocol.context,
            "stride": protocol.stride,
            "bos": self.setting.bos,
            "dtype": self.setting.dtype,
            "tokenizer_sha256": self.setting.tokenizer_sha256,
            "text_sha256": self.setting.text_sha256,
            "description": self.description,
            "against": self.against,
            "perplexity_against": self.perplexity_against,
            "log_ratio": self.log_ratio,
            "log_ratio_standard_error": self.log_ratio_standard_error,
            "kl": None if kl is None else kl.mean,
            "kl_standard_error": None if kl is None else kl.standard_error,
            "kl_median": None if kl is None else kl.median,
            "kl_percentile_99": None if kl is None else kl.percentile_99,
            "kl_maximum": None if kl is None else kl.maximum,
            "top1_agreement": None if kl is None else kl.top1_agreement,
            "bits_per_weight": {
                "linear": None if size is None else size.linear_bits,
                "model": None if size is None else size.model_bits,
            },
            "bytes": None if size is None else size.bytes,
            "size": None if size is None else asdict(size),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "window_losses": list(self.window_losses),
            "control_tokens": None if self.control is None else self.control.to_json(),
        }
        finite: dict[str, Any] = _finite(report)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    model: ModelLike,
    against: ModelLike | None = None,
    text: str | Path | None = None,
    *,
    conversations: str | Path | None = None,
    protocol: str = "own",
    context: int | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "auto",
) -> Evaluation:
    """Measure the perplexity and true size of a model, and how far its predictions are from those of another.

    Parameters
    ----------
    model : str, Path or tuple
        A folder, one .safetensors file, or a hub id; or (model, tokenizer) as transformers gives them. Models given as
        objects are put into evaluation mode meanwhile, and then back.
    against : str, Path or tuple, optional
        The original, to compare with token by token. Both must have the same tokenizer.
    text : str or Path, optional
        A UTF-8 file, plain, .xz or .gz. Default: the evaluation text that comes with the package.
    conversations : str or Path, optional
        JSON lines with `messages`, such as `feather converse` writes. In the form of the chat template they are what
        the divergence at its control tokens (ends of turns, marks of thinking and of tool calls) is measured on, which
        needs `against`; see `featherweight.tasks.evaluate.control_tokens`.
    protocol : str
        How the text is cut into windows: "own" (the model's context), "2048", "4096", "strided" or "llama.cpp".
    context : int, optional
        Tokens in a window, instead of the protocol's.
    dtype : str
        "float32", "bfloat16", "float16", "float64", or "auto": float32 on the CPU, elsewhere what config.json says.
    limit : int, optional
        Use the first so many tokens of the text, at least 2.
    progress : callable, optional
        Called with the windows that are done and their number, both int.
    threads : int, optional
        Of PyTorch and the native kernels. Default: FEATHERWEIGHT_THREADS, else as PyTorch has it.
    trust_remote_code : bool
        Run the code that a folder brings for its model class or tokenizer.
    device : str or torch.device
        Where models from folders are put and run, and their predictions compared: "cpu", "cuda", "cuda:1", "mps", ...;
        "auto" is an accelerator where there is one. Models given as objects stay where they are. Another device changes
        the order of floating-point sums, and so the last digits.

    Returns
    -------
    Evaluation
        `perplexity` with its standard error, both over all scored tokens; `setting`, which says protocol, tokens,
        dtype and the hashes of text and tokenizer; `size` in bytes and bits a weight (None for a model given as an
        object). With `against` also `divergence` (KL in nats a token, share of equal top-1 predictions) and
        `log_ratio` of the perplexities, paired over windows. With `conversations` also `control`: divergence at control
        tokens and elsewhere; a FeatherWarning where it is much larger there.

    Raises
    ------
    EvaluationError
        A setting is none of the above; the text is missing, empty or too short; a model has no tokenizer, is no causal
        language model, or the two have different tokenizers.
    CheckpointError
        A model cannot be found or loaded; see `featherweight.load`.
    FeatherError
        There is no such device here; it is the base of all of these.

    Examples
    --------
    >>> result = featherweight.evaluate("small", against="original")
    >>> print(result.perplexity, result.divergence.mean, result.size.linear_bits)
    """
    if dtype not in DTYPES:
        raise EvaluationError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    runs_on = device_named(device)
    if runs_on.type == "mps" and dtype == "float64":
        raise EvaluationError("the device mps has no float64: use --dtype float32, or --device cpu")
    if limit is not None and limit < 2:
        raise EvaluationError(f"the limit is {limit} tokens, and at least 2 are needed to score one")
    if conversations is not None and against is None:
        raise EvaluationError("conversations are for comparing with the original: name it with --against")
    content = read_text(Path(text), EvaluationError) if text is not None else bundled_text()
    if not content.strip():
        raise EvaluationError(f"the text {text} is empty: there is nothing to score")
    # A number of threads that nobody has decided on stays as PyTorch has it.
    counted = contextlib.nullcontext() if chosen_threads(threads) is None else use_threads(threads)
    with counted, contextlib.ExitStack() as stack:
        reset_peak_memory()
        begun = time.perf_counter()
        subject, tokenizer = open_model(model, dtype, runs_on, trust_remote_code)
        original, other_tokenizer = (None, None)
        if against is not None:
            original, other_tokenizer = open_model(against, dtype, runs_on, trust_remote_code, False)
        for one in (subject, original):
            if one is not None:
                stack.enter_context(evaluating(one))
                check_causal(one)
        if other_tokenizer is not None:
            check_same_tokenizer(tokenizer, other_tokenizer, content)
        read = _read(tokenizer, content, protocol)
        tokens = read.tokens[:limit]
        for one in (subject, original):
            if one is not None:
                _check_rows(one, tokens)
        setting = Setting(
            protocol=protocol_named(protocol, own_context(subject), len(tokens), context, len(read.prefix)),
            tokens=len(tokens),
            bos=read.words,
            dtype=_dtype_of(subject),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            text_sha256=hashlib.sha256(content.encode()).hexdigest(),
        )
        measured = measure(
            subject, tokens, setting.protocol, original, bos=read.bos, progress=progress, prefix=read.prefix
        )
        control = None
        if conversations is not None:
            control = _control((subject, original), tokenizer, conversations, context, progress)
        seconds = time.perf_counter() - begun
    return replace(_evaluation(measured, setting, seconds, model, against), control=control)


def _control(
    models: tuple[Any, Any], tokenizer: Any, path: str | Path, context: int | None, progress: Progress | None
) -> ControlTokens:
    """What is measured on conversations, with a warning where control tokens are much worse than the rest."""
    reader, own = Tokenizer.of(tokenizer), own_context(models[0])
    most = min((length for length in (context, own) if length is not None), default=None)
    marks = control_tokens(reader)
    talks = read_conversations(path, reader, most)
    if not talks:
        raise EvaluationError(f"the conversations {path} are empty: there is nothing to compare")
    for model in models:
        _check_rows(model, torch.tensor([token for ids in talks for token in ids]))
    found = compare(*models, talks, marks, progress)
    if found.warning is not None:
        warnings.warn(found.warning, FeatherWarning, stacklevel=3)
    return found


def _evaluation(
    measured: Measurement, setting: Setting, seconds: float, model: ModelLike, against: ModelLike | None
) -> Evaluation:
    loss, other = measured.loss, measured.against
    ratio, ratio_error = (None, None) if other is None else loss.log_ratio(other)
    error = loss.standard_error
    return Evaluation(
        perplexity=loss.perplexity,
        perplexity_standard_error=None if error is None else error * loss.perplexity,
        tokens=loss.tokens,
        windows=len(loss.counts),
        setting=setting,
        description=setting.describe(),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        size=None if isinstance(model, tuple) else measure_size(model),
        against=None if against is None else "a model in memory" if isinstance(against, tuple) else str(against),
        perplexity_against=None if other is None else other.perplexity,
        log_ratio=ratio,
        log_ratio_standard_error=ratio_error,
        divergence=measured.divergence,
        window_losses=tuple(s / c for s, c in zip(loss.sums, loss.counts, strict=True)),
    )


def bundled_text(name: str = BUNDLED_TEXT) -> str:
    """A text that comes with the package."""
    try:
        return (ASSETS / name).read_text(encoding="utf-8")
    except OSError:
        raise EvaluationError(f"this installation lacks the bundled text {name}: give one with --text") from None


def tokenizer_sha256(tokenizer: Any) -> str:
    """What a tokenizer does, as a hash: of its whole definition if it is a fast one, else of class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        # Settings of the last call, which do not change what a text becomes here.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    else:
        definition = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def own_context(model: Any) -> int | None:
    """Positions the model was made for, by its configuration; None where that does not say."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    config = nested() if nested is not None else config
    for name in CONTEXT_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value == int(value) > 0:
            return int(value)
    return None


def check_causal(model: Any) -> None:
    """EvaluationError unless a token's logits depend only on the tokens before it, tried on two tokens."""
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise EvaluationError(f"{kind} is an encoder-decoder, for which perplexity of a plain text is not defined")
    device = LogitsReader(model).device
    try:
        with torch.inference_mode():
            pairs = [model(input_ids=torch.tensor([ids], device=device), use_cache=False) for ids in ([0, 1], [0, 2])]
    except (TypeError, ValueError) as error:  # encoders do not know `use_cache`, models of images no `input_ids`
        raise EvaluationError(f"{kind} is not a causal language model, so it has no next-token perplexity") from error
    except Exception as error:
        raise EvaluationError(f"{kind} cannot be run on two tokens: {one_line(error)}") from error
    outputs = [logits for pair in pairs if isinstance(logits := getattr(pair, "logits", None), Tensor)]
    if len(outputs) < 2 or any(logits.shape[:2] != (1, 2) for logits in outputs):
        raise EvaluationError(f"{kind} gives no logits for every token, so it has no next-token perplexity")
    first, second = (logits[0, 0].cpu().double() for logits in outputs)
    # Exact on most backends; kernels that choose their tiling by the data may differ in the last bits.
    tolerance = max(1e-4, 8 * torch.finfo(outputs[0].dtype).eps) * float(first.abs().max())
    if float((first - second).abs().max()) > tolerance:
        raise EvaluationError(
            f"{kind} sees the tokens that follow (an encoder such as BERT), so it has no next-token perplexity"
        )


def check_same_tokenizer(one: Any, other: Any, text: str) -> None:
    """EvaluationError unless tokens mean the same to both models: by definition, or by vocabulary and on this text."""
    if tokenizer_sha256(one) == tokenizer_sha256(other):
        return
    first, second = Tokenizer.of(one), Tokenizer.of(other)
    if one.get_vocab() != other.get_vocab() or first.encode(text) != second.encode(text):
        raise EvaluationError(
            "the two models have different tokenizers, so their predictions are about different tokens and cannot be "
            "compared: measure each by itself"
        )


@dataclass(frozen=True)
class _Read:
    """A text for a protocol: `tokens` int64 [n] without `prefix`, which stands before each window; `bos` in its first
    place instead; in words."""

    tokens: Tensor
    prefix: tuple[int, ...]
    bos: int | None
    words: str


def _read(tokenizer: Any, text: str, protocol: str) -> _Read:
    """The whole text as tokens, and what is done with the tokens that the tokenizer puts before one."""
    reader = Tokenizer.of(tokenizer)
    tokens = reader.encode(text)
    prefix, _ = reader.around()
    replaced = protocol == "llama.cpp"
    if not prefix or tokens[: len(prefix)] != prefix or (replaced and prefix[0] != reader.bos):
        return _Read(torch.tensor(tokens, dtype=torch.int64), (), None, "no BOS, as the tokenizer adds none")
    if replaced:
        first = prefix[0]
        words = f"BOS (token {first}) in place of the first token of every window"
        return _Read(torch.tensor(tokens, dtype=torch.int64), (), first, words)
    name = "BOS" if prefix == [reader.bos] else "what the tokenizer puts before a text"
    numbers = ", ".join(str(token) for token in prefix)
    words = f"{name} ({'token' if len(prefix) == 1 else 'tokens'} {numbers}) before every window"
    return _Read(torch.tensor(tokens[len(prefix) :], dtype=torch.int64), tuple(prefix), None, words)


def _check_rows(model: Any, tokens: Tensor) -> None:
    """EvaluationError where a token has no row in the embedding."""
    get = getattr(model, "get_input_embeddings", None)
    weight = getattr(get() if get is not None else None, "weight", None)
    if weight is not None and len(tokens) and int(tokens.max()) >= weight.shape[0]:
        raise EvaluationError(
            f"the text has token {int(tokens.max())} and the model a vocabulary of {weight.shape[0]}: "
            "the tokenizer does not belong to this model"
        )


def _dtype_of(model: Any) -> str:
    """What the first module with weights computes in: a compressed one in another type than its parts are stored in."""
    for module in model.modules():
        if isinstance(module, CodedModule):
            return str(module.compute_dtype).removeprefix("torch.")
        parameter = next((p for p in module.parameters(recurse=False) if p.is_floating_point()), None)
        if parameter is not None:
            return str(parameter.dtype).removeprefix("torch.")
    return "float32"
