"""What a model must be for its perplexity to mean something, and for two to be compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import EvaluationError
from featherweight.model.text.tokenizer import Tokenizer
from featherweight.system.transformers_calls import one_line
from featherweight.tasks.evaluate.perplexity import LogitsReader

# Where configurations keep the number of positions; the first is the common name, the others are families' own.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def tokenizer_sha256(tokenizer: Any) -> str:
    """What a tokenizer does, as a hash: of its whole definition if it is a fast one, else of class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        # Settings of the last call, which do not change what a text becomes here.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    else:
        definition = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def own_context(model: Any) -> int | None:
    """Positions the model was made for, by its configuration; None where that does not say."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    config = nested() if nested is not None else config
    for name in CONTEXT_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value == int(value) > 0:
            return int(value)
    return None


def check_causal(model: Any) -> None:
    """EvaluationError unless a token's logits depend only on the tokens before it, tried on two tokens."""
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise EvaluationError(f"{kind} is an encoder-decoder, for which perplexity of a plain text is not defined")
    device = LogitsReader(model).device
    try:
        with torch.inference_mode():
            pairs = [model(input_ids=torch.tensor([ids], device=device), use_cache=False) for ids in ([0, 1], [0, 2])]
    except (TypeError, ValueError) as error:  # encoders do not know `use_cache`, models of images no `input_ids`
        raise EvaluationError(f"{kind} is not a causal language model, so it has no next-token perplexity") from error
    except Exception as error:
        raise EvaluationError(f"{kind} cannot be run on two tokens: {one_line(error)}") from error
    outputs = [logits for pair in pairs if isinstance(logits := getattr(pair, "logits", None), Tensor)]
    if len(outputs) < 2 or any(logits.shape[:2] != (1, 2) for logits in outputs):
        raise EvaluationError(f"{kind} gives no logits for every token, so it has no next-token perplexity")
    first, second = (logits[0, 0].cpu().double() for logits in outputs)
    # Exact on most backends; kernels that choose their tiling by the data may differ in the last bits.
    tolerance = max(1e-4, 8 * torch.finfo(outputs[0].dtype).eps) * float(first.abs().max())
    if float((first - second).abs().max()) > tolerance:
        raise EvaluationError(
            f"{kind} sees the tokens that follow (an encoder such as BERT), so it has no next-token perplexity"
        )


def check_same_tokenizer(one: Any, other: Any, text: str) -> None:
    """EvaluationError unless tokens mean the same to both models: by definition, or by vocabulary and on this text."""
    if tokenizer_sha256(one) == tokenizer_sha256(other):
        return
    first, second = Tokenizer.of(one), Tokenizer.of(other)
    if one.get_vocab() != other.get_vocab() or first.encode(text) != second.encode(text):
        raise EvaluationError(
            "the two models have different tokenizers, so their predictions are about different tokens and cannot be "
            "compared: measure each by itself"
        )
