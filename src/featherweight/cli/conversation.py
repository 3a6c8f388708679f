"""What a chat consists of: the messages, kept within the model's context, and what can be typed beside a turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import FeatherError, OutputError

if TYPE_CHECKING:
    from featherweight.cli.backends import TextBackend

ANSWER_SHARE = 4
"""A part of the context, one of so many, that is kept free for an answer unless it may only be shorter."""
HELP = """\
/help          this list
/reset         forget the conversation; the system message stays
/system TEXT   give the model a system message from the next turn on; /system alone shows it
/save [FILE]   write the conversation as a line of JSON, as --calibration takes it; without FILE into a new file here
/exit          end the chat, as Ctrl-D does
//...          a turn that begins with /
A line that ends in a backslash goes on in the next. Ctrl-C ends an answer. Up and down bring back earlier lines."""
COMMANDS = ("/help", "/reset", "/system", "/save", "/exit")


@dataclass
class Talk:
    """A conversation.

    say : gets what is told about it, a sentence each
    most : tokens that an answer may have
    """

    backend: TextBackend
    say: Callable[[str], None]
    most: int
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    saved: Path | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def asked(self, text: str) -> list[int] | None:
        """Tokens of the conversation with a new turn; None, which is said, where that turn alone is too long.

        Where the context is full, the oldest turns go, with their answers.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        tokens, dropped = self._tokens(), 0
        while self._too_long(tokens) and len(self.turns) > 1:
            answered = self.turns[1]["role"] == "assistant"
            del self.turns[: 1 + answered]
            dropped += 1
            tokens = self._tokens()
        context = self.backend.context
        if context is not None and len(tokens) >= context:
            self.turns = before
            self.say(f"that is {len(tokens)} tokens, and the context has {context}: shorten it; it was not asked")
            return None
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            self.say(f"the context of {context} tokens is full: the oldest {turns} forgotten")
        return tokens

    def answered(self, text: str) -> None:
        """What the model said to the last turn."""
        self.turns.append({"role": "assistant", "content": text.strip()})

    def _tokens(self) -> list[int]:
        """A template writes the model's first token itself; plain text gets it from the tokenizer."""
        if self.backend.has_template:
            return self.backend.encode(self.backend.prompt(self.messages), special=False)
        return self.backend.encode("\n\n".join(message["content"] for message in self.messages) + "\n\n")

    def _too_long(self, tokens: list[int]) -> bool:
        context = self.backend.context
        return context is not None and len(tokens) + min(self.most, context // ANSWER_SHARE) > context

    def command(self, line: str) -> bool:
        """Whether a line was none of the conversation's turns but a command, which then has been done."""
        if not line.startswith("/") or line.startswith("//") or "\n" in line:
            return False
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self.say(HELP)
        elif name == "/reset":
            self.turns.clear()
            self.say("the conversation is forgotten")
        elif name == "/system":
            self._set_system(rest)
        elif name == "/save":
            self._save(rest)
        else:
            from featherweight.registry import nearest

            self.say(f"there is no {name}{nearest(name, COMMANDS)}; /help lists what there is, // begins a turn with /")
        return True

    def _set_system(self, text: str) -> None:
        if text:
            self.system = text
            self.say("the system message is set")
        else:
            self.say(f"the system message is: {self.system}" if self.system else "there is no system message")

    def _save(self, name: str) -> None:
        from featherweight.system.files import to_json_line, write_text

        if not self.turns:
            self.say("there is nothing to save yet")
            return
        path = Path(name).expanduser() if name else self.saved or Path(time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
        try:
            if path.exists() and path != self.saved:
                raise OutputError(f"{path} exists already; give /save another name")
            write_text(path.absolute(), to_json_line({"messages": self.messages}))
        except FeatherError as error:
            self.say(f"error: {error}")
        else:
            self.saved = path
            self.say(f"saved in {path}")
