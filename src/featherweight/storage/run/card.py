"""The model card of a compressed folder: what it is and how to load it, also for people without this package."""

from __future__ import annotations

import re
from typing import Any

from featherweight.storage.checkpoint.accounting import architecture_of

Before = tuple[str, tuple[float, str] | None]
"""What the source was if it was compressed before, else empty; and the most that is lost since then, with the layer."""


def model_card(manifest: dict[str, Any], config: dict[str, Any], before: Before = ("", None)) -> str:
    """README.md of an output folder."""
    recipe = manifest["recipe"]
    tensors = manifest["tensors"]
    fates = f"{tensors['replaced']} replaced, {tensors['copied']} copied, {len(tensors['dropped'])} dropped"
    worst = max(manifest["layers"], key=lambda record: record["relative_error"])
    architecture = architecture_of(config) or "AutoModelForCausalLM"
    source = config.get("_name_or_path") or "an original checkpoint"
    paper = f" ({recipe['paper']})" if recipe.get("paper") else ""
    return f"""---
{_front_matter(config, "quantized")}---

# Compressed with featherweight

{architecture} from {source}, recipe `{recipe["name"]}`{paper}.

| | |
|---|---|
| bits per weight, compressed layers | {manifest["bits_per_weight"]:.3f} |
| bits per weight, all linear layers | {manifest["bits_per_weight_linear"]:.3f} |
{_outside(manifest)}| bits per weight, whole model | {manifest["bits_per_weight_model"]:.3f} |
| parameters | {manifest["parameters"]:,} |
| bytes of tensors | {manifest["bytes"]:,} |
| source tensors | {tensors["source"]}: {fates} |
| largest relative error of a layer | {worst["relative_error"]:.4f} (`{worst["name"]}`) |
| made with | featherweight {manifest["featherweight"]} |
{_healed(manifest)}{_before(*before)}
Relative errors say little about text. `feather eval . --against ORIGINAL` measures perplexity, divergence from the
original and agreement, each with its protocol; what was measured is kept in featherweight-run.json, the recipe with all
its settings in featherweight.json.

## Loading it

With transformers the package must be imported before the model is loaded; it teaches transformers the format.

```python
import featherweight  # pip install featherweight
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

Without the import, transformers reports an unknown quantization type `featherweight`, or missing `weight` tensors and
unexpected ones called `trits`, `codes` and `scales`. Nothing is wrong with the files then: install the package and
import it.

| program | how |
|---|---|
| featherweight, its own decoder for CPUs | `feather chat .`, `feather generate . --prompt "..."` |
| PEFT | as any transformers model, after the import |
| vLLM, on CPUs | `vllm serve .` where this package is installed beside it, which brings a plug-in |
| llama.cpp | `feather export . --to gguf --out model.gguf`; what is exact: `feather check . --target llama.cpp` |
| others | `feather export . --to compressed-tensors`, `gptq`, `awq`, or `dense` for plain values |
"""


def _front_matter(config: dict[str, Any], *tags: str) -> str:
    """What the hub reads: library, tags, what the model is for and was made from where config.json says so."""
    lines = ["library_name: transformers", f"tags: [{', '.join(('featherweight', *tags))}]"]
    if architecture_of(config).endswith("ForCausalLM"):
        lines.append("pipeline_tag: text-generation")
    source = str(config.get("_name_or_path") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        lines += [f"base_model: {source}", "base_model_relation: quantized"]
    return "".join(f"{line}\n" for line in lines)


def plain_card(manifest: dict[str, Any], config: dict[str, Any], fates: str, before: Before = ("", None)) -> str:
    """README.md of an output that is a checkpoint like any other.

    Parameters
    ----------
    manifest, config : dict[str, Any]
        featherweight.json and config.json of the output.
    fates : str
        How many tensors of the source were changed, copied, ...
    before : Before
    """
    recipe, tensors = manifest["recipe"], manifest["tensors"]
    architecture = architecture_of(config) or "AutoModelForCausalLM"
    source = config.get("_name_or_path") or "an original checkpoint"
    paper = f" ({recipe['paper']})" if recipe.get("paper") else ""
    return f"""---
{_front_matter(config)}---

# Made with featherweight

{architecture} from {source}, recipe `{recipe["name"]}`{paper}. Nothing in it is coded: every program that reads the
original reads this. featherweight.json says what was done.

| | |
|---|---|
{_outside(manifest)}| bits per weight, whole model | {manifest["bits_per_weight_model"]:.3f} |
| parameters | {manifest["parameters"]:,} |
| bytes of tensors | {manifest["bytes"]:,} |
| source tensors | {tensors["source"]}: {fates} |
{_before(*before)}"""


def _before(text: str, most: tuple[float, str] | None) -> str:
    """The rows about a source that was compressed before."""
    rows = f"| the source | {text}; errors are against it as it decodes |\n" if text else ""
    if most is not None:
        rows += f"| against what that was made from, at most | {most[0]:.4f} (`{most[1]}`) |\n"
    return rows


def _healed(manifest: dict[str, Any]) -> str:
    """The row about trainings against the original, where there were such."""
    found = manifest.get("healed") or ()
    steps = sum(one["steps"] for one in found)
    return f"| healed | {steps} steps against the original |\n" if found else ""


def _outside(manifest: dict[str, Any]) -> str:
    """The row about embedding and output layer, where they are compressed."""
    bits = manifest.get("bits_per_weight_outside")
    return "" if bits is None else f"| bits per weight, embedding and output layer | {bits:.3f} |\n"
