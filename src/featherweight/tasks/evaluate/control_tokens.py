"""Divergence at the control tokens of a chat template: ends of turns, marks of thinking and of calls of tools.

They are few among many, so a mean over all tokens hides what becomes of them, and a model that misses one does not stop
or calls no tool. Measured are conversations in template form, each from its first token on, cut to the context. A
position counts as one of a control token if the token that follows it in the text is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featherweight.errors import CalibrationError, EvaluationError, FeatherError
from featherweight.model.text.chat_template import ChatTemplate
from featherweight.model.text.documents import read_documents
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.model.text.windows import conversation_tokens
from featherweight.system.transformers_calls import asking_transformers
from featherweight.tasks.evaluate.divergence import kl_divergence, ratio_error
from featherweight.tasks.evaluate.perplexity import CHUNK_ELEMENTS, LogitsReader

SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
TIMES_WORSE = 2.0
SHARE_LEFT = 0.5
"""Of the probability that the original gives a control token where it is its top-1."""
LEAST_POSITIONS, LEAST_CONVERSATIONS = 30, 10
"""For a warning; below them the standard error is none to rely on."""


@dataclass(frozen=True)
class ControlTokens:
    """KL in nats a position and share of equal top-1 predictions, at control tokens and elsewhere.

    Standard errors are of means over positions, from the spread between conversations, whose positions are not
    independent; None for a single conversation. `predicted` counts the positions of control tokens that are also the
    original's top-1, `probability` is the mean probability that the compressed model gives them there,
    `probability_against` the original's. `excess` is `kl` - 2 `kl_elsewhere`, see `warning`.

    tokens : of each control token in the text: positions, KL and agreement there
    """

    tokens: Mapping[str, Mapping[str, float]]
    conversations: int
    positions: int
    positions_elsewhere: int
    kl: float
    kl_standard_error: float | None
    kl_elsewhere: float
    kl_elsewhere_standard_error: float | None
    top1_agreement: float
    top1_agreement_standard_error: float | None
    top1_agreement_elsewhere: float
    predicted: int
    probability: float | None
    probability_standard_error: float | None
    probability_against: float | None
    excess: float
    excess_standard_error: float | None

    @property
    def warning(self) -> str | None:
        """Said where, over at least 30 positions in 10 conversations and by more than two standard errors, KL at
        control tokens is above twice that elsewhere, or control tokens that are the original's top-1 keep less than
        half of their probability: a model bad everywhere may still be worse at ending its turns."""
        if self.conversations < LEAST_CONVERSATIONS:
            return None
        consequence = (
            "answers may not end, or call tools, as the original's do; calibrate with conversations "
            "(`--calibration self=0.1,...`), or compress less"
        )
        error = self.excess_standard_error
        if error is not None and self.positions >= LEAST_POSITIONS and self.excess > 2 * error:
            return (
                f"KL divergence at the chat template's control tokens is {self.kl:.4f} nats a token, more than twice "
                f"the {self.kl_elsewhere:.4f} elsewhere ({self.positions} positions): {consequence}"
            )
        given, against, error = self.probability, self.probability_against, self.probability_standard_error
        if given is None or against is None or error is None or self.predicted < LEAST_POSITIONS:
            return None
        if given + 2 * error >= SHARE_LEFT * against:
            return None
        return (
            f"where the original predicts a control token of the chat template ({self.predicted} positions), it has a "
            f"probability of {against:.2f} there and {given:.2f} here: {consequence}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "warning": self.warning}


def control_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The added tokens that the chat template writes, by number: those in its text, those it names (`eos_token`), and
    those it makes of a small conversation. EvaluationError where there are none."""
    template = tokenizer.chat_template
    if template is None:
        raise EvaluationError(
            "the model has no chat template, so it has no control tokens: leave out --conversations, or put the "
            "original's chat_template.jinja beside the weights"
        )
    added = {text: number for text, number in tokenizer.added().items() if text.strip()}
    written = ""
    if isinstance(template, ChatTemplate):
        written = template.source
        written += "".join(t for name, t in template.tokens.items() if re.search(rf"\b{name}\b", template.source))
    found = {number: text for text, number in added.items() if text in written}
    try:
        made = tokenizer.encode(template.render(SAMPLE, answer=False), special=False)
    except FeatherError:  # it may want more of a conversation
        made = []
    names = {number: text for text, number in added.items()}
    found |= {number: names[number] for number in made if number in names}
    if not found:
        raise EvaluationError(
            "the chat template writes none of the tokenizer's added tokens: nothing is measured apart"
        )
    return dict(sorted(found.items()))


def read_conversations(path: str | Path, tokenizer: Tokenizer, context: int | None) -> list[list[int]]:
    """Tokens of every conversation in a file, cut to the context. EvaluationError where it holds anything else."""
    try:
        documents = read_documents(path)
        if not all(document.messages for document in documents):
            raise EvaluationError(f"{path} holds plain text: give conversations as JSON lines with messages")
        talks = [conversation_tokens(tokenizer, document)[:context] for document in documents]
    except CalibrationError as error:
        raise EvaluationError(str(error).replace("calibration text", "text")) from None
    return [ids for ids in talks if len(ids) > 1]


def compare(
    model: Any,
    original: Any,
    talks: Sequence[Sequence[int]],
    control: Mapping[int, str],
    progress: Callable[[int, int], None] | None = None,
) -> ControlTokens:
    """Of two models called as in `perplexity.measure`, on conversations of token ids.

    EvaluationError where a control token never occurs, a model fails or its output is not usable.
    """
    readers = LogitsReader(model), LogitsReader(original)
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for number, ids in enumerate(talks, 1):
            rows.append(_positions(readers, ids))
            if progress is not None:
                progress(number, len(talks))
    sums = _Sums([np.isin(row[:, TARGET].astype(np.int64), list(control)) for row in rows], rows)
    if not sums.positions:
        raise EvaluationError("no control token of the chat template occurs in the conversations: give other ones")
    by_token = {}
    everything = np.concatenate(rows)
    for number, text in control.items():
        at = everything[everything[:, TARGET] == number]
        if len(at):
            by_token[text] = {"positions": len(at), "kl": at[:, KL].mean(), "top1_agreement": at[:, AGREES].mean()}
    return sums.result({t: {k: float(v) for k, v in facts.items()} for t, facts in by_token.items()})


TARGET, KL, AGREES, FIRST, GIVEN, GIVEN_AGAINST = range(6)
"""Columns of what is known of a position: target, KL, whether both have the same top-1, the original's top-1, and the
probability that the compressed model and the original give to that one."""


def _positions(readers: tuple[LogitsReader, LogitsReader], ids: Sequence[int]) -> np.ndarray:
    """float64 [len(ids) - 1, 6] of a conversation, a slice of positions at a time."""
    batch = torch.tensor([list(ids)])
    with asking_transformers("run the model on a conversation", error=EvaluationError):
        mine, theirs = (reader(batch) for reader in readers)
    found, first, step, last = [], 0, 1, len(ids) - 1
    while first < last:
        end = min(last, first + step)
        log_p = torch.log_softmax(mine.logits(0, first, end), dim=-1)
        log_q = torch.log_softmax(theirs.logits(0, first, end), dim=-1).to(log_p.device)
        if log_q.shape != log_p.shape:
            raise EvaluationError("the two models have vocabularies of different sizes: they cannot be compared")
        top = log_q.argmax(-1)
        columns = [
            batch[0, first + 1 : end + 1],
            kl_divergence(log_q, log_p),
            log_p.argmax(-1) == top,
            top,
            log_p.gather(1, top[:, None])[:, 0].exp(),
            log_q.gather(1, top[:, None])[:, 0].exp(),
        ]
        found.append(np.stack([column.cpu().double().numpy() for column in columns], axis=1))
        first, step = end, max(1, CHUNK_ELEMENTS // log_p.shape[-1])
    rows = np.concatenate(found)
    if np.isnan(rows).any():
        raise EvaluationError(
            "the model's logits are NaN or infinite in a conversation: check it with `feather verify`"
        )
    return rows


class _Sums:
    """Sums over the positions of each conversation."""

    def __init__(self, control: list[np.ndarray], rows: list[np.ndarray]) -> None:
        self.control, self.rows = control, rows
        self.positions = int(sum(mask.sum() for mask in control))

    def _mean(self, column: int, masks: list[np.ndarray]) -> tuple[float, float | None]:
        """Over the positions of masks, with its standard error."""
        sums = [float(row[mask, column].sum()) for row, mask in zip(self.rows, masks, strict=True)]
        counts = [int(mask.sum()) for mask in masks]
        return (math.fsum(sums) / sum(counts), ratio_error(sums, counts)) if sum(counts) else (0.0, None)

    def result(self, tokens: Mapping[str, Mapping[str, float]]) -> ControlTokens:
        elsewhere = [~mask for mask in self.control]
        seen = [mask & (row[:, FIRST] == row[:, TARGET]) for mask, row in zip(self.control, self.rows, strict=True)]
        predicted = int(sum(mask.sum() for mask in seen))
        kl, kl_error = self._mean(KL, self.control)
        other, other_error = self._mean(KL, elsewhere)
        agreement, agreement_error = self._mean(AGREES, self.control)
        given, given_error = self._mean(GIVEN, seen)
        excess, excess_error = self._excess(kl, other, elsewhere)
        return ControlTokens(
            tokens=tokens,
            conversations=len(self.rows),
            positions=self.positions,
            positions_elsewhere=int(sum(mask.sum() for mask in elsewhere)),
            kl=kl,
            kl_standard_error=kl_error,
            kl_elsewhere=other,
            kl_elsewhere_standard_error=other_error,
            top1_agreement=agreement,
            top1_agreement_standard_error=agreement_error,
            top1_agreement_elsewhere=self._mean(AGREES, elsewhere)[0],
            predicted=predicted,
            probability=given if predicted else None,
            probability_standard_error=given_error,
            probability_against=self._mean(GIVEN_AGAINST, seen)[0] if predicted else None,
            excess=excess,
            excess_standard_error=excess_error,
        )

    def _excess(self, kl: float, other: float, elsewhere: list[np.ndarray]) -> tuple[float, float | None]:
        """KL at control tokens less twice that elsewhere; the error of this difference of two ratios is linearised."""
        count, places = len(self.rows), sum(int(mask.sum()) for mask in elsewhere)
        if count < 2 or not places:
            return kl - TIMES_WORSE * other, None
        residuals = [
            (row[mask, KL] - kl).sum() / self.positions - TIMES_WORSE * (row[rest, KL] - other).sum() / places
            for row, mask, rest in zip(self.rows, self.control, elsewhere, strict=True)
        ]
        return kl - TIMES_WORSE * other, math.sqrt(count / (count - 1) * math.fsum(r * r for r in residuals))
