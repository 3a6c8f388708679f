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
from known_models import Characters, Sinking, random_bigram

from featherweight.errors import EvaluationError
from featherweight.tasks.evaluate import bundled_text
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.model_checks import check_causal, own_context, tokenizer_sha256
from featherweight.tasks.evaluate.perplexity import LogitsReader

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


def test_public_names_are_functions_whatever_was_imported() -> None:
    import featherweight
    import featherweight.tasks.compress.compression
    import featherweight.tasks.report.page

    assert featherweight.evaluate is evaluate
    for name in ("compress", "evaluate", "load", "quantize"):
        assert callable(getattr(featherweight, name))
        assert name in dir(featherweight)


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
        (None, b"", "there is no text file"),
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


# First tokens.


def sinking(bos: int, context: int = 16) -> Sinking:
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(3)) * 2
    return Sinking(table.log_softmax(-1), bos, context)


@pytest.mark.parametrize(("protocol", "scored"), [("own", 8 * 15), ("strided", 120)])
def test_a_model_that_needs_bos_gets_it_in_every_window(protocol: str, scored: int, tmp_path: Path) -> None:
    """Its perplexity is that of the bigram model alone; without BOS in some window it would be far above."""
    model, path = sinking(25), tmp_path / "text.txt"
    row = [25]
    generator = torch.Generator().manual_seed(1)
    for _ in range(127):
        shares = model.table[row[-1]].exp()
        row.append(int(torch.multinomial(shares / shares.sum(), 1, generator=generator)))
    path.write_text("".join(chr(ord("a") + token) for token in row[1:]))
    result = evaluate((model, Characters(25)), text=path, protocol=protocol)
    assert all(ids[0] == 25 for batch in model.seen[2:] for ids in batch)
    assert result.tokens == scored
    assert "BOS (token 25) before every window" in result.description
    assert "windows of 16 tokens (15 of the text behind 1 that the tokenizer puts before one)" in result.description
    bare = evaluate((model, Characters()), text=path, protocol=protocol)
    assert "no BOS, as the tokenizer adds none" in bare.description
    assert result.perplexity < 15 < 100 < bare.perplexity


def test_exact_loss_behind_bos(tmp_path: Path) -> None:
    model, path, word = sinking(25, context=4), tmp_path / "text.txt", "bacedbac"
    path.write_text(word)
    result = evaluate((model, Characters(25)), text=path)
    ids = [ord(c) - ord("a") for c in word]
    pairs = [(25, ids[0]), (ids[0], ids[1]), (ids[1], ids[2]), (25, ids[3]), (ids[3], ids[4]), (ids[4], ids[5])]
    losses = [-float(model.table[a].double().log_softmax(-1)[b]) for a, b in pairs]
    assert result.tokens == 6
    assert math.log(result.perplexity) == pytest.approx(math.fsum(losses) / 6, rel=1e-6)
    assert (result.setting.tokens, result.windows) == (8, 2)


def test_several_first_tokens(letters: Path) -> None:
    class Two(Characters):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
            start = [24, 25] if add_special_tokens else []
            return {"input_ids": start + [ord(c) - ord("a") for c in text]}

    model = random_bigram(26, context=16)
    result = evaluate((model, Two()), text=letters)
    assert all(ids[:2].tolist() == [24, 25] for batch in model.seen[2:] for ids in batch)
    assert "what the tokenizer puts before a text (tokens 24, 25) before every window" in result.description


# What is left behind, and what is compared.


def test_the_models_modes_are_put_back(letters: Path) -> None:
    model, other = build("Llama", **LLAMA), build("Llama", **LLAMA)
    model.train()
    model.model.layers[0].eval()
    other.eval()
    modes = [module.training for module in model.modules()]
    evaluate((model, Characters()), (other, Characters()), text=letters)
    assert [module.training for module in model.modules()] == modes
    assert not any(module.training for module in other.modules())
    with pytest.raises(EvaluationError):
        evaluate((model, Characters()), text=letters, context=10**6)
    assert [module.training for module in model.modules()] == modes


def test_models_with_different_tokenizers_are_not_compared(letters: Path) -> None:
    class Shifted(Characters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [(token + 1) % 26 for token in super().__call__(text, **options)["input_ids"]]}

        def get_vocab(self) -> dict[str, int]:
            return {letter: (place + 1) % 26 for letter, place in super().get_vocab().items()}

    one, other = random_bigram(26, context=64), random_bigram(26, context=64, seed=1)
    with pytest.raises(EvaluationError, match="different tokenizers") as caught:
        evaluate((one, Characters()), (other, Shifted()), text=letters)
    assert "\n" not in str(caught.value)
    assert evaluate((one, Characters()), (other, Characters()), text=letters).divergence is not None
    assert evaluate((one, Characters()), (other, None), text=letters).divergence is not None

    class Renamed(Characters):
        """The same by another name."""

    assert evaluate((one, Characters()), (other, Renamed()), text=letters).divergence is not None


def test_tokens_without_a_row_are_one_sentence(letters: Path) -> None:
    class Far(Characters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [300, *super().__call__(text, **options)["input_ids"]]}

    with pytest.raises(EvaluationError, match="has token 300 and the model a vocabulary of"):
        evaluate((build("Llama", **LLAMA), Far()), text=letters)
    with pytest.raises(EvaluationError, match="cannot run the model on the text"):
        evaluate((random_bigram(26, context=64), Far()), text=letters)
