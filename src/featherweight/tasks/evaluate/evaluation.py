"""`evaluate`: one model, or a compressed one against its original, on one text under one protocol."""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import EvaluationError, FeatherWarning
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.pages.notebook import progress_here
from featherweight.storage.checkpoint.size import Size, measure_size
from featherweight.system.devices import device_named
from featherweight.system.memory import available_bytes, peak_memory_bytes, reset_peak_memory
from featherweight.system.places import ASSETS
from featherweight.system.threads import chosen_threads, use_threads
from featherweight.tasks.evaluate.control_tokens import ControlTokens, compare, control_tokens, read_conversations
from featherweight.tasks.evaluate.model_checks import check_causal, check_same_tokenizer, own_context, tokenizer_sha256
from featherweight.tasks.evaluate.opening import ModelLike, evaluating, open_model
from featherweight.tasks.evaluate.perplexity import KeptReader, LogitsReader, Measurement, Progress, measure
from featherweight.tasks.evaluate.protocols import Setting, protocol_named
from featherweight.tasks.evaluate.questions.asking import Chosen, TaskResult, choose, results_of
from featherweight.tasks.evaluate.questions.engines import open_engine
from featherweight.tasks.evaluate.questions.items import Answers
from featherweight.tasks.evaluate.questions.paired import INSTALL, can_test
from featherweight.tasks.evaluate.reading import check_rows, dtype_of, read_tokens
from featherweight.tasks.evaluate.result import Evaluation
from featherweight.tasks.evaluate.texts import named_text
from featherweight.tasks.evaluate.trust import warnings_of

Report = Callable[[str], None]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BUNDLED_TEXT = "evaluation.txt"
KEPT_SHARE = 4
"""The part of free memory that is one over this may hold what an original made of the text."""


def evaluate(
    model: ModelLike,
    against: ModelLike | None = None,
    text: str | Path | None = None,
    *,
    conversations: str | Path | None = None,
    tasks: str | Path | Sequence[str | Path] | None = None,
    items: int | None = None,
    engine: str = "transformers",
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
        A UTF-8 file, plain, .xz or .gz; "wikitext-2", its test part as papers have it; or "hf:NAME[:CONFIG[:SPLIT
        [:COLUMN]]]", a data set of the Hugging Face hub, its texts joined by empty lines. The last two need the package
        datasets, and a network the first time. Default: the evaluation text that comes with the package.
    conversations : str or Path, optional
        JSON lines with `messages`, such as `feather converse` writes. In the form of the chat template they are what
        the divergence at its control tokens (ends of turns, marks of thinking and of tool calls) is measured on, which
        needs `against`; see `featherweight.tasks.evaluate.control_tokens`.
    tasks : str, Path or list of these, optional
        Questions with right and wrong answers: "novels-choice" and "novels-cloze", which come with the package; files
        of JSON lines (see `featherweight.tasks.evaluate.questions.items`); with the extra `tasks` also any task of
        lm-evaluation-harness, by name or as its .yaml file.
    items : int, optional
        Only the first so many items of each task.
    engine : str
        What answers them: "transformers", computing as for the perplexity, or "native", the decoder for CPUs as it
        runs, with rounded activations.
    protocol : str
        How the text is cut into windows: "own" (the model's context), "2048", "4096", "strided" or "llama.cpp".
    context : int, optional
        Tokens in a window, instead of the protocol's.
    dtype : str
        "float32", "bfloat16", "float16", "float64", or "auto": float32 on the CPU, elsewhere what config.json says.
    limit : int, optional
        Use the first so many tokens of the text, at least 2.
    progress : callable, optional
        Called with the windows that are done and their number, both int. Default: in a notebook, a bar.
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
        tokens and elsewhere; a FeatherWarning where it is much larger there. With `tasks` also `answers`: the accuracy
        of each by every scorer, with its 95 % interval, and with `against` what became of the original's answers on the
        same items: lost and won ones, McNemar's test, Cohen's kappa (both by statsmodels). A FeatherWarning, too, where
        so few tokens were scored that the result is uncertain, and where the KL says that the model is of no use:
        `warnings`.

    Raises
    ------
    EvaluationError
        A setting is none of the above; there is no such task, or a line of its file is malformed; the text is missing,
        empty or too short; a model has no tokenizer, is no causal language model, or the two have different tokenizers.
    CheckpointError
        A model cannot be found or loaded; see `featherweight.load`.
    FeatherError
        There is no such device here; it is the base of all of these.

    Examples
    --------
    >>> result = featherweight.evaluate("small", against="original")
    >>> print(result.perplexity, result.divergence.mean, result.size.linear_bits)
    """
    progress = progress or _notebook_progress()
    asked = _asked(
        text, against, conversations=conversations, tasks=tasks, items=items, engine=engine, protocol=protocol,
        context=context, dtype=dtype, limit=limit, progress=progress, threads=threads,
        trust_remote_code=trust_remote_code, device=device,
    )  # fmt: skip
    with _threads(threads), contextlib.ExitStack() as stack:
        reset_peak_memory()
        begun = time.perf_counter()
        original = None if against is None else _Original.open(against, asked, stack)
        return _evaluate(model, original, asked, begun)


def evaluate_each(
    models: Sequence[str | Path],
    against: ModelLike | None = None,
    text: str | Path | None = None,
    *,
    conversations: str | Path | None = None,
    tasks: str | Path | Sequence[str | Path] | None = None,
    items: int | None = None,
    engine: str = "transformers",
    protocol: str = "own",
    context: int | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "auto",
) -> Iterator[Evaluation]:
    """`evaluate` of several models, one after the other, in the order given.

    The original is loaded once, and run once over each window as far as memory has room for what it made of it. One of
    the others is in memory at a time; warnings begin with its name. `progress` counts the windows of all models;
    parameters, results and errors are those of `evaluate`.
    """
    asked = _asked(
        text, against, conversations=conversations, tasks=tasks, items=items, engine=engine, protocol=protocol,
        context=context, dtype=dtype, limit=limit, threads=threads, trust_remote_code=trust_remote_code, device=device,
    )  # fmt: skip
    with _threads(threads), contextlib.ExitStack() as stack:
        original = None if against is None else _Original.open(against, asked, stack, keep=len(models) > 1)
        for number, model in enumerate(models):
            reset_peak_memory()
            part = None if progress is None else _part_of(progress, number, len(models))
            whose = f"{model}: " if len(models) > 1 else ""
            yield _evaluate(model, original, replace(asked, progress=part), time.perf_counter(), whose)


def _notebook_progress() -> Progress | None:
    """For whoever gave no progress, in a notebook."""
    shown = progress_here("evaluating")
    return None if shown is None else shown.count


def _part_of(progress: Progress, number: int, of: int) -> Progress:
    """Progress of one of several measurements of about the same length."""
    return lambda done, total: progress(number * total + done, of * total)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `evaluate`, checked; `content` is the text."""

    content: str
    conversations: str | Path | None
    tasks: Chosen | None
    protocol: str
    context: int | None
    dtype: str
    limit: int | None
    progress: Progress | None
    threads: int | None
    trust_remote_code: bool
    device: torch.device


def _asked(
    text: str | Path | None,
    against: ModelLike | None,
    *,
    conversations: str | Path | None = None,
    tasks: str | Path | Sequence[str | Path] | None = None,
    items: int | None = None,
    engine: str = "transformers",
    protocol: str = "own",
    context: int | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "auto",
) -> _Asked:
    """The arguments of `evaluate`; EvaluationError for those that are wrong or do not go together."""
    if dtype not in DTYPES:
        raise EvaluationError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    runs_on = device_named(device)
    if runs_on.type == "mps" and dtype == "float64":
        raise EvaluationError("the device mps has no float64: use --dtype float32, or --device cpu")
    if limit is not None and limit < 2:
        raise EvaluationError(f"the limit is {limit} tokens, and at least 2 are needed to score one")
    if conversations is not None and against is None:
        raise EvaluationError("conversations are for comparing with the original: name it with --against")
    if tasks is None and (items is not None or engine != "transformers"):
        raise EvaluationError("items and an engine are for tasks: name some with --tasks")
    chosen = None if tasks is None else choose(tasks, items, engine)
    content = bundled_text() if text is None else named_text(text)
    if not content.strip():
        raise EvaluationError(f"the text {text} is empty: there is nothing to score")
    return _Asked(
        content, conversations, chosen, protocol, context, dtype, limit, progress, threads, trust_remote_code, runs_on
    )


def _threads(threads: int | None) -> contextlib.AbstractContextManager[Any]:
    """A number of threads that nobody has decided on stays as PyTorch has it."""
    return contextlib.nullcontext() if chosen_threads(threads) is None else use_threads(threads)


@dataclass(frozen=True)
class _Original:
    """What others are compared with, open: its name, its tokenizer if it has one, and what reads its predictions."""

    name: str
    model: Any
    tokenizer: Any
    reader: LogitsReader
    size: Size | None
    source: ModelLike
    kept: dict[str, Answers] = field(default_factory=dict)
    """Its answers to the tasks, once it was asked."""

    @classmethod
    def open(cls, against: ModelLike, asked: _Asked, stack: contextlib.ExitStack, keep: bool = False) -> _Original:
        """keep : what it makes of a window is kept for the next model, in up to a quarter of the free memory"""
        model, tokenizer = open_model(against, asked.dtype, asked.device, asked.trust_remote_code, False)
        stack.enter_context(evaluating(model))
        check_causal(model)
        if isinstance(against, tuple):
            name, size = "a model in memory", None
        else:
            name, size = str(against), measure_size(against)
        reader = KeptReader(model, room_bytes=available_bytes() // KEPT_SHARE) if keep else LogitsReader(model)
        return cls(name, model, tokenizer, reader, size, against)


def _evaluate(model: ModelLike, original: _Original | None, asked: _Asked, begun: float, whose: str = "") -> Evaluation:
    """One model, by what was asked for; with warnings, begun by `whose`, where the result is none to rely on."""
    with contextlib.ExitStack() as stack:
        subject, tokenizer = open_model(model, asked.dtype, asked.device, asked.trust_remote_code)
        stack.enter_context(evaluating(subject))
        check_causal(subject)
        if original is not None and original.tokenizer is not None:
            check_same_tokenizer(tokenizer, original.tokenizer, asked.content)
        read = read_tokens(tokenizer, asked.content, asked.protocol)
        tokens = read.tokens[: asked.limit]
        for one in (subject, None if original is None else original.model):
            if one is not None:
                check_rows(one, tokens)
        protocol = protocol_named(asked.protocol, own_context(subject), len(tokens), asked.context, len(read.prefix))
        setting = Setting(
            protocol=protocol,
            tokens=len(tokens),
            bos=read.words,
            dtype=dtype_of(subject),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            text_sha256=hashlib.sha256(asked.content.encode()).hexdigest(),
        )
        reader = None if original is None else original.reader
        measured = measure(subject, tokens, protocol, reader, bos=read.bos, progress=asked.progress, prefix=read.prefix)
        control = None
        if asked.conversations is not None and original is not None:
            models = (subject, original.model)
            control = _control(models, tokenizer, asked.conversations, asked.context, asked.progress)
        found, notes = _answers(model, (subject, tokenizer), original, asked)
        seconds = time.perf_counter() - begun
    said = warnings_of(measured) + notes
    for warning in said:
        warnings.warn(f"{whose}{warning}", FeatherWarning, stacklevel=3)
    result = _evaluation(measured, setting, seconds, model, original)
    return replace(result, control=control, answers=found, warnings=tuple(said))


def _answers(
    model: ModelLike, loaded: tuple[Any, Any], original: _Original | None, asked: _Asked
) -> tuple[tuple[TaskResult, ...], list[str]]:
    """What the tasks gave, beside the original, which is asked once; and what was cut of them, in sentences."""
    if asked.tasks is None:
        return (), []
    subject, tokenizer = loaded
    if original is not None and not original.kept:
        engine = open_engine(original.source, (original.model, tokenizer), asked.tasks.engine, asked.threads)
        original.kept.update(asked.tasks.ask(engine, tokenizer, asked.progress))
    engine = open_engine(model, (subject, tokenizer), asked.tasks.engine, asked.threads)
    own = asked.tasks.ask(engine, tokenizer, asked.progress)
    if original is not None and not can_test():
        text = f"p-values and kappa of tasks need statsmodels, which is missing: {INSTALL}"
        warnings.warn(text, FeatherWarning, stacklevel=4)
    notes = [
        f"{one.cut} context{'s' * (one.cut != 1)} of the task {name} are longer than the model's context of "
        f"{engine.context} tokens: their beginnings were left out"
        for name, one in own.items()
        if one.cut
    ]
    return results_of(asked.tasks, own, None if original is None else original.kept), notes


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
        check_rows(model, torch.tensor([token for ids in talks for token in ids]))
    found = compare(*models, talks, marks, progress)
    if found.warning is not None:
        warnings.warn(found.warning, FeatherWarning, stacklevel=3)
    return found


def _evaluation(
    measured: Measurement, setting: Setting, seconds: float, model: ModelLike, original: _Original | None
) -> Evaluation:
    loss, other = measured.loss, measured.against
    ratio, ratio_error = (None, None) if other is None else loss.log_ratio(other)
    return Evaluation(
        perplexity=loss.perplexity,
        perplexity_standard_error=loss.perplexity_error,
        tokens=loss.tokens,
        windows=len(loss.counts),
        setting=setting,
        description=setting.describe(),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        size=None if isinstance(model, tuple) else measure_size(model),
        against=None if original is None else original.name,
        perplexity_against=None if other is None else other.perplexity,
        perplexity_against_standard_error=None if other is None else other.perplexity_error,
        size_against=None if original is None else original.size,
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
