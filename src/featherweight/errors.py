"""Every error a person can cause: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class FeatherError(Exception):
    """Base of all errors raised on purpose; the command line prints its text alone and exits with 1."""


class FeatherWarning(UserWarning):
    """What a person should know although the work goes on; the command line prints its text as a note."""


class FallbackWarning(FeatherWarning, RuntimeWarning):
    """Something is done in a slower way, or not at all, because what does it better is missing or wrong here."""


class CheckpointError(FeatherError):
    """A source checkpoint cannot be read: missing, truncated, hostile, of a refused kind, or of unknown structure."""


class NonFiniteError(FeatherError):
    """A weight is NaN or infinite; the text names the tensor and the index."""


class RecipeError(FeatherError):
    """A recipe is wrong; the text names the field and, for a misspelling, the nearest valid name."""


class CalibrationError(FeatherError):
    """Calibration cannot be done with this model, text or setting."""


class OutputError(FeatherError):
    """The output cannot be written, or exists already."""


class EvaluationError(FeatherError):
    """A measurement cannot be made with the given text or protocol."""


def shown(value: object, most: int = 60) -> str:
    """A value that somebody has written into a file, for the sentence that refuses it: a file may hold pages of it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."
