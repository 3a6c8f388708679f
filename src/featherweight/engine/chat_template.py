"""Chat templates: Jinja programs that come with a model and turn a conversation into its prompt.

They are code from whoever published the model, so they run in Jinja's sandbox. Offered to them is what transformers
offers: `tojson`, `raise_exception`, `strftime_now`, loop controls, the block `generation`, and the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, FeatherError

FILE_NAME = "chat_template.jinja"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """source: the program; tokens: texts of special tokens by name."""

    source: str
    tokens: dict[str, str]

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
        if not isinstance(source, str):
            return None
        tokens = {name: settings.get(name) for name in TOKENS}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return cls(source, {name: text for name, text in texts.items() if isinstance(text, str)})

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for the next answer. FeatherError where the template refuses the conversation."""
        try:
            import jinja2
        except ImportError:
            raise FeatherError("chat templates need jinja2: pip install jinja2") from None
        try:
            template = _environment().from_string(self.source)
            return str(template.render(messages=list(messages), add_generation_prompt=True, **self.tokens))
        except jinja2.exceptions.TemplateError as error:
            raise FeatherError(f"the model's chat template refuses this conversation: {error}") from None


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant has said, for training; here it is as if it were not there."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
