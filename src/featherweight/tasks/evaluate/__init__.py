"""Measuring: perplexity by named protocol, divergence from the original, true sizes, speed, and the report."""

from featherweight.storage.checkpoint.size import Size, measure_size
from featherweight.tasks.evaluate.evaluation import bundled_text
from featherweight.tasks.evaluate.result import Evaluation

__all__ = ["Evaluation", "Size", "bundled_text", "measure_size"]
