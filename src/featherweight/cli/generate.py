"""`generate` and `chat`: text from a model, token by token."""

from __future__ import annotations

import sys

from featherweight.cli.backends import AnswerStopped, BackendSettings, GenerationSettings, TextBackend, open_backend
from featherweight.cli.interrupts import answering
from featherweight.cli.prompt import open_listener
from featherweight.errors import FeatherError


def run_generate(chosen: BackendSettings, prompt: str, settings: GenerationSettings) -> None:
    """Print a prompt and its continuation."""
    from featherweight.system.threads import use_threads

    with use_threads(chosen.threads):
        backend = open_backend(chosen)
        tokens = backend.encode(prompt)
        if not tokens:
            raise FeatherError("the prompt is empty; give some text to continue with --prompt")
        print(prompt, end="", flush=True)
        backend.write(tokens, settings)


def run_chat(chosen: BackendSettings, system: str | None, settings: GenerationSettings) -> None:
    """Ask for a turn, print the answer, and so on to the end of the input. Ctrl-C ends an answer, or else the chat."""
    from featherweight.system.threads import use_threads

    with use_threads(chosen.threads):
        _chat(open_backend(chosen), system, settings)


def _chat(backend: TextBackend, system: str | None, settings: GenerationSettings) -> None:
    if not backend.has_template:
        print("this model has no chat template: it simply continues the conversation's text", file=sys.stderr)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with open_listener() as listener:
        while (said := listener.listen()) is not None:
            messages.append({"role": "user", "content": said})
            tokens = _conversation(backend, messages)
            print("model: ", end="", flush=True)
            answer = _answer(backend, tokens, settings)
            messages.append({"role": "assistant", "content": answer.strip()})


def _answer(backend: TextBackend, tokens: list[int], settings: GenerationSettings) -> str:
    """What the model says, or has said before Ctrl-C."""
    try:
        with answering():
            return backend.write(tokens, settings)
    except AnswerStopped as stopped:
        return stopped.text
    except KeyboardInterrupt:  # just before or after the answer
        return ""


def _conversation(backend: TextBackend, messages: list[dict[str, str]]) -> list[int]:
    """A template writes the model's first token itself; plain text gets it from the tokenizer."""
    if backend.has_template:
        return backend.encode(backend.prompt(messages), special=False)
    return backend.encode("\n\n".join(message["content"] for message in messages) + "\n\n")
