"""What the package makes of a mutant, and whether that is right: one function a rule."""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.engine.families import UnsupportedModelError
from featherweight.errors import FeatherError
from featherweight.integrations.loading import TOKENIZER_FILES
from mutations.files import Files
from mutations.kinds import Case

TOKENS = (256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33, 10, 65, 66)
TEXT = "Hello  world, <s>again</s> \u00e9\n\ttabs"
MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"})
CLOSE = 2e-2
"""Largest relative difference of logits; unmutated bases stay below 1e-3 (half-precision caches on both sides)."""
LONGEST = 500
REPRESENTATION = re.compile(r"Traceback|object at 0x|<class '|<built-in|torch\.Size|Error\(")
THEIRS = "transformers cannot"
"""Begins what transformers refuses: the native decoder may take it if what is odd does not touch the computation."""
FLOATS = ("F64", "F32", "F16", "BF16")
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
    """outcomes by step; faults as (rule, words); notes: what is odd but allowed."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
    except Exception as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "featherweight" in f.filename]
        return Outcome("failed", f"{str(error)[:300]} [{' '.join(ours[-3:])}]", type(error).__name__)


def judge(case: Case, folder: Path, told: Told = lambda step: None) -> Verdict:
    """Run everything on `folder` and apply the rules. `told` hears each step's name before it begins."""
    verdict = Verdict()
    native_first = case.number % 2 == 0  # neither may lean on what the other did

    def run(step: str, function: Callable[[], Any]) -> Outcome:
        told(step)
        verdict.outcomes[step] = attempt(function)
        return verdict.outcomes[step]

    run("plan", lambda: _plan(folder))
    run("verify", lambda: _verify(folder))
    run("inspect", lambda: _inspect(folder))
    if native_first:
        run("native", lambda: _native(folder))
    run("load", lambda: _load(folder, case.number))
    if not native_first:
        run("native", lambda: _native(folder))
    told("transformers")
    verdict.outcomes["transformers"] = _oracle(folder)
    _more(case, folder, verdict, run)
    told("judging")
    for rule in (_sentences, _engines, _loading, _determinism, _planning, _hashes, _texts, _compression):
        rule(case, folder, verdict)
    return verdict


# Steps -----------------------------------------------------------------------------------------------------------


def _plan(folder: Path) -> Any:
    from featherweight.checkpoint.checkpoint import Checkpoint
    from featherweight.compress.plan import make_plan
    from featherweight.quantize.recipe import load_recipe

    with Checkpoint.open(folder) as checkpoint:
        return make_plan(checkpoint, load_recipe("rtn-8", ()), 1).summary()


def _verify(folder: Path) -> Any:
    from featherweight.checkpoint.verify import verify

    return verify(folder)


def _inspect(folder: Path) -> Any:
    from featherweight.compress.inspect import inspect_folder

    return json.dumps(inspect_folder(folder))


def _native(folder: Path) -> Tensor:
    from featherweight.engine.model import NativeModel

    model = NativeModel.open(folder, threads=1, precision="float")
    if len(TOKENS) > model.context:
        raise UnsupportedModelError("the context is shorter than the tokens")
    if max(TOKENS) >= model.network.vocabulary:
        return model.forward([token % model.network.vocabulary for token in TOKENS])
    return model.forward(TOKENS)


def _load(folder: Path, seed: int) -> tuple[Any, Any, Tensor | None]:
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
    halves = type(model).__name__.startswith(("Llama", "Mistral", "Qwen2For", "Qwen3For"))
    named = {"past_key_values": HalfCache(), "use_cache": True} if halves else {}
    given = model(tokens, **named)
    return (given.logits if "logits" in given else given.last_hidden_state)[0].float()


def _oracle(folder: Path) -> Outcome:
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
            tokenizer = attempt(lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
            listed["tokenizer"] = [] if tokenizer.ok else [f"{tokenizer.error}: {tokenizer.text}"]
    except Exception as error:
        return Outcome("failed", str(error)[:300], type(error).__name__)
    return Outcome("ok", value=(listed, logits.value))


def _too_large(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_too_large, value.values()))
    if isinstance(value, list):
        return any(map(_too_large, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGE


def _more(case: Case, folder: Path, verdict: Verdict, run: Callable[[str, Callable[[], Any]], Outcome]) -> None:
    """Further commands, each on a part of the cases."""
    chance = random.Random(case.number + 1)
    text = not case.kinds or any(kind.startswith(("text:", "config: special", "files:")) for kind in case.kinds)
    if text or chance.random() < 0.05:
        for engine, words in (("native", ""), ("transformers", " by transformers")):
            talker = run(f"open{words}", partial(_open, folder, engine))
            if talker.ok:
                run(f"generate{words}", partial(_generate, talker.value))
                run(f"chat{words}", partial(_chat, talker.value))
    if chance.random() < (0.4 if text else 0.05):
        run("evaluate", lambda: _evaluate(folder))
    if verdict.outcomes["plan"].ok and chance.random() < 0.1:
        run("compress", lambda: _compress(folder, folder.with_name(folder.name + ".out")))


def _open(folder: Path, engine: str) -> Any:
    from featherweight.cli.talkers import open_talker

    return open_talker(str(folder), engine, "float32", 1)


def _generate(talker: Any) -> tuple[list[int], str]:
    from featherweight.cli.talkers import Choices

    tokens = talker.encode(TEXT)
    return tokens, talker.write(tokens, Choices(6, 0.0, 0, 1.0, 0))


def _chat(talker: Any) -> str | None:
    return talker.prompt(list(MESSAGES)) if talker.has_template else None


def _evaluate(folder: Path) -> float:
    import featherweight

    text = folder.with_name("evaluation.txt")
    if not text.exists():
        text.write_text(TEXT * 4)
    return float(featherweight.evaluate(folder, text=text, limit=40, dtype="float32", threads=1).perplexity)


def _compress(folder: Path, out: Path) -> Tensor:
    import shutil

    import featherweight

    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    featherweight.compress(folder, "rtn-8", out, threads=1)
    model, _ = featherweight.load(out, dtype="float32", attn_implementation="eager")
    return logits_of(model)


# Rules -----------------------------------------------------------------------------------------------------------


def _sentences(case: Case, folder: Path, verdict: Verdict) -> None:
    """Every outcome is success or one sentence."""
    for step, outcome in verdict.outcomes.items():
        if step == "transformers":
            continue
        if outcome.status == "failed":
            verdict.fault("traceback", f"{step}: {outcome.error}: {outcome.text}")
        text = outcome.text.replace(str(folder), "FOLDER")
        if outcome.refused and (
            not text.strip() or "\n" in text or len(text) >= LONGEST or REPRESENTATION.search(text) or "\x1b" in text
        ):
            verdict.fault("sentence", f"{step}: {outcome.text}")
    verification = verdict.outcomes["verify"]
    for problem in verification.value.problems if verification.ok else ():
        if "\n" in problem or len(problem) > LONGEST or REPRESENTATION.search(problem):
            verdict.fault("sentence", f"verify: {problem}")


def _engines(case: Case, folder: Path, verdict: Verdict) -> None:
    """Two engines, one answer: both refuse, or the native one hands over, or the logits agree."""
    native, load = verdict.outcomes["native"], verdict.outcomes["load"]
    if "failed" in (native.status, load.status):
        return
    if native.refused and load.ok:  # numbers that are none may be refused by either, in its own words
        finite = load.value[2] is not None and bool(load.value[2].isfinite().all())
        if "not a number" in native.text:
            if finite:
                verdict.fault("overflow", native.text)
        elif load.value[2] is not None and not finite:
            verdict.notes.append(f"no numbers with transformers; native: {native.text}")
        elif native.error != "UnsupportedModelError" and not _about_generation(verdict, native.text):
            verdict.fault("native alone refuses", native.text)
    if native.ok and load.refused and "the tokenizer of" not in load.text:
        _alone(verdict, load.text)
    if native.ok and load.ok and load.value[2] is None:
        verdict.notes.append("the class of transformers cannot compute it, the native decoder does")
    elif native.ok and load.ok:
        away = difference(native.value, load.value[2])
        if not away < CLOSE:
            ill = _ill_conditioned(folder, load.value[2])
            if away < 20 * ill:
                verdict.notes.append(f"ill-conditioned: {away:.1e}, float64 against float32 {ill:.1e}")
            else:
                verdict.fault("engines differ", f"relative difference of logits {away:.3g} (float64: {ill:.1e})")


def _alone(verdict: Verdict, text: str) -> None:
    """The native decoder takes what the other engine refuses."""
    if THEIRS in text:
        verdict.notes.append(f"native alone loads: {text}")
    else:
        verdict.fault("native alone loads", text)


def _about_generation(verdict: Verdict, text: str) -> bool:
    """A file about generation that cannot be read: whoever generates is told so, with either engine."""
    theirs = verdict.outcomes.get("open by transformers")
    return "generation" in text and (theirs is None or theirs.refused)


def _loading(case: Case, folder: Path, verdict: Verdict) -> None:
    """What transformers loads rightly is loaded; what it fills with random numbers is refused."""
    load, oracle = verdict.outcomes["load"], verdict.outcomes["transformers"]
    if oracle.status == "failed" and load.ok:
        verdict.notes.append(f"transformers alone fails ({oracle.error}), load does not: {oracle.text}")
    if not oracle.ok:
        return
    listed, logits = oracle.value
    lacking = listed["missing_keys"] + listed["mismatched_keys"]
    if load.ok and lacking and not _complete_after_all(load.value[0], folder):
        verdict.fault("random weights", f"missing for transformers: {listed}")
    if load.ok or logits is None or lacking or listed.get("tokenizer") or wrong_dtypes(folder):
        return
    if "is quantised by" in load.text:  # transformers leaves out a quantiser that it does not know, with a warning
        verdict.notes.append(f"refuses what transformers loads: {load.text}")
        return
    if Files.of(folder).damaged() and not verdict.outcomes["native"].ok:
        return
    surplus = listed["unexpected_keys"]
    if not any(key in load.text for key in surplus):
        verdict.fault("refuses surplus" if surplus else "refuses what transformers loads", f"{load.text} {surplus[:3]}")


def _complete_after_all(model: Any, folder: Path) -> bool:
    """Whether every parameter's values are in the files, under whatever name (a prefix that was understood)."""
    stored = {tensor.name: tensor for tensor in Files.of(folder).tensors().values()}
    from mutations.tensors_kinds import value_of

    known = [value_of(tensor).float() for tensor in stored.values()]
    return all(
        any(value.shape == parameter.shape and torch.equal(value, parameter.float()) for value in known)
        for parameter in model.parameters()
    )


def wrong_dtypes(folder: Path) -> list[str]:
    """Tensors of a plain model that are no floating-point numbers."""
    try:
        if "quantization_config" in json.loads((folder / "config.json").read_bytes()):
            return []
        return [tensor.name for tensor in Files.of(folder).tensors().values() if tensor.dtype not in FLOATS]
    except (ValueError, TypeError, OSError):
        return []


def _determinism(case: Case, folder: Path, verdict: Verdict) -> None:
    """Loading twice gives the same logits (the second load is that of transformers alone where it reports nothing)."""
    load, oracle = verdict.outcomes["load"], verdict.outcomes["transformers"]
    if not load.ok:
        return
    logits = load.value[2]
    if logits is None:
        return
    second = oracle.value[1] if oracle.ok and not any(oracle.value[0].values()) else None
    if second is None or second.shape != logits.shape:
        again = attempt(lambda: _load(folder, case.number + 1))
        if not again.ok:
            verdict.fault("determinism", f"the second load: {again.text}")
            return
        second = again.value[2]
    if not torch.equal(logits.nan_to_num(), second.nan_to_num()):
        verdict.fault("determinism", f"relative difference {difference(logits, second):.3g} between two loads")


def _planning(case: Case, folder: Path, verdict: Verdict) -> None:
    """plan refuses what lacks tensors, as load does, and no more than that."""
    plan, load, oracle = (verdict.outcomes[step] for step in ("plan", "load", "transformers"))
    lacking = oracle.ok and oracle.value[0]["missing_keys"]
    if plan.ok and load.refused and (lacking or re.search(r"lacks|missing|has no tensor", load.text)):
        verdict.fault("plan is content", f"load: {load.text}")
    if plan.refused and load.ok and oracle.ok and not any(oracle.value[0].values()) and case.base.recipe is None:
        verdict.notes.append(f"plan refuses what load takes: {plan.text}")


def _hashes(case: Case, folder: Path, verdict: Verdict) -> None:
    """Bytes that are not those of their hash are found by verify, by load and by the decoder."""
    damaged = Files.of(folder).damaged()
    if not damaged:
        return
    verification = verdict.outcomes["verify"]
    if verification.ok and not verification.value.problems:
        verdict.fault("damage", f"verify does not see {damaged[0]}")
    for step in ("load", "native"):
        if verdict.outcomes[step].ok:
            verdict.fault("damage", f"{step} does not see {damaged[0]}")


def _texts(case: Case, folder: Path, verdict: Verdict) -> None:
    """A text has the same tokens for both engines, a conversation the same prompt, and the likeliest answer is one."""
    for step in ("open", "generate", "chat"):
        ours, theirs = (verdict.outcomes.get(name) for name in (step, f"{step} by transformers"))
        if ours is None or theirs is None:
            continue
        if ours.refused and theirs.ok and ours.error != "UnsupportedModelError" and "not a number" not in ours.text:
            verdict.fault("native alone refuses", f"{step}: {ours.text}")
        if ours.ok and theirs.refused:
            _alone(verdict, f"{step}: {theirs.text}")
        if step != "open" and ours.ok and theirs.ok and ours.value != theirs.value:
            if step == "generate" and ours.value[0] == theirs.value[0] and _undecided(verdict, ours.value[0]):
                verdict.notes.append("two tokens are equally likely")
                continue
            verdict.fault("texts differ", f"{step}: {ours.value!r} and {theirs.value!r}")


@torch.no_grad()
def _undecided(verdict: Verdict, tokens: list[int]) -> bool:
    """Whether two of the next tokens are so close that rounding may choose between them at one of some steps."""
    if not verdict.outcomes["load"].ok:
        return True
    model, sequence = verdict.outcomes["load"].value[0], list(tokens)
    for _ in range(6):
        logits = model(torch.tensor([sequence])).logits[0, -1]
        best = logits.topk(2).values
        if not best[0] - best[1] > 3e-3 * logits.std():
            return True
        sequence.append(int(logits.argmax()))
    return False


def _compression(case: Case, folder: Path, verdict: Verdict) -> None:
    """What was compressed is the model that was there."""
    made, load = verdict.outcomes.get("compress"), verdict.outcomes["load"]
    if made is None or not load.ok or load.value[2] is None:
        return
    if made.refused:
        verdict.notes.append(f"compress refuses what load takes: {made.text}")
    elif made.ok and load.value[2].isfinite().all():
        away = difference(made.value, load.value[2])
        if not away < 0.1:
            verdict.fault("compression differs", f"relative difference of logits {away:.3g}")


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative difference; infinite where shapes or the places of odd numbers differ."""
    if found.shape != expected.shape:
        return math.inf
    finite = expected.isfinite()
    if not finite.all():
        return 0.0 if not found.isfinite().all() else math.inf
    scale = float(expected.double().norm())
    away = float((found.double() - expected.double()).norm())
    return away / scale if scale > 0 else away


def _ill_conditioned(folder: Path, expected: Tensor) -> float:
    """How far logits in float64 are from those in float32."""
    import featherweight

    model, _ = featherweight.load(folder, dtype="float64", attn_implementation="eager")
    return difference(expected, logits_of(model))
