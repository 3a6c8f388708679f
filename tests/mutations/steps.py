"""What the package is asked to do with a mutant: every command by itself, and what came of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.integrations.loading import TOKENIZER_FILES
from featherweight.model.decoder.architectures import UnsupportedModelError
from mutations.files import Files

TOKENS = (256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33, 10, 65, 66)
TEXT = "Hello  world, <s>again</s> \u00e9\n\ttabs"
MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"})
LARGE = 10**6
"""A whole number beyond this in config.json would make transformers alone ask for all memory."""
Told = Callable[[str], object]


@dataclass
class Outcome:
    """status: ok, refused (in a sentence of ours), failed (by anything else); value: what a step gave, if ok."""

    status: str
    text: str = ""
    error: str = ""
    value: Any = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def refused(self) -> bool:
        return self.status == "refused"


@dataclass
class Verdict:
    """outcomes by step; faults as (rule, words); notes: what is odd but allowed; original: files before mutations
    that change no value."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    original: Files | None = None

    @property
    def loaded(self) -> bool:
        return self.outcomes["load"].ok

    def fault(self, rule: str, words: str) -> None:
        self.faults.append((rule, " ".join(words.split())[:600]))


def attempt(function: Callable[[], Any]) -> Outcome:
    try:
        return Outcome("ok", value=function())
    except FeatherError as error:
        return Outcome("refused", str(error), type(error).__name__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust, and SystemExit, are none
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "featherweight" in f.filename]
        return Outcome("failed", f"{str(error)[:300]} [{' '.join(ours[-3:])}]", type(error).__name__)


def plan(folder: Path) -> Any:
    from featherweight.methods.recipe import load_recipe
    from featherweight.storage.checkpoint.checkpoint import Checkpoint
    from featherweight.tasks.compress.plan import make_plan

    with Checkpoint.open(folder) as checkpoint:
        return make_plan(checkpoint, load_recipe("rtn-8", ()), 1).summary()


def verify(folder: Path) -> Any:
    from featherweight.tasks.analyse.verify import verify

    return verify(folder)


def inspect(folder: Path) -> Any:
    from featherweight.tasks.analyse.inspect import inspect_folder

    return json.dumps(inspect_folder(folder))


def decode(folder: Path) -> Tensor:
    from featherweight.model.decoder.model import NativeModel

    model = NativeModel.open(folder, threads=1, precision="float")
    if len(TOKENS) > model.context:
        raise UnsupportedModelError("the context is shorter than the tokens")
    if max(TOKENS) >= model.network.vocabulary:
        return model.forward([token % model.network.vocabulary for token in TOKENS])
    return model.forward(TOKENS)


def load(folder: Path, seed: int) -> tuple[Any, Any, Tensor | None]:
    """Model, tokenizer, and logits; None where the class itself raises, which evaluation has to put into words."""
    import featherweight

    torch.manual_seed(seed)
    model, tokenizer = featherweight.load(folder, dtype="float32", attn_implementation="eager")
    return model, tokenizer, attempt(lambda: logits_of(model)).value


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits (hidden states of a model without a head) behind TOKENS, keys and values rounded as the decoder does."""
    import transformers

    class HalfCache(transformers.DynamicCache):  # type: ignore[misc,name-defined]
        def update(self, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
            return super().update(key.half().to(key.dtype), value.half().to(value.dtype), *rest, **named)

    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[token % rows for token in TOKENS]])
    if type(model).__name__.startswith(("Llama", "Mistral", "Qwen2For", "Qwen3For")):
        logits: Tensor = model(tokens, past_key_values=HalfCache(), use_cache=True).logits[0].float()
        if logits.isfinite().all():  # else a key is too large for half precision, which the decoder's cache bounds
            return logits
    given = model(tokens)
    return (given.logits if "logits" in given else given.last_hidden_state)[0].float()


@torch.no_grad()
def largest_key(model: Any, tokens: list[int]) -> float:
    """The largest absolute value that the cache holds behind these tokens."""
    import transformers

    sizes = [0.0]

    class Watching(transformers.DynamicCache):  # type: ignore[misc,name-defined]
        def update(self, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
            sizes.extend((float(key.abs().max()), float(value.abs().max())))
            return super().update(key, value, *rest, **named)

    model(torch.tensor([tokens]), past_key_values=Watching(), use_cache=True)
    return max(sizes)


def oracle(folder: Path) -> Outcome:
    """What transformers alone says: its loading report, and logits."""
    import transformers

    try:
        config = json.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict) or _too_large(config):
            return Outcome("unknown", "config.json")
        cls = getattr(transformers, str((config.get("architectures") or [""])[0]), transformers.AutoModelForCausalLM)
        named = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = cls.from_pretrained(folder, output_loading_info=True, **named)
        logits = attempt(lambda: logits_of(model.eval()))
        listed = {key: sorted(map(str, report.get(key) or ())) for key in ("missing_keys", "unexpected_keys")}
        listed["mismatched_keys"] = [str(key) for key in report.get("mismatched_keys") or ()]
        if report.get("error_msgs") or report.get("conversion_errors"):
            return Outcome("failed", str(report.get("error_msgs") or report.get("conversion_errors")))
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokens = attempt(lambda: _tokens_of(folder))
            listed["tokenizer"] = [] if tokens.ok and tokens.value else [f"{tokens.error}: {tokens.text}"]
    except Exception as error:
        return Outcome("failed", str(error)[:300], type(error).__name__)
    return Outcome("ok", value=(listed, logits.value))


def _tokens_of(folder: Path) -> Any:
    """What transformers alone makes of a text; nothing where the vocabulary is missing."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer("some words", add_special_tokens=False)["input_ids"]


def _too_large(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_too_large, value.values()))
    if isinstance(value, list):
        return any(map(_too_large, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGE


def open_engine(folder: Path, engine: str) -> Any:
    from featherweight.cli.backends import BackendSettings, open_backend

    return open_backend(BackendSettings(str(folder), engine, "float32", threads=1))


def generate(backend: Any) -> tuple[list[int], str]:
    from featherweight.cli.backends import GenerationSettings

    tokens = backend.encode(TEXT)
    return tokens, backend.write(tokens, GenerationSettings(6, 0.0, 0, 1.0, 0))


def chat(backend: Any) -> str | None:
    return backend.prompt(list(MESSAGES)) if backend.has_template else None


def evaluate(folder: Path) -> float:
    import featherweight

    text = evaluation_text(folder)
    return float(featherweight.evaluate(folder, text=text, limit=40, dtype="float32", threads=1).perplexity)


def evaluation_text(folder: Path) -> Path:
    text = folder.with_name("evaluation.txt")
    if not text.exists():
        text.write_text(TEXT * 8)
    return text


def compress(folder: Path, out: Path, calibrated: bool) -> Tensor | None:
    """Logits of what becomes of the folder in eight bits; None where its class cannot compute any."""
    import shutil

    import featherweight

    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if calibrated:
        text = evaluation_text(folder)
        changes = ("grid.bits=8", "calibration.sequences=3", "calibration.length=24")
        featherweight.compress(folder, "gptq", out, changes=changes, calibration=text, threads=1)
    else:
        featherweight.compress(folder, "rtn-8", out, threads=1)
    model, _ = featherweight.load(out, dtype="float32", attn_implementation="eager")
    return attempt(lambda: logits_of(model)).value
