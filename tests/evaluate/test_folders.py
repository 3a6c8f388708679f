"""From folders on disk: `evaluate` and `measure_speed` through `featherweight.load`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from featherweight.errors import CheckpointError, EvaluationError
from featherweight.system.transformers_calls import cache_name
from featherweight.tasks.evaluate import speed as speed_module
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.speed import measure_speed, read_bandwidth
from models import make_tiny

LETTERS = "abcdefghijklmnop "


def tokenizer(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<s>": len(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>" if bos else None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    places = torch.randint(len(LETTERS), (400,), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(LETTERS[int(i)] for i in places))
    return path


def write(folder: Path, config: transformers.PretrainedConfig, cls: type, with_tokenizer: bool = True) -> Path:
    torch.manual_seed(0)
    cls(config).to(torch.bfloat16).save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=96,
    )
    return write(tmp_path / "llama", config, transformers.LlamaForCausalLM)


def test_a_folder_against_itself(llama: Path, text: Path) -> None:
    report = evaluate(llama, against=llama, text=text, dtype="float32").to_json()
    assert report["kl"] == 0
    assert report["top1_agreement"] == 1
    assert report["bits_per_weight"] == {"linear": 16, "model": 16}
    assert report["bytes"] == (llama / "model.safetensors").stat().st_size
    assert report["dtype"] == "float32"
    assert report["tokens"] == 4 * 95
    json.dumps(report, allow_nan=False)


def test_dtype_is_respected(llama: Path, text: Path) -> None:
    assert evaluate(llama, text=text, dtype="bfloat16").setting.dtype == "bfloat16"


def test_an_encoder_is_refused(tmp_path: Path, text: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    folder = write(tmp_path / "bert", config, transformers.BertForMaskedLM)
    with pytest.raises(EvaluationError, match="no next-token perplexity"):
        evaluate(folder, text=text, dtype="float32")


def test_what_is_missing_is_said(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "nothing", text=text)
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EvaluationError, match="no tokenizer"):
        evaluate(llama, text=text)


def test_speed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "BUFFER_BYTES", 1 << 22)
    report = measure_speed(llama, prompt_tokens=512, new_tokens=8)
    assert (report["prompt_tokens"], report["new_tokens"]) == (88, 8)  # within a context of 96
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "bandwidth_gb_s", "peak_memory_bytes"):
        assert report[key] > 0
    read = report["decode_tokens_per_second"] * report["bytes_per_token"]
    assert report["bandwidth_share"] == pytest.approx(read / (report["bandwidth_gb_s"] * 1e9))
    json.dumps(report, allow_nan=False)
    with pytest.raises(EvaluationError, match="at least one token"):
        measure_speed(llama, new_tokens=0)


def test_bandwidth_is_plausible() -> None:
    assert 1e8 < read_bandwidth(size=1 << 24) < 1e13


def test_the_cache_goes_by_the_name_that_the_version_has(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 renamed it, and warns of the old name."""
    assert cache_name(Renamed()) == "cache"
    assert cache_name(Named()) == "past_key_values"
    monkeypatch.setattr(speed_module, "BUFFER_BYTES", 1 << 22)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        report = measure_speed(llama, prompt_tokens=16, new_tokens=4, engine="transformers", repeats=1)
    assert report["engine"] == "transformers"


class Named:
    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> None: ...


class Renamed:
    def forward(self, input_ids: torch.Tensor, cache: object = None) -> None: ...


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_speed_of_models_that_do_not_continue_a_text(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path, torch.float32, tokenizer=True)
    with pytest.raises(EvaluationError, match="does not continue a text"):
        measure_speed(folder, prompt_tokens=8, new_tokens=2, repeats=1)
