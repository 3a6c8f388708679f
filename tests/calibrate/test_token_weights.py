"""Token weights: the identities of RSQ (arXiv 2503.01820)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import networks as n
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.accumulate import Accumulator
from featherweight.methods.calibrate.session import BlockSession
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.token_weights import attention_weights, normalised, received, text_scores
from featherweight.model.network import query_blocks
from models import FAMILIES as MODELS

CPU = torch.device("cpu")


def gram_of(rows: torch.Tensor, weights: torch.Tensor | None, chunk: int = 1000) -> torch.Tensor:
    accumulator = Accumulator(rows.shape[1], ("gram",), CPU)
    for first in range(0, len(rows), chunk):
        accumulator.add(rows[first : first + chunk], None if weights is None else weights[first : first + chunk])
    return accumulator.finish()["gram"]


def test_weighted_gram_by_brute_force() -> None:
    rows, weights = torch.randn(50, 7), torch.rand(50)
    assert n.close(gram_of(rows, weights), n.gram(rows, weights))
    assert n.close(gram_of(rows, weights, chunk=13), gram_of(rows, weights), 1e-5)


def test_weight_k_is_the_token_k_times() -> None:
    rows = torch.randn(20, 5)
    copies = torch.randint(1, 5, (20,), generator=torch.Generator().manual_seed(0))
    assert n.close(gram_of(rows, copies.float()), gram_of(rows.repeat_interleave(copies, 0), None), 1e-5)


def test_equal_weights_are_no_weights() -> None:
    rows = torch.randn(30, 6)
    assert torch.equal(gram_of(rows, torch.ones(30)), gram_of(rows, None))


@given(st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), st.floats(0, 3), st.integers(0, 10**6))
def test_normalised(sequences: int, length: int, minimum: float, exponent: float, seed: int) -> None:
    scores = torch.rand(sequences, length, generator=torch.Generator().manual_seed(seed)) * 100
    weights = normalised(scores, minimum, exponent)
    assert torch.allclose(weights.mean(1), torch.ones(sequences), atol=1e-4)
    assert bool((weights >= 0).all())
    ordered = weights.gather(1, scores.argsort(1))
    assert bool((ordered.diff(dim=1) >= -1e-6).all())  # never a higher weight for a lower score


def test_floor_and_exponent() -> None:
    scores = torch.tensor([[0.0, 1.0, 3.0]])
    weights = normalised(scores, 0.1, 2.0)
    wanted = torch.tensor([0.1, 0.1 + 0.9 / 3, 1.0]) ** 2
    assert torch.allclose(weights, wanted / wanted.mean())
    assert torch.equal(normalised(torch.full((2, 4), 3.0), 0.005), torch.ones(2, 4))  # no difference, no weights


def test_padding_gets_no_weight() -> None:
    scores, mask = torch.tensor([[1.0, 2.0, 99.0]]), torch.tensor([[True, True, False]])
    weights = normalised(scores, 0.5, 1.0, mask)
    assert weights[0, 2] == 0
    assert torch.allclose(weights.sum(), torch.tensor(2.0))


def first_session(family: str, settings: CalibrationSettings) -> BlockSession:
    return next(n.opened(family, settings).blocks())


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "opt", "gpt-neox", "mixtral"])
def test_attention_received(family: str) -> None:
    """Rows of attention probabilities sum to one; the last token of a causal model is seen by itself only."""
    settings = n.SMALL.model_copy(update={"token_weights": "attention"})
    session = first_session(family, settings)
    heads = 4
    for i, hidden in enumerate(session.inputs):
        scores = attention_weights(session, hidden, i)
        assert scores.shape == hidden.shape[:2]
        assert torch.allclose(scores.sum(1), torch.full((len(scores),), float(heads * hidden.shape[1])), rtol=1e-4)
        if family != "bert":
            assert bool((scores[:, -1] <= heads + 1e-4).all())
            assert bool((scores.argmax(1) < hidden.shape[1] // 2).all())


def test_scores_by_rows_of_queries_are_the_whole_scores() -> None:
    probabilities = torch.rand(2, 3, 16, 16).softmax(-1)
    parts = sum(received(probabilities[:, :, i : i + 5]) for i in range(0, 16, 5))
    assert torch.allclose(received(probabilities), parts, atol=1e-5)


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 5}),
    ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 2.0}),
    ("gemma3", {"sliding_window": 5}),
    ("gpt-oss", {"sliding_window": 5}),
    ("qwen3", {}),
    ("mixtral", {}),
    ("phi", {}),
    ("bert", {}),
    ("gpt2", {}),
    ("opt", {}),
    ("gpt-neox", {}),
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_blocks_of_queries_give_the_scores_of_whole_matrices(
    family: str, settings: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the probabilities that the model itself gives, with scratch for three queries at a time."""
    if not hasattr(transformers, MODELS[family][0]):
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    monkeypatch.setattr(query_blocks, "SCRATCH", query_blocks.COPIES * 3 * 16 * 4 * 3)
    seen: list[torch.Size] = []
    original = query_blocks._plain_attention

    def recorded(module: torch.nn.Module) -> Any:
        plain = original(module)

        def call(one: Any, query: torch.Tensor, *args: Any, **rest: Any) -> Any:
            output, chances = plain(one, query, *args, **rest)  # type: ignore[misc]
            seen.append(chances.shape)
            return output, chances

        return None if plain is None else call

    monkeypatch.setattr(query_blocks, "_plain_attention", recorded)
    mask = torch.ones(6, 16, dtype=torch.int64)
    mask[1::2, 11:] = 0
    path = n.folder(family, **settings)
    weighted = n.SMALL.model_copy(update={"token_weights": "attention"})
    extra = {"attention_mask": mask} if padded else {}
    with n.opened(family, weighted, path=path, **extra) as calibration:
        implementation = calibration.host.model.config._attn_implementation
        session = next(calibration.blocks())
        found = torch.cat([attention_weights(session, h, i) for i, h in enumerate(session.inputs)])
        assert calibration.host.model.config._attn_implementation == implementation
    with torch.no_grad():
        wanted = n.whole(family, path)(n.ids(), output_attentions=True, **extra).attentions[0]
    assert torch.allclose(found, wanted[..., :16].sum((1, 2)), rtol=1e-5, atol=1e-5)
    assert len(seen) > 2 * 4 * 5
    assert all(shape[1] == 1 and shape[2] <= 3 for shape in seen)


def test_scratch_is_bounded_for_long_sequences() -> None:
    """RSQ's own setting: 4096 tokens; the number of heads does not enter, as they are taken one by one."""
    for batch, keys in ((1, 4096), (8, 4096), (1, 32768)):
        step = query_blocks.query_step(batch, keys, torch.float32)
        assert 1 <= step < keys
        assert query_blocks.COPIES * step * batch * keys * 4 <= 64 << 20
    assert query_blocks.query_step(1, 1 << 30, torch.float32) == 1


def test_attention_weights_enter_all_statistics() -> None:
    settings = n.SMALL.model_copy(update={"token_weights": "attention", "minimum_weight": 0.02})
    with n.opened("llama", settings, needs=("gram", "mean")) as calibration:
        session = next(calibration.blocks())
        scores = torch.cat([attention_weights(session, h, i) for i, h in enumerate(session.inputs)])
        found = session.gather(session.names, ("gram", "mean"))
        assert session.effective_tokens is not None
        assert 1 < session.effective_tokens < n.ids().numel()
    weights = normalised(scores, 0.02)
    rows = n.layer_inputs(n.whole("llama"), n.ids())
    for name, statistics in found.items():
        assert n.close(statistics["gram"], n.gram(rows[name], weights)), name
        mean = (rows[name] * weights.reshape(-1, 1)).sum(0) / weights.sum()
        assert n.close(statistics["mean"], mean, 1e-4), name
        assert int(statistics["tokens"]) == n.ids().numel()


def test_experts_use_the_weights_of_their_tokens() -> None:
    settings = n.SMALL.model_copy(update={"token_weights": "first"})
    with n.opened("mixtral", settings) as calibration:
        session = next(calibration.blocks())
        experts = [name for name, layer in session.layers.items() if layer.expert is not None]
        found = session.gather(experts, ("gram",))
    seen = n.layer_inputs(n.whole("mixtral"), n.ids())
    weights = normalised(text_scores("first", n.ids()), 0.005).reshape(-1)
    for name in experts:
        key = n.reference_name(name, seen)
        tokens = seen.get(key.rpartition(".")[0] + ".tokens")
        if tokens is None:
            pytest.skip("this transformers keeps experts apart: their tokens are not known to the reference")
        assert n.close(found[name]["gram"], n.gram(seen[key], weights[tokens])), name


def test_text_scores() -> None:
    ids = torch.tensor([[3, 3, 3, 7, 3, 3, 3, 3] * 2])
    assert text_scores("first", ids)[0].tolist() == [1.0] * 2 + [0.0] * 14
    rare = text_scores("frequency", ids)[0]
    assert rare[3] > rare[0]


def test_expansion_rolls_every_window() -> None:
    settings = n.SMALL.model_copy(update={"expansion": 4, "batch_tokens": 1000})
    with n.opened("llama", settings) as calibration:
        windows = torch.cat([batch["input_ids"] for batch in calibration.batches])
        session = next(calibration.blocks())
        found = session.gather([session.names[0]], ("gram",))
    assert windows.shape == (24, 16)
    assert torch.equal(windows[1], n.ids()[0].roll(4))
    assert int(found[session.names[0]]["tokens"]) == 4 * n.ids().numel()


def test_weights_need_a_language_model() -> None:
    from featherweight.methods.calibrate.runner import Calibration

    with pytest.raises(CalibrationError, match="token_weights"):
        Calibration.of_module(
            torch.nn.Linear(4, 4),
            lambda m, b: m(b),
            [torch.randn(2, 4)],
            n.SMALL.model_copy(update={"token_weights": "first"}),
        )
