"""Chat templates: Jinja programs that come with a model and turn a conversation into its prompt.

They are code from whoever published the model, so they run in Jinja's sandbox, and neither for ever nor without end:
what they write, how often `range` counts and how long they take is bounded. Offered to them is what transformers
offers: `tojson`, `raise_exception`, `strftime_now`, loop controls, the block `generation`, and the special tokens.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, FeatherError
from featherweight.system.transformers_calls import one_line

FILE_NAME = "chat_template.jinja"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LONGEST = 1 << 24
"""Characters that a template may write, or that a text within it may grow to by repetition."""
MOST_STEPS = 1 << 20
"""Calls, products and numbers of `range` in one rendering."""
LONGEST_RANGE = 100_000
"""As in Jinja's sandbox."""
SECONDS = 20.0


@dataclass(frozen=True)
class ChatTemplate:
    """source: the program; tokens: texts of special tokens by name."""

    source: str
    tokens: dict[str, Any]

    @classmethod
    def find(cls, folder: Path, settings: dict[str, Any]) -> ChatTemplate | None:
        """From its own file, or `chat_template` in tokenizer_config.json; None where there is neither."""
        path = folder / FILE_NAME
        if path.is_file():
            try:
                source: Any = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}): restore the file") from None
        else:
            source = settings.get("chat_template")
        if isinstance(source, list):  # several with names
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source:  # an empty one is none to transformers
            return None
        tokens = {name: settings.get(name) for name in TOKENS}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return cls(source, {name: text for name, text in texts.items() if isinstance(text, str)})

    @property
    def takes_tools(self) -> bool:
        """Whether it says anything of the tools that a model may call."""
        return re.search(r"\btools\b", self.source) is not None

    def render(
        self, messages: Sequence[Mapping[str, Any]], answer: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        """The text of a conversation; with `answer`, as the prompt for the next one.

        messages : role and content of each, and what else it has (`tool_calls`, `reasoning_content`, ...), as it is
        tools : descriptions of the tools that the model may call, as JSON schemas

        Raises
        ------
        FeatherError
            the template refuses the conversation, is no program, or does not come to an end.
        """
        try:
            import jinja2  # noqa: F401  (what follows needs it)
        except ImportError:
            raise FeatherError("chat templates need jinja2: pip install jinja2") from None
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            template = _environment(_Budget()).from_string(self.source)
            pieces = template.generate(
                messages=plain, tools=list(tools) if tools else None, documents=None, add_generation_prompt=answer,
                **self.tokens,
            )  # fmt: skip
            return "".join(_bounded(pieces))
        except Exception as error:  # programs fail in every way there is: TypeError, RecursionError, OverflowError, ...
            raise FeatherError(f"the model's chat template refuses this conversation: {one_line(error)}") from None


class _Budget:
    """What one rendering may spend."""

    def __init__(self) -> None:
        self.until = time.monotonic() + SECONDS
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS or time.monotonic() > self.until:
            raise OverflowError("it does not come to an end")

    def range(self, *arguments: int) -> range:
        """The numbers, paid for at once: what is made of them is a loop, or a list as long."""
        numbers = range(*arguments)
        if len(numbers) > LONGEST_RANGE:
            raise OverflowError(f"it counts to {len(numbers)}, and {LONGEST_RANGE} is the most")
        self.steps += len(numbers)
        self.step()
        return numbers


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    size, until = 0, time.monotonic() + SECONDS
    for piece in pieces:
        size += len(piece)
        if size > LONGEST or time.monotonic() > until:
            raise OverflowError(f"it does not come to an end, or writes more than {LONGEST} characters")
        yield piece


def _environment(budget: _Budget) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Bounded(ImmutableSandboxedEnvironment):
        """Counts calls (macros may call themselves), and looks at repetition and powers first: `"x" * 10 ** 12`."""

        intercepted_binops = frozenset({"*", "**"})

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget.step()
            return super().call(__context, __obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.step()
            _check_operands(operator, left, right, SecurityError)
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks what an assistant has said, for training; here it is as if it were not there."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["range"] = budget.range
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _check_operands(operator: str, left: Any, right: Any, error: type[Exception]) -> None:
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and abs(right) * max(1, left.bit_length()) > 4096:
            raise error("it computes a power that is too large")
        return
    for text, times in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > LONGEST:
            raise error("it repeats a text too often")
