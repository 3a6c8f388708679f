"""The stored form of a compressed model, specified in docs/format.md: names, version, `quantization_config`.

A compressed model is an ordinary Hugging Face folder. `config.json` carries `quantization_config` with
`quant_method: featherweight`, the recipe, and for every compressed module the spec of its code; the safetensors files
hold `<module>.<tensor>` for each tensor of a code, and in their metadata the format version and a SHA-256 per tensor.
"""

from __future__ import annotations

import json
from typing import Any

from featherweight.errors import CheckpointError, shown
from featherweight.storage.codes import TensorLayout, UnknownCodeError, code_layout

METHOD = "featherweight"
FORMAT_VERSION = 1
VERSION_KEY = "featherweight.format_version"
HASHES_KEY = "featherweight.sha256"
NOTE = (
    "This model is compressed with featherweight. Without that package transformers does not know the stored tensors "
    "and reports missing `weight` keys. Install it (pip install featherweight) and `import featherweight` before "
    "calling from_pretrained."
)


def quantization_config(
    specs: dict[str, dict[str, Any]], recipe: dict[str, Any], biases: list[str] | None = None
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    `biases` names linear modules that are not compressed and were given a bias that the source lacks.
    `specs` maps module names to code specs (with `shape`). Modules with equal settings are listed together, so the
    entry stays small for models with thousands of experts.
    """
    alike: dict[str, dict[str, list[int]]] = {}
    for module, spec in specs.items():
        settings = json.dumps({k: v for k, v in spec.items() if k != "shape"}, sort_keys=True)
        alike.setdefault(settings, {})[module] = list(spec["shape"])
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "note": NOTE,
        "recipe": recipe,
        "codes": [{"code": json.loads(settings), "modules": modules} for settings, modules in alike.items()],
        **({"biases": biases} if biases else {}),
    }


def module_specs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> code spec (with `shape`) from a `quantization_config`; CheckpointError where it is not ours."""
    if config.get("quant_method") != METHOD:
        raise CheckpointError(
            f"quantization_config has quant_method {shown(config.get('quant_method'))}, expected {METHOD!r}: "
            "this folder was not written by featherweight"
        )
    version = config.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config has format_version {shown(version)}, this release reads 1 to {FORMAT_VERSION}: "
            "install a newer featherweight"
        )
    specs: dict[str, dict[str, Any]] = {}
    try:
        if not isinstance(config["codes"], list):
            raise TypeError("it is not a list")
        for entry in config["codes"]:
            for module, shape in entry["modules"].items():
                if not all(type(size) is int for size in shape):
                    raise TypeError(f"the shape of {shown(module)} is {shown(shape)}, expected whole numbers")
                specs[module] = {**entry["code"], "shape": list(shape)}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the field 'codes' of quantization_config is malformed ({error})") from None
    return specs


def module_layout(module: str, spec: dict[str, Any]) -> dict[str, TensorLayout]:
    """The stored tensors of a compressed module by name; CheckpointError naming the module if its spec is wrong,
    UnknownCodeError if a newer release is needed to read it."""
    try:
        return code_layout(spec)
    except UnknownCodeError as error:
        raise UnknownCodeError(f"config.json: the code of {module} cannot be read, {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"config.json: the code of {module} is malformed ({error}): restore config.json or compress the model again"
        ) from None
