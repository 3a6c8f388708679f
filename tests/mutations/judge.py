"""Whether what the package makes of a mutant is right: one function a rule."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FeatherError
from featherweight.storage.checkpoint.format import METHOD, module_specs
from mutations import steps
from mutations.files import Files
from mutations.kinds import Case
from mutations.steps import Outcome, Told, Verdict, attempt, logits_of
from mutations.tensors_kinds import value_of

CLOSE = 2e-2
"""Largest relative difference of logits; unmutated bases stay below 1e-3 (half-precision caches on both sides)."""
LONGEST = 500
REPRESENTATION = re.compile(r"Traceback|object at 0x|<class '|<built-in|torch\.Size|Error\(")
THEIRS = "transformers cannot"
"""Begins what transformers refuses: the native decoder may take it if what is odd does not touch the computation."""
HALF, LARGEST_HALF = 6e4, 65504
HARMLESS = {
    "tensor: names behind a wrapper's prefix",
    "tensor: names without their prefix",
    "tensor: order and spaces",
    "tensor: metadata of a file",
    "index: changed",
    "index: shards in one file, or the other way round",
    "files: a stray one",
    "files: one has another name",
}
FLOATS = ("F64", "F32", "F16", "BF16")


def judge(case: Case, folder: Path, told: Told = lambda step: None, original: Files | None = None) -> Verdict:
    """Run everything on `folder` and apply the rules. `told` hears each step's name before it begins.

    `original` are the files before the mutations: where these change no value, the model has to be the same.
    """
    verdict = Verdict()
    native_first = case.number % 2 == 0  # neither may lean on what the other did

    def run(step: str, function: Callable[[], Any]) -> Outcome:
        told(step)
        verdict.outcomes[step] = attempt(function)
        return verdict.outcomes[step]

    run("plan", lambda: steps.plan(folder))
    run("verify", lambda: steps.verify(folder))
    run("inspect", lambda: steps.inspect(folder))
    if native_first:
        run("native", lambda: steps.decode(folder))
    run("load", lambda: steps.load(folder, case.number))
    if not native_first:
        run("native", lambda: steps.decode(folder))
    told("transformers")
    verdict.outcomes["transformers"] = steps.oracle(folder)
    verdict.original = original if set(case.kinds) <= HARMLESS else None
    _more(case, folder, verdict, run)
    told("judging")
    for rule in (_sentences, _engines, _loading, _determinism, _planning, _hashes, _texts, _compression):
        rule(case, folder, verdict)
    load = verdict.outcomes["load"]
    if verdict.original is not None and load.ok and load.value[2] is not None:
        away = _from_original(load.value[2], folder, verdict.original)
        if not away < 1e-6:
            verdict.fault("another model", f"relative difference of logits {away:.3g} from the unmutated one")
    return verdict


def _from_original(logits: Tensor, folder: Path, original: Files) -> float:
    """How far logits are from the unmutated model's, where names, places and files beside it changed, and no value."""
    plain = folder.with_name(f"{folder.name}.plain")
    original.write(plain)
    return difference(logits, steps.load(plain, 0)[2])


def _more(case: Case, folder: Path, verdict: Verdict, run: Callable[[str, Callable[[], Any]], Outcome]) -> None:
    """Further commands, each on a part of the cases."""
    chance = random.Random(case.number + 1)
    text = not case.kinds or any(kind.startswith(("text:", "config: special", "files:")) for kind in case.kinds)
    if text or chance.random() < 0.05:
        for engine, words in (("native", ""), ("transformers", " by transformers")):
            backend = run(f"open{words}", partial(steps.open_engine, folder, engine))
            if backend.ok:
                run(f"generate{words}", partial(steps.generate, backend.value))
                run(f"chat{words}", partial(steps.chat, backend.value))
    if chance.random() < (0.4 if text else 0.05):
        run("evaluate", lambda: steps.evaluate(folder))
    if verdict.outcomes["plan"].ok and chance.random() < 0.1:
        calibrated = chance.random() < 0.2
        run("compress", lambda: steps.compress(folder, folder.with_name(f"{folder.name}.out"), calibrated))


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
        if f"beyond {LARGEST_HALF}" in native.text:
            if finite and steps.largest_key(load.value[0], list(steps.TOKENS)) < LARGEST_HALF:
                verdict.fault("overflow", native.text)
        elif "not a number" in native.text:
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
            if _huge(folder) or steps.largest_key(load.value[0], list(steps.TOKENS)) > HALF:
                verdict.notes.append("values beyond half precision in the cache, or whose squares are beyond float32")
            elif away < 20 * ill:
                verdict.notes.append(f"ill-conditioned: {away:.1e}, float64 against float32 {ill:.1e}")
            else:
                verdict.fault("engines differ", f"relative difference of logits {away:.3g} (float64: {ill:.1e})")


def _huge(folder: Path) -> bool:
    """Whether a weight is so large that a norm's squares are infinite; the native decoder's sums are in float64."""
    floats = [tensor for tensor in Files.of(folder).tensors().values() if tensor.dtype in FLOATS]
    return any(bool((value_of(tensor).abs().double() > 1e15).any()) for tensor in floats)


def _alone(verdict: Verdict, text: str) -> None:
    """The native decoder takes what the other engine refuses."""
    if THEIRS in text:
        verdict.notes.append(f"native alone loads: {text}")
    else:
        verdict.fault("native alone loads", text)


def _about_generation(verdict: Verdict, text: str) -> bool:
    """Settings of generation that cannot be read: whoever generates is told so, with either engine."""
    theirs = verdict.outcomes.get("open by transformers")
    if theirs is not None and theirs.refused and theirs.text == text:
        return True
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
    if verdict.original is not None and not _from_original(logits, folder, verdict.original) < CLOSE:
        verdict.notes.append(f"transformers loads another model: {load.text}")  # experts in another order
        return
    surplus = listed["unexpected_keys"]
    if not any(key in load.text for key in surplus):
        verdict.fault("refuses surplus" if surplus else "refuses what transformers loads", f"{load.text} {surplus[:3]}")


def _complete_after_all(model: Any, folder: Path) -> bool:
    """Whether every parameter's values are in the files, under whatever name (a prefix that was understood)."""
    stored = {tensor.name: tensor for tensor in Files.of(folder).tensors().values()}
    known = [value_of(tensor).float() for tensor in stored.values()]

    def found(part: Tensor) -> bool:
        return any(value.shape == part.shape and torch.equal(value, part) for value in known)

    def whole(parameter: Tensor) -> bool:
        if found(parameter):
            return True
        pieces = parameter if parameter.dim() == 3 else ()  # experts, each of one matrix or of two above each other
        return len(pieces) > 0 and all(found(one) or all(map(found, one.chunk(2))) for one in pieces)

    return all(whole(parameter.float()) for parameter in model.parameters())


def wrong_dtypes(folder: Path) -> list[str]:
    """Tensors that are no floating-point numbers, and no codes of ours either."""
    try:
        found = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
        coded = tuple(f"{module}." for module in module_specs(found)) if found is not None else ()
    except (ValueError, TypeError, AttributeError, OSError, FeatherError):
        return []
    tensors = Files.of(folder).tensors().values()
    return [tensor.name for tensor in tensors if tensor.dtype not in FLOATS and not tensor.name.startswith(coded)]


def _determinism(case: Case, folder: Path, verdict: Verdict) -> None:
    """Loading twice gives the same logits (the second load is that of transformers alone where it reports nothing)."""
    load, oracle = verdict.outcomes["load"], verdict.outcomes["transformers"]
    if not load.ok:
        return
    logits = load.value[2]
    if logits is None:
        return
    alike = oracle.ok and not any(oracle.value[0].values()) and not _foreign(folder)
    second = oracle.value[1] if alike else None
    if second is None or second.shape != logits.shape:
        again = attempt(lambda: steps.load(folder, case.number + 1))
        if not again.ok:
            verdict.fault("determinism", f"the second load: {again.text}")
            return
        second = again.value[2]
    if not torch.equal(logits.nan_to_num(), second.nan_to_num()):
        verdict.fault("determinism", f"relative difference {difference(logits, second):.3g} between two loads")


def _foreign(folder: Path) -> bool:
    """Whether another tool's layers are in it, which we leave in the type they compute in."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        found = config.get("quantization_config") or config.get("compression_config")
    except (ValueError, AttributeError, OSError):
        return False
    return isinstance(found, dict) and found.get("quant_method") != METHOD


def _planning(case: Case, folder: Path, verdict: Verdict) -> None:
    """plan and verify refuse what lacks tensors, as load does, and plan refuses no more than that."""
    plan, load, oracle = (verdict.outcomes[step] for step in ("plan", "load", "transformers"))
    lacking = oracle.ok and oracle.value[0]["missing_keys"]
    lacks = load.refused and (lacking or re.search(r"\blacks?\b|missing|has no tensor", load.text))
    lacks = lacks and "the tokenizer of" not in load.text and "is quantised by" not in load.text
    if plan.ok and lacks:
        verdict.fault("plan is content", f"load: {load.text}")
    verification = verdict.outcomes["verify"]
    if verification.ok and not verification.value.problems and lacks:
        verdict.fault("verify is content", f"load: {load.text}")
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
        if ours is None or theirs is None or not _computes(verdict):
            continue
        bounded = "not a number" in ours.text
        if theirs.ok and step == "generate" and f"beyond {LARGEST_HALF}" in ours.text:
            bounded = _beyond(verdict, theirs.value[0])
        if ours.refused and theirs.ok and ours.error != "UnsupportedModelError" and not bounded:
            verdict.fault("native alone refuses", f"{step}: {ours.text}")
        if ours.ok and theirs.refused:
            _alone(verdict, f"{step}: {theirs.text}")
        if step != "open" and ours.ok and theirs.ok and ours.value != theirs.value:
            if step == "generate" and ours.value[0] == theirs.value[0] and _undecided(verdict, ours.value[0]):
                verdict.notes.append("two tokens are equally likely, or a key is beyond half precision")
                continue
            verdict.fault("texts differ", f"{step}: {ours.value!r} and {theirs.value!r}")


def _computes(verdict: Verdict) -> bool:
    """Whether the model gives numbers at all, if it loads."""
    load = verdict.outcomes["load"]
    return not load.ok or (load.value[2] is not None and bool(load.value[2].isfinite().all()))


@torch.no_grad()
def _beyond(verdict: Verdict, tokens: list[int]) -> bool:
    """Whether half precision has no place for a key or value of these tokens, or of those that follow them."""
    model, sequence = verdict.outcomes["load"].value[0], list(tokens)
    for _ in range(6):
        sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return not steps.largest_key(model, sequence) < LARGEST_HALF


@torch.no_grad()
def _undecided(verdict: Verdict, tokens: list[int]) -> bool:
    """Whether two of the next tokens are so close that rounding may choose between them at one of some steps.

    Also where a key is beyond half precision: the decoder's cache then holds the largest number there is.
    """
    if not verdict.outcomes["load"].ok:
        return True
    model, sequence = verdict.outcomes["load"].value[0], list(tokens)
    if steps.largest_key(model, sequence) > HALF:
        return True
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
        away = math.inf if made.value is None else difference(made.value, load.value[2])
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
    exact = attempt(lambda: logits_of(model))
    return difference(expected, exact.value) if exact.ok else 0.0
