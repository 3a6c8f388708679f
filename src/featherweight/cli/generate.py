"""`generate` and `chat`: text from a model, token by token."""

from __future__ import annotations

import sys
from pathlib import Path

from featherweight.cli.answer import Answer
from featherweight.cli.backends import (
    AnswerStopped,
    BackendSettings,
    GenerationSettings,
    TextBackend,
    open_backend,
)
from featherweight.cli.console import WrongUse, claim_json, passing, put, tell, write_json
from featherweight.cli.conversation import Talk
from featherweight.cli.interrupts import answering
from featherweight.cli.prompt import open_listener
from featherweight.errors import FeatherError
from featherweight.system.state import History
from featherweight.system.units import time_text

STANDARD_INPUT = "-"


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """What is to be continued: the option's text, that of a file, or that of standard input, without its last line end.

    Raises WrongUse where none of them or two are given, FeatherError where the file cannot be read.
    """
    from featherweight.model.text.files import read_text

    if prompt is None and file is None:
        raise WrongUse(
            "a text to continue is missing: give --prompt TEXT or --prompt-file FILE; --prompt - reads a pipe"
        )
    if prompt is not None and file is not None:
        raise WrongUse("--prompt and --prompt-file are both given: take one of them")
    if file is not None and str(file) != STANDARD_INPUT:
        return read_text(file, FeatherError, "--prompt-file").removesuffix("\n")
    if prompt == STANDARD_INPUT or file is not None:
        text = sys.stdin.read().removesuffix("\n")
        if not text:
            raise FeatherError("the prompt is empty: standard input has no text to continue")
        return text
    assert prompt is not None
    return prompt


def run_generate(chosen: BackendSettings, prompt: str, settings: GenerationSettings, json: Path | None = None) -> None:
    """Print a prompt and its continuation."""
    from featherweight.system.threads import use_threads

    claim_json(json, ("prompt", "text", "tokens"))
    with use_threads(chosen.threads):
        backend = open_backend(chosen)
        tokens = backend.encode(prompt)
        if not tokens:
            raise FeatherError("the prompt is empty; give some text to continue with --prompt")
        _read(backend, tokens)
        put(prompt)
        text = backend.write(tokens, settings)
    made = backend.last
    if made is not None:
        tell(_speed([made]))
        write_json(json, {"prompt": prompt, "text": text, **vars(made), "tokens_per_second": made.speed})


def run_chat(
    chosen: BackendSettings,
    system: str | None,
    settings: GenerationSettings,
    json: Path | None = None,
    keep: bool = True,
) -> None:
    """Ask for a turn, print the answer, and so on to the end of the input. Ctrl-C ends an answer, or else the chat.

    json : the conversation goes there at the end
    keep : turns are remembered for later chats, to be brought back with the arrow keys
    """
    from featherweight.system.threads import use_threads

    claim_json(json, ("messages",))
    with use_threads(chosen.threads):
        talk = Talk(open_backend(chosen), tell, settings.max_tokens, system)
        _chat(talk, settings, History("chat", keep))
    write_json(json, {"messages": talk.messages})


def _chat(talk: Talk, settings: GenerationSettings, history: History) -> None:
    backend, made = talk.backend, []
    if not backend.has_template:
        tell("this model has no chat template: it simply continues the conversation's text")
    with open_listener(history) as listener:
        while (said := listener.listen()) is not None:
            if talk.command(said):
                continue
            tokens = talk.asked(said[1:] if said.startswith("//") else said)
            if tokens is None:
                continue
            talk.answered(_answer(backend, tokens, settings))
            if (last := backend.last) is not None:
                made.append(last)
                _say_cut(backend, last, settings)
    if made:
        tell(_speed(made))


def _answer(backend: TextBackend, tokens: list[int], settings: GenerationSettings) -> str:
    """What the model says, or has said before Ctrl-C."""
    try:
        with answering():
            _read(backend, tokens)
            put("model: ")
            return backend.write(tokens, settings)
    except AnswerStopped as stopped:
        return stopped.text
    except KeyboardInterrupt:  # just before or after the answer
        return ""


def _read(backend: TextBackend, tokens: list[int]) -> None:
    """Go through a long prompt, and say how far it is."""
    with passing() as show:
        backend.read(tokens, lambda done, total: show(f"reading the prompt: {done:,} of {total:,} tokens"))


def _say_cut(backend: TextBackend, made: Answer, settings: GenerationSettings) -> None:
    """Where an answer did not end by itself."""
    if made.end == "limit":
        tell(f"the answer was cut at {settings.max_tokens} tokens (--max-tokens)")
    elif made.end == "context":
        tell(f"the answer was cut: the context of {backend.context} tokens is full; /reset begins anew")


def _speed(made: list[Answer]) -> str:
    """Of all answers together."""
    written, seconds = sum(one.tokens for one in made), sum(one.seconds for one in made)
    later = sum(max(0, one.tokens - 1) for one in made)
    speed = f", {later / seconds:.1f} tokens/s" if later and seconds > 0 else ""
    read, reading = sum(one.prompt_tokens for one in made), sum(one.prompt_seconds for one in made)
    return f"{written} tokens in {time_text(seconds)}{speed}; {read} of prompts in {time_text(reading)}"
