"""The numbers of an evaluation, as an object, as JSON and for a notebook."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.pages.render import bytes_text, render
from featherweight.storage.checkpoint.size import Size
from featherweight.tasks.evaluate.control_tokens import ControlTokens
from featherweight.tasks.evaluate.divergence import Divergence
from featherweight.tasks.evaluate.protocols import Setting
from featherweight.tasks.evaluate.questions.asking import TaskResult


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one evaluation. Losses in nats a token, KL in nats; `size` None for a model given as an object;
    `control` what was measured on conversations, `answers` what each task gave.

    `log_ratio` is log(perplexity / perplexity of the original), paired over windows. Standard errors, its own and the
    others, are from the spread between windows, whose tokens are not independent; None for a single window.
    `warnings` are sentences about what these numbers cannot be trusted for. In a notebook it shows itself as a table.
    """

    perplexity: float
    perplexity_standard_error: float | None
    tokens: int
    windows: int
    setting: Setting
    description: str
    seconds: float
    peak_memory_bytes: int
    size: Size | None = None
    against: str | None = None
    perplexity_against: float | None = None
    log_ratio: float | None = None
    log_ratio_standard_error: float | None = None
    divergence: Divergence | None = None
    window_losses: tuple[float, ...] = ()
    control: ControlTokens | None = None
    perplexity_against_standard_error: float | None = None
    size_against: Size | None = None
    warnings: tuple[str, ...] = ()
    answers: tuple[TaskResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-able; numbers that are not finite become null, as are `kl` and `top1_agreement` without an original."""
        protocol, size, kl = self.setting.protocol, self.size, self.divergence
        report = {
            "perplexity": self.perplexity,
            "perplexity_standard_error": self.perplexity_standard_error,
            "tokens": self.tokens,
            "text_tokens": self.setting.tokens,
            "windows": self.windows,
            "protocol": protocol.name,
            "context": protocol.context,
            "stride": protocol.stride,
            "bos": self.setting.bos,
            "dtype": self.setting.dtype,
            "tokenizer_sha256": self.setting.tokenizer_sha256,
            "text_sha256": self.setting.text_sha256,
            "description": self.description,
            "against": self.against,
            "perplexity_against": self.perplexity_against,
            "perplexity_against_standard_error": self.perplexity_against_standard_error,
            "bytes_against": None if self.size_against is None else self.size_against.bytes,
            "log_ratio": self.log_ratio,
            "log_ratio_standard_error": self.log_ratio_standard_error,
            "kl": None if kl is None else kl.mean,
            "kl_standard_error": None if kl is None else kl.standard_error,
            "kl_median": None if kl is None else kl.median,
            "kl_percentile_99": None if kl is None else kl.percentile_99,
            "kl_maximum": None if kl is None else kl.maximum,
            "top1_agreement": None if kl is None else kl.top1_agreement,
            "top1_standard_error": None if kl is None else kl.top1_standard_error,
            "bits_per_weight": {
                "linear": None if size is None else size.linear_bits,
                "model": None if size is None else size.model_bits,
            },
            "bytes": None if size is None else size.bytes,
            "size": None if size is None else asdict(size),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "window_losses": list(self.window_losses),
            "control_tokens": None if self.control is None else self.control.to_json(),
            "tasks": [one.to_json() for one in self.answers],
            "task_settings": [one.setting for one in self.answers] or None,
            "warnings": list(self.warnings),
        }
        finite: dict[str, Any] = _finite(report)
        return finite

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) of what people want to know, in words."""
        kl = self.divergence
        found = [("perplexity", with_error(self.perplexity, self.perplexity_standard_error, 4))]
        if self.perplexity_against is not None:
            found.append(
                (
                    "perplexity of the original",
                    with_error(self.perplexity_against, self.perplexity_against_standard_error, 4),
                )
            )
            found.append(("excess", self.excess_text()))
        if kl is not None:
            found.append(
                ("KL divergence from the original", f"{with_error(kl.mean, kl.standard_error, 5)} nats a token")
            )
            agreed = with_error(100 * kl.top1_agreement, _times(kl.top1_standard_error, 100), 2)
            found.append(("top-1 agreement", f"{agreed} %"))
        return [*found, *(row for one in self.answers for row in one.rows())]

    def excess_text(self) -> str:
        """Excess perplexity over the original's in per cent, with its standard error; "" without an original."""
        if self.perplexity_against is None:
            return ""
        ratio = self.perplexity / self.perplexity_against
        error = _times(self.log_ratio_standard_error, 100 * ratio)
        return f"{100 * (ratio - 1):+.2f}" + ("" if error is None else f" ± {error:.2f}") + " %"

    def _repr_html_(self) -> str:
        """For notebooks."""
        rows = self.rows()
        if self.size is not None:
            bits = ", ".join(
                f"{value:.3f} {name}"
                for name, value in (("linear", self.size.linear_bits), ("model", self.size.model_bits))
                if value is not None
            )
            rows += [("bits per weight", bits), ("size", bytes_text(self.size.bytes))]
        rows += [("time", f"{self.seconds:.1f} s"), ("peak memory", bytes_text(self.peak_memory_bytes))]
        return render(
            "facts.html.jinja", title="Evaluation", rows=rows, notes=[*self.warnings, f"Protocol: {self.description}"]
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_error(value: float, error: float | None, digits: int) -> str:
    """A number and its standard error, where that is known."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
