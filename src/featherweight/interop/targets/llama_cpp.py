"""llama.cpp: whether it runs a model once it is a GGUF, which values it holds, and what rounding costs."""

from __future__ import annotations

from typing import ClassVar

from featherweight.errors import FeatherError
from featherweight.interop.engines import Answer, Target
from featherweight.interop.exporters.gguf import Gguf
from featherweight.interop.exports import Verdict
from featherweight.interop.stored import StoredModel
from featherweight.registry import register
from featherweight.system.units import size_text

NEWER = {"Q1_0": "of 2026", "Q2_0": "of 2026", "TQ1_0": "of September 2024", "TQ2_0": "of September 2024"}
"""Types that programs made before do not know."""


@register("target", "llama.cpp")
class LlamaCpp(Target):
    """Says what `Gguf().verdicts()` says, in sentences."""

    title: ClassVar[str] = "llama.cpp"

    @classmethod
    def ask(cls, model: StoredModel, tensor_parallel: int = 1) -> Answer:
        try:
            verdicts = Gguf().verdicts(model)
        except FeatherError as error:
            return Answer(False, "there is no GGUF of it", (str(error),))
        lost = [verdict for verdict in verdicts if verdict.fate == "impossible"]
        if lost:
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            return Answer(False, "there is no GGUF of it", (f"{lost[0].tensor}{more}: {lost[0].why}",))
        reasons = [_size(model, verdicts), *_kinds(model, verdicts), *_newer(verdicts)]
        if tensor_parallel > 1:
            reasons += _shared(model, verdicts, tensor_parallel)
        return Answer(True, f"feather export {model.folder} --to gguf --out FILE", tuple(reasons))


def _size(model: StoredModel, verdicts: tuple[Verdict, ...]) -> str:
    nbytes = sum(verdict.bits * model.tensors[verdict.tensor].elements / 8 for verdict in verdicts)
    return f"the file takes {size_text(nbytes)}, tokenizer and metadata not counted"


def _kinds(model: StoredModel, verdicts: tuple[Verdict, ...]) -> list[str]:
    """What matrices become, a sentence for each type and fate."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for verdict in verdicts:
        if len(model.tensors[verdict.tensor].shape) == 2:
            kinds.setdefault((verdict.becomes, verdict.fate, verdict.why), []).append(verdict.tensor)
    sentences = []
    for (becomes, fate, why), names in kinds.items():
        count = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
        what = "with the very same values" if fate == "exact" else f"with other values: {why}"
        sentences.append(f"{becomes}, {what}: {count}")
    return sentences


def _newer(verdicts: tuple[Verdict, ...]) -> list[str]:
    found = {verdict.becomes for verdict in verdicts} & NEWER.keys()
    return [f"{name} is known to llama.cpp {NEWER[name]} and later" for name in sorted(found)]


def _shared(model: StoredModel, verdicts: tuple[Verdict, ...], processes: int) -> list[str]:
    """llama.cpp splits rows among devices, which suits every type as long as there are as many rows."""
    few = [name for name, tensor in model.tensors.items() if len(tensor.shape) == 2 and tensor.shape[0] < processes]
    if few:
        return [f"{few[0]} has fewer rows than the {processes} devices among which `--split-mode row` shares them"]
    return [f"rows are shared among {processes} devices by `--split-mode row`, whole blocks whatever the type"]
