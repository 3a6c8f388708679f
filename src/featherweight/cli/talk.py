"""`generate` and `chat`: text from a model, token by token."""

from __future__ import annotations

import sys

from featherweight.cli.interrupts import answering
from featherweight.cli.prompt import open_listener
from featherweight.cli.talkers import AnswerStopped, Choices, Talker, open_talker
from featherweight.errors import FeatherError


def run_generate(
    folder: str,
    prompt: str,
    choices: Choices,
    engine: str,
    dtype: str,
    cache: str,
    threads: int | None,
    trust_remote_code: bool = False,
) -> None:
    """Print a prompt and its continuation."""
    from featherweight.system.threads import use_threads

    with use_threads(threads):
        talker = open_talker(folder, engine, dtype, threads, cache, trust_remote_code)
        tokens = talker.encode(prompt)
        if not tokens:
            raise FeatherError("the prompt is empty; give some text to continue with --prompt")
        print(prompt, end="", flush=True)
        talker.write(tokens, choices)


def run_chat(
    folder: str,
    system: str | None,
    choices: Choices,
    engine: str,
    dtype: str,
    cache: str,
    threads: int | None,
    trust_remote_code: bool = False,
) -> None:
    """Ask for a turn, print the answer, and so on to the end of the input. Ctrl-C ends an answer, or else the chat."""
    from featherweight.system.threads import use_threads

    with use_threads(threads):
        _chat(open_talker(folder, engine, dtype, threads, cache, trust_remote_code), system, choices)


def _chat(talker: Talker, system: str | None, choices: Choices) -> None:
    if not talker.has_template:
        print("this model has no chat template: it simply continues the conversation's text", file=sys.stderr)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with open_listener() as listener:
        while (said := listener.listen()) is not None:
            messages.append({"role": "user", "content": said})
            tokens = _conversation(talker, messages)
            print("model: ", end="", flush=True)
            answer = _answer(talker, tokens, choices)
            messages.append({"role": "assistant", "content": answer.strip()})


def _answer(talker: Talker, tokens: list[int], choices: Choices) -> str:
    """What the model says, or has said before Ctrl-C."""
    try:
        with answering():
            return talker.write(tokens, choices)
    except AnswerStopped as stopped:
        return stopped.text
    except KeyboardInterrupt:  # just before or after the answer
        return ""


def _conversation(talker: Talker, messages: list[dict[str, str]]) -> list[int]:
    """A template writes the model's first token itself; plain text gets it from the tokenizer."""
    if talker.has_template:
        return talker.encode(talker.prompt(messages), special=False)
    return talker.encode("\n\n".join(message["content"] for message in messages) + "\n\n")
