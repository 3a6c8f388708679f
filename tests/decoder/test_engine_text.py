"""Tokens to text as it comes, and conversations to prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_models import transformers

import featherweight
from featherweight.errors import CheckpointError, FeatherError
from featherweight.model.decoder.text import TextStream, Tokenizer
from featherweight.model.text.chat_template import ChatTemplate
from models import byte_tokenizer

REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte."""
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = Tokenizer.open(folder)
    assert found is not None
    assert found.direct
    return found


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer.decode, pieces.append)
    for token in tokens:
        stream.put(token)
    assert stream.end() == "".join(pieces)
    return pieces


@given(st.text(max_size=30))
def test_text_comes_whole_and_in_whole_characters(bytes_tokenizer: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    pieces = streamed(bytes_tokenizer, bytes_tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_characters_appear_as_soon_as_they_are_complete(bytes_tokenizer: Tokenizer) -> None:
    assert streamed(bytes_tokenizer, bytes_tokenizer.encode("né 🪶!")) == ["n", "é", " ", "🪶", "!"]


def test_an_incomplete_character_at_the_end(bytes_tokenizer: Tokenizer) -> None:
    assert "".join(streamed(bytes_tokenizer, bytes_tokenizer.encode("a🪶")[:-1])).startswith("a\ufffd")


def test_the_reference_tokenizer_is_that_of_transformers() -> None:
    ours, theirs = Tokenizer.open(REFERENCE), transformers.AutoTokenizer.from_pretrained(REFERENCE)
    assert ours is not None
    text = "“It was”, she said — naïvely\n\n  and then…\t12345"
    tokens = ours.encode(text)
    assert tokens == theirs(text).input_ids
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert "".join(streamed(ours, tokens)) == ours.decode(tokens)
    assert ours.decode([0, *tokens, 0]) == ours.decode(tokens)


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("by_itself", [True, False])
def test_first_tokens_are_those_of_transformers(wanted: bool | None, by_itself: bool, tmp_path: Path) -> None:
    """Whatever `add_bos_token` and tokenizer.json say; a first token that the user wrote stays."""
    content = json.loads((REFERENCE / "tokenizer.json").read_text())
    if by_itself:
        content["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})
        content["post_processor"]["special_tokens"] = {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        }
    settings: dict[str, Any] = {"bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if wanted is not None:
        settings["add_bos_token"] = wanted
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text((REFERENCE / "config.json").read_text())
    ours, theirs = Tokenizer.open(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours is not None
    assert ours.direct == (wanted is None)
    for text in ("It was", "<|endoftext|>It was", " x"):
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special).input_ids
    assert ours.encode("<|endoftext|>It was", special=False)[0] == 0


TEMPLATES = {
    "tools": "{% if tools is not none %}tools{% endif %}{{ documents is defined }}{{ tools is defined }}",
    "compact json": "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
    "ranges": "{% for i in range(messages | length) %}{{ loop.last }}{{ messages[i].role * 2 }}{% endfor %}{{ 2**3 }}",
    "macros": "{% macro f(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{{ f(messages[0]) }}{{ f(messages[1]) }}",
    "plain": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "loops": "{{ bos_token }}{%- for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    [{{ loop.index }}] {{ m.content }}\n{%- endfor %}",
    "json": "{{ messages | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}
TALK = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "  Hé llo "},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["settings", "file"])
def test_templates_render_as_in_transformers(name: str, place: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    if place == "settings":
        settings["chat_template"] = TEMPLATES[name]
    else:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.open(tmp_path)
    assert ours is not None
    assert ours.chat_template is not None
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert ours.chat_template.render(TALK) == expected


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for m in messages %}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ missing.content.text }}", "refuses"),
    ],
)
def test_templates_that_refuse(source: str, words: str) -> None:
    with pytest.raises(FeatherError, match=words):
        ChatTemplate(source, {}).render(TALK)


ENDLESS = {
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long loop": "{% for i in range(9999999999) %}x{% endfor %}",
    "repetition": "{{ 'x' * 99999999999 }}",
    "power": "{{ 7 ** 999999999 }}",
    "much text": "{% for i in range(9999) %}{% for j in range(999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_never_end(source: str) -> None:
    with pytest.raises(FeatherError, match="refuses this conversation") as caught:
        ChatTemplate(source, {}).render(TALK)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'] + none }}",
        "{{ 1 // 0 }}",
        "{{ messages[9].content.x }}",
        "{{ 'a' | nofilter }}",
        "{%",
    ],
)
@pytest.mark.parametrize("engine", ["tokenizers", "transformers"])
def test_faults_in_templates_are_one_sentence(source: str, engine: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    template = ChatTemplate(source, {}) if engine == "tokenizers" else Tokenizer.of(tokenizer).chat_template
    assert template is not None
    with pytest.raises(FeatherError, match="refuses this conversation") as caught:
        template.render(TALK)
    assert "\n" not in str(caught.value)


def test_damaged_tokenizers(tmp_path: Path) -> None:
    assert Tokenizer.open(tmp_path) is None
    (tmp_path / "config.json").write_text((REFERENCE / "config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text((REFERENCE / "tokenizer_config.json").read_text())
    for damaged in ('{"model": 3}', '{"added_tokens": 5}', "{}", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError) as caught:
            Tokenizer.open(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text((REFERENCE / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.open(tmp_path)
