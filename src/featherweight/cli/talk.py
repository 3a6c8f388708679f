"""`generate` and `chat`: text from a model, token by token."""

from __future__ import annotations

import sys
from dataclasses import replace

from featherweight.cli.talkers import Choices, Talker, open_talker
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
    """Ask for a line, print the answer, and so on until a line is empty."""
    talker = open_talker(folder, engine, dtype, threads, cache, trust_remote_code)
    if not talker.has_template:
        print("this model has no chat template: it simply continues the conversation's text", file=sys.stderr)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    turn = 0
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        messages.append({"role": "user", "content": said})
        tokens = _conversation(talker, messages)
        print("model: ", end="", flush=True)
        answer = talker.write(tokens, replace(choices, seed=choices.seed + turn))
        messages.append({"role": "assistant", "content": answer.strip()})
        turn += 1


def _conversation(talker: Talker, messages: list[dict[str, str]]) -> list[int]:
    """A template writes the model's first token itself; plain text gets it from the tokenizer."""
    if talker.has_template:
        return talker.encode(talker.prompt(messages), special=False)
    return talker.encode("\n\n".join(message["content"] for message in messages) + "\n\n")
