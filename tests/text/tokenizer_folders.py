"""Random tokenizer folders: every kind of pipeline, and settings that agree with it or do not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "It was the best of times, it was the worst of times. Don't you think so, Mr. Smith?",
    "def f(x):\n    return x + 12345  # naïve café – “quoted”\n\n\nend",
    "The quick brown fox jumps over the lazy dog 1234567890 times!",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "It was the best",
    " leading and trailing ",
    "<s>typed by the user",
    "<s> <s>twice</s> end</s>",
    "a <extra> b<extra>c  <extra>  d",
    "<soft>x <soft> y",
    "Don't , you . think ? n't",
    "naïve 🪶 “x”\n\n\tdef f(x):",
    "",
    "   ",
    "a",
]


def pipeline(kind: str) -> Tokenizer:
    """A small trained tokenizer; tokens 0 to 2 are <unk>, <s>, </s>."""
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "metaspace":
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL)
    elif kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer = normalizers.BertNormalizer()
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)
    else:
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    core.train_from_iterator(CORPUS, trainer)
    return core


def write_folder(folder: Path, chance: random.Random, cores: dict[str, str]) -> Path:
    """One folder; `cores` is filled with the trained pipelines."""
    kind = chance.choice(["bytes", "bytes", "metaspace", "wordpiece", "unigram"])
    if kind not in cores:
        cores[kind] = pipeline(kind).to_str()
    core = Tokenizer.from_str(cores[kind])
    flags = {name: chance.random() < 0.2 for name in ("lstrip", "rstrip", "single_word")}
    core.add_special_tokens([AddedToken("<extra>", normalized=False, special=True, **flags)])
    core.add_tokens([AddedToken("<soft>", normalized=chance.random() < 0.5, lstrip=chance.random() < 0.3)])
    _post_processor(core, chance)
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    settings = _settings(chance, content)
    if chance.random() < 0.1:
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    if chance.random() < 0.1:
        content["added_tokens"][1]["normalized"] = True
    if kind == "bytes" and chance.random() < 0.2:
        content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": chance.choice(["llama"] * 4 + ["qwen3", "qwen3", "qwen2", "mistral"]), "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config))
    if chance.random() < 0.2:
        names = {
            "bos_token": chance.choice(["<s>", "<extra>", {"content": "<s>", "lstrip": True}]),
            "eos_token": "</s>",
        }
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if chance.random() < 0.05:
        (folder / "added_tokens.json").write_text(json.dumps({"<late>": 1000}))
    return folder


def _post_processor(core: Tokenizer, chance: random.Random) -> None:
    single = chance.choice(["$A", "<s> $A", "<s> $A </s>", "$A </s>", "bytes", None])
    if single == "bytes":
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    elif single is not None:
        core.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )


def _settings(chance: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    plain = ["PreTrainedTokenizerFast"] * 4 + ["TokenizersBackend"] * 2
    other = ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "NoSuchTokenizer", None]
    choices: dict[str, tuple[float, list[Any]]] = {
        "tokenizer_class": (0.95, plain * 2 + other),
        "bos_token": (
            0.8,
            ["<s>", "<s>", {"__type": "AddedToken", "content": "<s>", "lstrip": False}, "<extra>", "<new>", None],
        ),
        "eos_token": (
            0.8,
            [
                "</s>",
                "</s>",
                "<new-end>",
                {"__type": "AddedToken", "content": "</s>", "rstrip": True},
                {"content": "</s>"},
            ],
        ),
        "unk_token": (0.5, ["<unk>"]),
        "pad_token": (0.3, ["<unk>", "</s>", "<pad>"]),
        "add_bos_token": (0.25, [True, False, None]),
        "add_eos_token": (0.15, [True, False, None]),
        "clean_up_tokenization_spaces": (0.5, [False, False, False, True]),
        "add_prefix_space": (0.1, [True, False]),
        "split_special_tokens": (0.05, [True, False]),
        "model_max_length": (0.5, [16, 2048]),
        "additional_special_tokens": (0.15, [["<extra>"], ["<extra>", "<another>"], [{"content": "<extra>"}]]),
        "legacy": (0.05, [True, False]),
        "chat_template": (0.3, ["{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"]),
    }
    usual = chance.random() < 0.5
    for name, (share, values) in choices.items():
        if chance.random() < share:
            settings[name] = values[0] if usual else chance.choice(values)
    if usual:
        for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy"):
            settings.pop(name, None)
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        flags = content["added_tokens"][3]
        if flags["lstrip"] or flags["rstrip"] or flags["single_word"]:
            settings.pop("additional_special_tokens", None)
    if chance.random() < 0.3:
        names = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
        decoder = {str(t["id"]): {n: t[n] for n in names} for t in content["added_tokens"]}
        if chance.random() < 0.3:
            next(iter(decoder.values()))["rstrip"] = True
        settings["added_tokens_decoder"] = decoder
    return settings
