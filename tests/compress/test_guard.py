"""The safeguard of calibrated codes: judged on held-out data, against what the method aims at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense
from featherweight.tasks.compress.solve import drift_error, output_error


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams() -> tuple[Tensor, Tensor]:
    """Inputs of the quantised stream, and of the original one, [tokens, in]."""
    inputs = random(400, 24, seed=1) + random(24, seed=2)
    return inputs, inputs + 0.3 * inputs @ random(24, 24, seed=3) / 24**0.5 + 0.1


def of_inputs() -> tuple[Tensor, Tensor]:
    inputs, original = streams()
    return inputs.T @ inputs / len(inputs), (original - inputs).T @ inputs / len(inputs)


def against_original(weight: Tensor, code: Code) -> float:
    """sum of squares of W x~ - Q x, over that of W x."""
    inputs, original = streams()
    missed = original @ weight.T - inputs @ code.decode().T
    return float(missed.square().sum() / (inputs @ weight.T).square().sum())


def test_both_errors_together_are_those_against_the_original_output() -> None:
    """But for what no code changes: the difference of two codes' errors is the difference of the plain formula."""
    weight, (gram, cross) = random(16, 24, seed=4), of_inputs()
    codes = [Dense(weight + size * random(16, 24, seed=5)) for size in (0.1, 0.4)]
    mine = [output_error(weight, code, gram) + drift_error(weight, code, gram, cross) for code in codes]
    plain = [against_original(weight, code) for code in codes]
    assert mine[1] - mine[0] == pytest.approx(plain[1] - plain[0], rel=1e-3)


def test_a_code_that_makes_up_for_the_stream_counts_as_better() -> None:
    """W (I + D H^-1) is far from W, and yet what serves best: the output error alone would throw it away."""
    weight, (gram, cross) = random(16, 24, seed=4), of_inputs()
    shifted = Dense(weight + weight @ cross @ torch.linalg.inv(gram))
    close = Dense(weight + 0.01 * random(16, 24, seed=5))
    assert output_error(weight, shifted, gram) > output_error(weight, close, gram)
    judged = [output_error(weight, code, gram) + drift_error(weight, code, gram, cross) for code in (shifted, close)]
    assert judged[0] < judged[1]
