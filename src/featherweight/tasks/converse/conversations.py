"""Conversations between prompts that come with the package and a model that answers through its own chat template.

Number n of a seed is the same whatever was written before it, and together with what: it has its own prompts
(`prompts.opening`), and each answer random numbers of its own. So a run that was stopped goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import CalibrationError, FeatherError
from featherweight.events import Observer, silent
from featherweight.methods.calibrate.settings import ConversationSettings
from featherweight.model.decoder.sampling import Sampling, derived_seed, generation_defaults
from featherweight.model.text.documents import HEADER, Document, row_to_document
from featherweight.model.text.mixture import SELF
from featherweight.model.text.tokenizer import Template, Tokenizer
from featherweight.model.text.windows import (
    context_of,
    conversation_tokens,
    conversation_windows,
    load_tokenizer,
)
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.system.files import sha256_of
from featherweight.tasks.converse.file import ConversationFile
from featherweight.tasks.converse.prompts import Opening, opening, prompts_digest
from featherweight.tasks.converse.writers import Writer, open_writer

VERSION = 1
MOST_TURNS = 16
"""As many as `ConversationSettings.turns` allows, so that every answer of a seed has a number of its own."""


@dataclass
class Conversations:
    """What a model writes under some settings.

    device : where transformers runs the model, if the native decoder does not
    writer : is opened with the first conversation that is not there yet
    """

    checkpoint: Checkpoint
    settings: ConversationSettings
    device: torch.device = torch.device("cpu")
    notify: Observer = silent
    writer: Writer | None = None
    tokenizer: Tokenizer = field(init=False)
    template: Template = field(init=False)

    def __post_init__(self) -> None:
        """CalibrationError for a model without a tokenizer or a chat template."""
        folder = self.checkpoint.folder
        self.tokenizer = load_tokenizer(folder, self.checkpoint.trust_remote_code)
        if self.tokenizer.chat_template is None:
            raise CalibrationError(
                f"conversations ({SELF}) need a model with a chat template, and {folder} has none: calibrate with "
                "other text, or put the model's chat_template.jinja beside its weights"
            )
        self.template = self.tokenizer.chat_template
        self._defaults = generation_defaults(folder, self.checkpoint.config)
        self._takes_system = self._accepts_system()

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; each answer has a seed of its own."""
        given = {name: getattr(self.settings, name) for name in ("temperature", "top_k", "top_p")}
        return self._defaults.sampling(given)

    def header(self) -> dict[str, Any]:
        """The first line of their file: all that they depend on."""
        sampling = self.sampling
        template = getattr(self.template, "source", "") or repr(type(self.template))
        return {
            HEADER: VERSION,
            "model": sample_digest(self.checkpoint),
            "template": sha256_of(template),
            "prompts": prompts_digest(),
            "seed": self.settings.seed,
            "turns": self.settings.turns,
            "max_tokens": self.settings.max_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
        }

    def until(self, path: Path, enough: Callable[[list[dict[str, Any]]], bool], about: int) -> list[dict[str, Any]]:
        """The rows of the file, written on until they are `enough`; `about` how many that takes is for progress."""
        with ConversationFile(path, self.header()) as file:
            while not enough(file.rows):
                count, missing = self._opened().together, about - len(file.rows)
                numbers = range(len(file.rows), len(file.rows) + (min(count, missing) if missing > 0 else count))
                for row in self.write(numbers):
                    file.add(row)
                    if enough(file.rows):
                        break
                self.notify({"event": "conversations", "step": len(file.rows), "of": max(about, len(file.rows))})
            return list(file.rows)

    def write(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Conversations by number, as their file has them: messages, tools, whether the last answer was finished."""
        turns = self.settings.turns
        openings = [opening(number, self.settings.seed, turns) for number in numbers]
        rows = [self._begun(one) for one in openings]
        live = list(range(len(rows)))
        for turn in range(turns):
            prompts = {place: self._prompt(rows[place], openings[place], turn, numbers[place]) for place in live}
            live = [place for place in live if prompts[place] is not None]
            self._answer(rows, {place: prompts[place] or [] for place in live}, turn, numbers)
            live = [place for place in live if rows[place]["finished"]]
        return rows

    def _begun(self, one: Opening) -> dict[str, Any]:
        system = [{"role": "system", "content": one.system}] if one.system and self._takes_system else []
        row: dict[str, Any] = {"messages": system, "finished": True}
        return row | ({"tools": list(one.tools)} if one.tools and self.template.takes_tools else {})

    def _prompt(self, row: dict[str, Any], one: Opening, turn: int, number: int) -> list[int] | None:
        """Tokens that the next answer continues, whose question goes into the row; None where the context is full.

        Raises CalibrationError where the template refuses, or there is no room for a first answer.
        """
        messages = [*row["messages"], {"role": "user", "content": one.questions[turn]}]
        try:
            text = self.template.render(messages, tools=row.get("tools"))
        except FeatherError as error:
            raise CalibrationError(f"conversation {number + 1} of {SELF} cannot be written: {error}") from error
        tokens = self.tokenizer.encode(text, special=False)
        context = context_of(self.checkpoint.config)
        if not tokens or (context is not None and len(tokens) >= context):
            if turn > 0:
                return None
            raise CalibrationError(
                f"conversation {number + 1} of {SELF} cannot be written: its first question is {len(tokens)} tokens in "
                f"the chat template, and the model's context {context}; calibrate with other text"
            )
        row["messages"] = messages
        return tokens

    def _answer(
        self, rows: list[dict[str, Any]], prompts: dict[int, list[int]], turn: int, numbers: Sequence[int]
    ) -> None:
        """The next message of each conversation that has a prompt, as many at a time as the writer takes."""
        writer, places, most = self._opened(), list(prompts), self.settings.max_tokens
        context = context_of(self.checkpoint.config)
        for first in range(0, len(places), writer.together):
            group = places[first : first + writer.together]
            seeds = [derived_seed(self.settings.seed, 1 + MOST_TURNS * numbers[place] + turn) for place in group]
            answers = writer.write([prompts[place] for place in group], most, seeds)
            for place, answer in zip(group, answers, strict=True):
                room = most if context is None else min(most, context - len(prompts[place]))
                rows[place]["messages"].append(
                    {"role": "assistant", "content": self.tokenizer.decode(answer, special=True)}
                )
                rows[place]["finished"] = len(answer) < room

    def _opened(self) -> Writer:
        if self.writer is None:
            ends = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
            stops = tuple(dict.fromkeys([*self._defaults.stops, *ends]))
            self.writer = open_writer(self.checkpoint, self.sampling, stops, self.device, self.notify)
        return self.writer

    def _accepts_system(self) -> bool:
        """Some templates refuse a system message, and say so when they are asked."""
        try:
            self.template.render([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
        except FeatherError:
            return False
        return True


def converse(conversations: Conversations, path: str | Path, count: int) -> list[dict[str, Any]]:
    """A file with at least `count` conversations; one that is there already is written on."""
    if count < 1:
        raise CalibrationError(f"the number of conversations is {count}, expected at least 1")
    return conversations.until(Path(path).expanduser(), lambda rows: len(rows) >= count, count)


def conversations_for(conversations: Conversations, path: str | Path, windows: int, length: int) -> list[Document]:
    """The first conversations of the seed that fill so many windows of `length` tokens, at most the context.

    How many the file has already changes nothing.
    """
    tokenizer, path = conversations.tokenizer, Path(path).expanduser()
    context = context_of(conversations.checkpoint.config)
    length = length if context is None else min(length, context)
    prefix, _ = tokenizer.around()
    talks: list[list[int]] = []
    needed = 0

    def enough(rows: list[dict[str, Any]]) -> bool:
        nonlocal needed
        while len(talks) < len(rows) and not needed:
            document = row_to_document(rows[len(talks)], f"conversation {len(talks) + 1} of {path}")
            talks.append(conversation_tokens(tokenizer, document))
            if sum(map(len, talks)) >= windows * length and len(conversation_windows(talks, length, prefix)) >= windows:
                needed = len(talks)
        return needed > 0

    rows = conversations.until(path, enough, windows)
    return [row_to_document(row, f"conversation {i + 1} of {path}") for i, row in enumerate(rows[:needed])]
