"""Tokens to text as it comes, and conversations to prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_models import transformers

import featherweight
from featherweight.engine.chat_template import ChatTemplate
from featherweight.engine.text import TextStream, Tokenizer
from featherweight.errors import CheckpointError, FeatherError
from models import byte_tokenizer

REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte."""
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save_pretrained(folder)
    found = Tokenizer.open(folder)
    assert found is not None
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
def test_first_tokens(wanted: bool | None, tmp_path: Path) -> None:
    """`add_bos_token` of the settings decides, whatever tokenizer.json does by itself."""
    content = json.loads((REFERENCE / "tokenizer.json").read_text())
    content["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})
    content["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    }
    settings = {"bos_token": {"content": "<|endoftext|>"}, "add_bos_token": wanted}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for by_itself in (True, False):
        source = json.dumps(content) if by_itself else (REFERENCE / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(source)
        tokenizer = Tokenizer.open(tmp_path)
        assert tokenizer is not None
        begins = tokenizer.encode("It was")[0] == 0
        assert begins == (by_itself if wanted is None else wanted)
        assert tokenizer.encode("It was", special=False)[0] != 0


TEMPLATES = {
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


def test_damaged_tokenizers(tmp_path: Path) -> None:
    assert Tokenizer.open(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text((REFERENCE / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.open(tmp_path)
