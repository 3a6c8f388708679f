"""`evaluate` on real architectures of transformers, with random weights and a tokenizer of letters."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from known_models import Characters, random_bigram

from featherweight.errors import EvaluationError
from featherweight.evaluate import bundled_text
from featherweight.evaluate.evaluation import check_causal, evaluate, own_context, tokenizer_sha256
from featherweight.evaluate.perplexity import LogitsReader

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 26}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}


def build(kind: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**options)
    for suffix in ("ForCausalLM", "LMHeadModel"):
        if hasattr(transformers, kind + suffix):
            return getattr(transformers, kind + suffix)(config).eval()
    raise AssertionError(kind)


ARCHITECTURES = [
    ("Llama", {**LLAMA}),
    ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    ("Gemma2", {**LLAMA, "head_dim": 16, "final_logit_softcapping": 2.0}),
    ("Granite", {**LLAMA, "logits_scaling": 4.0}),
    ("Cohere", {**LLAMA, "logit_scale": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 26, "n_positions": 64}),
    ("OPT", {**SMALL, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 1}),
    ("GPTNeoX", {**SMALL, "intermediate_size": 64, "max_position_embeddings": 64}),
    ("Phi", {**LLAMA}),
]


@pytest.mark.parametrize(("kind", "options"), ARCHITECTURES)
def test_logits_by_slices_are_the_models(kind: str, options: dict[str, Any]) -> None:
    model = build(kind, **options)
    assert own_context(model) == 64
    check_causal(model)
    ids = torch.randint(26, (2, 20), generator=torch.Generator().manual_seed(0))
    reader = LogitsReader(model)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        positions = reader(ids)
        for row in range(2):
            torch.testing.assert_close(positions.logits(row, 3, 17), expected[row, 3:17].float())
    assert reader.sliceable is (kind not in ("Gemma2", "Granite", "Cohere"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_have_no_perplexity(dtype: torch.dtype, letters: Path) -> None:
    model = build("Bert", **SMALL, intermediate_size=64, max_position_embeddings=64)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # a trained model's attention matters more than a fresh one's
    with pytest.raises(EvaluationError, match="no next-token perplexity"):
        evaluate((model.to(dtype), Characters()), text=letters)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "letters.txt"
    path.write_text("".join(chr(97 + int(i)) for i in torch.randint(26, (300,), generator=generator)))
    return path


def test_everything_at_once(letters: Path) -> None:
    original, compressed = build("Llama", **LLAMA), build("Llama", **LLAMA)
    for parameter in compressed.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    tokenizer = Characters()
    calls: list[tuple[int, int]] = []
    result = evaluate(
        (compressed, tokenizer), (original, tokenizer), letters, progress=lambda *x: calls.append(x), threads=1
    )
    assert result.setting.protocol.context == 64
    assert result.tokens == 4 * 63
    assert calls[-1] == (4, 4)
    report = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert report["tokens"] == 252
    assert report["protocol"] == "own"
    assert 0 < report["kl"] < 1
    assert report["kl_median"] <= report["kl_percentile_99"] <= report["kl_maximum"]
    assert 0 < report["top1_agreement"] < 1
    ratio = math.log(report["perplexity"] / report["perplexity_against"])
    assert report["log_ratio"] == pytest.approx(ratio, abs=1e-9)
    assert report["log_ratio_standard_error"] > 0
    assert report["bits_per_weight"] == {"linear": None, "model": None}
    assert report["peak_memory_bytes"] > 1 << 20
    assert len(report["window_losses"]) == 4
    for part in ("context 64", "float32", result.setting.text_sha256[:16], result.setting.tokenizer_sha256[:16]):
        assert part in report["description"]


def test_without_an_original_kl_is_null(letters: Path) -> None:
    report = evaluate((build("Llama", **LLAMA), Characters()), text=letters, protocol="llama.cpp", context=32).to_json()
    assert report["kl"] is None
    assert report["top1_agreement"] is None
    assert report["perplexity_against"] is None


def test_the_package_is_the_function_too(letters: Path) -> None:
    import featherweight.evaluate as package

    pair = (build("Llama", **LLAMA), Characters())
    assert package(pair, text=letters).perplexity == evaluate(pair, text=letters).perplexity  # type: ignore[operator]


def test_limit_keeps_the_first_tokens(letters: Path) -> None:
    pair = (build("Llama", **LLAMA), Characters())
    short = letters.with_name("short.txt")
    short.write_text(letters.read_text()[:100])
    assert evaluate(pair, text=letters, limit=100).perplexity == evaluate(pair, text=short).perplexity


@pytest.mark.parametrize(("bos", "words"), [(None, "no BOS"), (25, "every window")])
def test_bos_is_said(bos: int | None, words: str, letters: Path) -> None:
    model = random_bigram(26, context=64)
    result = evaluate((model, Characters(bos)), text=letters, protocol="llama.cpp", context=16)
    assert words in result.description
    assert all(row[0] == bos for row in torch.cat(model.seen[2:])) is (bos is not None)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_texts_are_the_same(suffix: str, pack: Any, letters: Path) -> None:
    pair = (random_bigram(26, context=64), Characters())
    packed = letters.with_name("letters.txt" + suffix)
    packed.write_bytes(pack(letters.read_bytes()))
    assert evaluate(pair, text=packed).perplexity == evaluate(pair, text=letters).perplexity


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n ", "empty"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.xz", b"not xz", "whole .xz"),
        ("cut.xz", lzma.compress(b"a" * 1000)[:40], "whole .xz"),
        ("broken.gz", b"not gzip", "whole .gz"),
        ("one.txt", b"a", "1 token"),
        (None, b"", "cannot read"),
    ],
)
def test_bad_texts_are_one_sentence(name: str | None, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match=words) as caught:
        evaluate((random_bigram(26, context=64), Characters()), text=path)
    assert "\n" not in str(caught.value)


def test_bad_options_are_errors(letters: Path) -> None:
    pair = (random_bigram(26, context=64), Characters())
    for options, words in (({"dtype": "int3"}, "dtype"), ({"limit": 1}, "limit"), ({"protocol": "owl"}, "own")):
        with pytest.raises(EvaluationError, match=words):
            evaluate(pair, text=letters, **options)
    with pytest.raises(EvaluationError, match="lacks the bundled text"):
        bundled_text("no such text")


def test_threads_are_put_back(letters: Path) -> None:
    before = torch.get_num_threads()
    evaluate((random_bigram(26, context=64), Characters()), text=letters, threads=before + 1)
    assert torch.get_num_threads() == before


def test_tokenizer_hash_tells_tokenizers_apart_and_ignores_settings_of_a_call() -> None:
    from tokenizers import Tokenizer, models

    def fast(vocabulary: dict[str, int]) -> Any:
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a")

    one, same, other = fast({"a": 0, "b": 1}), fast({"a": 0, "b": 1}), fast({"a": 1, "b": 0})
    one("a b", truncation=True, max_length=2)
    assert tokenizer_sha256(one) == tokenizer_sha256(same) != tokenizer_sha256(other)
    assert tokenizer_sha256(Characters()) != tokenizer_sha256(one)
