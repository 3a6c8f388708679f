"""Measuring: perplexity by named protocol, divergence from the original, true sizes, speed, and the report."""

from featherweight.callable_package import make_callable
from featherweight.evaluate.evaluation import Evaluation, bundled_text
from featherweight.evaluate.size import Size, measure_size

__all__ = ["Evaluation", "Size", "bundled_text", "measure_size"]

make_callable(__name__)
