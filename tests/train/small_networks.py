"""Small networks of transformers that are no language models, and what is fed to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, ViTConfig, ViTForImageClassification

PATCHES = 17
"""Positions of the small vision transformer: sixteen patches and the class token."""


def small_vit(seed: int = 0, layers: int = 2, **settings: Any) -> Any:
    """For images [B, 1, 8, 8] of ten classes, in patches of 2 x 2."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **settings,
    )
    return ViTForImageClassification(config)


def small_bart(seed: int = 0) -> Any:
    """An encoder and a decoder of two layers each, for 48 tokens."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=48,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def images(count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(count, 1, 8, 8, generator=generator),
        "labels": torch.randint(0, 10, (count,), generator=generator),
    }


def sentences(count: int = 4, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """The last sentence is two tokens shorter than the others."""
    ids = torch.randint(4, 48, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    ids = ids.masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
