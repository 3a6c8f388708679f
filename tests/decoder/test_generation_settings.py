"""What a folder says about generation means the same to both engines; seeds and what they are for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import some_tokens

from featherweight.cli.backends import (
    BackendSettings,
    GenerationSettings,
    NativeBackend,
    TransformersBackend,
    open_backend,
)
from featherweight.errors import CheckpointError, FeatherError
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.sampling import FOREIGN, Sampling, derived_seed, generation_defaults
from models import make_tiny

PLAIN = GenerationSettings(max_tokens=12, temperature=None, top_k=None, top_p=None, seed=0)
ACTIVE: dict[str, Any] = {
    **{
        "num_beams": 2,
        "num_beam_groups": 2,
        "guidance_scale": 1.5,
        "typical_p": 0.5,
        "encoder_repetition_penalty": 1.2,
    },
    **{"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    **{"top_h": 0.5, "min_length": 30, "min_new_tokens": 5, "penalty_alpha": 0.6, "max_time": 5.0},
    **{"stop_strings": ["ab"], "bad_words_ids": [[5]], "suppress_tokens": [5], "begin_suppress_tokens": [5]},
    **{
        "sequence_bias": [[[5], 2.0]],
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 0,
        "forced_decoder_ids": [[1, 5]],
    },
    **{"exponential_decay_length_penalty": [2, 1.1], "watermarking_config": {"bias": 2.0}, "dola_layers": "low"},
    **{"constraints": [1], "force_words_ids": [[5]], "prompt_lookup_num_tokens": 3, "token_healing": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_tiny("llama", folder, torch.float32, tokenizer=True, initializer_range=0.3)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def says(folder: Path, **settings: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def answers(folder: Path, engine: str, choices: GenerationSettings = PLAIN, count: int = 1) -> list[str]:
    backend = open_backend(BackendSettings(str(folder), engine, "float32" if engine == "native" else "auto", threads=1))
    return [backend.write(backend.encode("It was"), choices) for _ in range(count)]


# What the folder says.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": None, "top_k": None, "do_sample": None}, {}),
        ({"top_k": 20.0, "repetition_penalty": 1.2}, {"top_k": 20, "repetition_penalty": 1.2}),
    ],
)  # fmt: skip
def test_settings_of_a_folder(settings: dict[str, Any], expected: dict[str, float], tmp_path: Path) -> None:
    for place in ("generation_config.json", "config.json"):
        if place == "config.json":
            (tmp_path / "generation_config.json").unlink()
            found = generation_defaults(tmp_path, {**settings, "model_type": "llama"})
        else:
            found = generation_defaults(says(tmp_path, **settings, eos_token_id=3), {"temperature": 0.1})
        if settings or place == "config.json":
            assert dict(found.settings) == expected
        assert not found.foreign
    ours = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert found.sampling({}) == Sampling(**(ours | expected))
    given = {"temperature": 0.3, "top_k": 7, "top_p": None, "min_p": None, "repetition_penalty": 1.5}
    chosen = {name: value for name, value in given.items() if value is not None}
    assert found.sampling(given, 4) == Sampling(**(ours | expected | chosen), seed=4)


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [2, 5]}, (2, 5)),
        ({"eos_token_id": None}, (9,)),
        ({"eos_token_id": -1}, ()),
        ({}, (9,)),
    ],
)
def test_stop_tokens(settings: dict[str, Any], stops: tuple[int, ...], tmp_path: Path) -> None:
    assert generation_defaults(says(tmp_path, **settings), {"eos_token_id": 9}).stops == stops
    assert generation_defaults(says(tmp_path, top_k=3), {"text_config": {"eos_token_id": [4]}}).stops == (4,)


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": "0.8"}, {"temperature": True}, {"temperature": [0.8]}, {"temperature": -1}, {"top_k": 2.5}),
        *({"top_p": 2}, {"top_k": -1}, {"min_p": {}}, {"repetition_penalty": 0}, {"do_sample": "yes"}),
        *({"eos_token_id": "</s>"}, {"eos_token_id": [2, None]}, {"eos_token_id": 2.0}, {"temperature": float("nan")}),
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ["native", "transformers", "auto"])
def test_senseless_settings_are_one_sentence(settings: dict[str, Any], engine: str, folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        answers(says(folder, **settings), engine)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_sentence(folder: Path) -> None:
    for content in ("{", "[1]", '"text"', "\ud800"):
        (folder / "generation_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match="generation_config.json"):
            answers(folder, "native")


# Both engines.


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.8},
        {"do_sample": True, "temperature": 0.7, "top_k": 1},
        {"do_sample": True, "temperature": 1e-300, "top_k": 0},
        {"do_sample": True, "temperature": 0.7, "min_p": 1.0, "repetition_penalty": 2.5},
    ],
    ids=str,
)
def test_both_engines_write_the_same(settings: dict[str, Any], folder: Path) -> None:
    says(folder, **settings)
    native = answers(folder, "native", count=2)
    assert native == answers(folder, "transformers", count=2)
    assert native[0] == native[1]
    (folder / "generation_config.json").unlink()
    bare = answers(folder, "native", GenerationSettings(12, 0.0, None, None, 0))[0]
    assert (native[0] == bare) is ("repetition_penalty" not in settings)


def test_stop_tokens_end_the_text_in_both(folder: Path) -> None:
    greedy = GenerationSettings(12, 0.0, None, None, 0)
    backend = open_backend(BackendSettings(str(folder), "native", "float32", threads=1))
    assert isinstance(backend, NativeBackend)
    tokens = backend.model.generate(backend.encode("It was"), 12)
    says(folder, eos_token_id=[tokens[4], 1])
    cut = answers(folder, "native", greedy)
    assert (
        cut == answers(folder, "transformers", greedy) == [backend.tokenizer.decode(tokens[: tokens.index(tokens[4])])]
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_native_decoder_lacks_is_handed_over(name: str, folder: Path) -> None:
    """Whatever transformers makes of it is a text or a sentence."""
    says(folder, **{name: ACTIVE[name]})
    with pytest.raises(UnsupportedModelError, match=name):
        open_backend(BackendSettings(str(folder), "native", "auto", threads=1))
    try:
        backend = open_backend(BackendSettings(str(folder), "auto", "auto", threads=1))
        assert isinstance(backend, TransformersBackend)
        backend.write(backend.encode("It was"), GenerationSettings(6, 0.0, None, None, 0))
    except FeatherError as error:
        said = str(error)
        assert "transformers cannot" in said
        assert "\n" not in said


@pytest.mark.parametrize("name", ["no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"])
def test_what_is_handed_over_has_its_effect(name: str, folder: Path) -> None:
    greedy = GenerationSettings(40, 0.0, None, None, 0)
    backend = open_backend(BackendSettings(str(folder), "native", "float32", threads=1))
    assert isinstance(backend, NativeBackend)
    prompt = backend.encode("It was")
    before, first = backend.write(prompt, greedy), backend.model.generate(prompt, 1)[0]
    value = {"no_repeat_ngram_size": 1, "bad_words_ids": [[first]], "suppress_tokens": [first]}[name]
    assert answers(folder, "transformers", greedy) == [before]
    assert answers(says(folder, **{name: value}), "auto", greedy) != [before]


def test_neutral_settings_change_nothing(folder: Path) -> None:
    says(
        folder, num_beams=1, typical_p=1.0, no_repeat_ngram_size=0, guidance_scale=None, bad_words_ids=None,
        suppress_tokens=[], max_length=3, max_new_tokens=2, length_penalty=2.0, min_length=0, pad_token_id=0,
    )  # fmt: skip
    backend = open_backend(BackendSettings(str(folder), "auto", "auto", threads=1))
    assert isinstance(backend, NativeBackend)
    greedy = GenerationSettings(12, 0.0, None, None, 0)
    assert answers(folder, "native", greedy) == answers(folder, "transformers", greedy)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_prompts_that_do_not_fit(engine: str, folder: Path) -> None:
    backend = open_backend(BackendSettings(str(folder), engine, "auto", threads=1))
    with pytest.raises(FeatherError, match="200 tokens do not fit the context of 128"):
        backend.write([5] * 200, PLAIN)
    with pytest.raises(FeatherError, match="there is no token 256, the vocabulary has 256"):
        backend.write([5, 256], PLAIN)
    assert len(backend.write([5] * 120, GenerationSettings(100, 0.0, None, None, 0))) < 100


def test_more_tokens_than_learned_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny("gpt2", tmp_path, tokenizer=True)
    backend = open_backend(BackendSettings(str(folder), "auto", "auto", threads=1))
    assert isinstance(backend, TransformersBackend)
    backend.write([5] * 120, GenerationSettings(100, 0.0, None, None, 0))
    with pytest.raises(FeatherError, match="129 tokens do not fit the context of 128"):
        backend.write([5] * 129, PLAIN)


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{{ messages[0].content + none }}", "{% for m in messages %}"],
)
def test_templates_that_refuse_a_conversation(engine: str, template: str, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    backend = open_backend(BackendSettings(str(folder), engine, "auto", threads=1))
    assert backend.has_template
    with pytest.raises(FeatherError, match="refuses this conversation") as caught:
        backend.prompt([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
    assert "\n" not in str(caught.value)


# Seeds.

WARM = {"temperature": 1.5}


def test_equal_prompts_in_a_batch_give_different_texts(plain: Path) -> None:
    model, prompt = NativeModel.open(plain, threads=1), some_tokens(8)
    texts = model.generate_batch([prompt] * 6, 12, Sampling(**WARM, seed=3))
    assert len({tuple(text) for text in texts}) == 6
    assert texts == model.generate_batch([prompt] * 6, 12, Sampling(**WARM, seed=3))
    assert texts[0] == model.generate(prompt, 12, Sampling(**WARM, seed=3))
    assert texts[4] == model.generate(prompt, 12, Sampling(**WARM, seed=derived_seed(3, 4)))
    assert texts != model.generate_batch([prompt] * 6, 12, Sampling(**WARM, seed=4))


def test_calls_without_a_seed_have_random_numbers_of_their_own(plain: Path) -> None:
    prompt = some_tokens(8)
    runs = []
    for _ in range(2):
        model = NativeModel.open(plain, threads=1)
        texts = [model.generate(prompt, 12, Sampling(**WARM)) for _ in range(4)]
        texts += model.generate_batch([prompt] * 2, 12, [Sampling(**WARM)] * 2)
        assert len({tuple(text) for text in texts}) == 6
        runs.append(texts)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_turns_do_not_share_random_numbers(engine: str, plain: Path) -> None:
    warm = GenerationSettings(12, 1.5, 0, None, 5)
    one, again = answers(plain, engine, warm, count=3), answers(plain, engine, warm, count=3)
    assert one == again
    assert len(set(one)) == 3
    assert answers(plain, engine, GenerationSettings(12, 1.5, 0, None, 6)) != one[:1]


def test_derived_seeds() -> None:
    assert derived_seed(7, 0) == 7
    assert len({derived_seed(seed, index) for seed in range(-5, 50) for index in range(50)}) == 55 * 50
    assert derived_seed(0, 1) == derived_seed(0, 1) < 2**64


@pytest.mark.parametrize("value", ["0.8", None, [1]])
def test_wrong_kinds_of_settings(value: Any) -> None:
    with pytest.raises(FeatherError, match="temperature"):
        Sampling(temperature=value)
    with pytest.raises(FeatherError, match="seed"):
        Sampling(seed=0.5)  # type: ignore[arg-type]
