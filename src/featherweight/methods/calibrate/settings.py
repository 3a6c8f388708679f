"""Settings of a calibration: how much text, in which order layers are seen, how tokens are weighted."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from featherweight.errors import CalibrationError
from featherweight.events import Observer
from featherweight.model.text.mixture import Mixture
from featherweight.system.precision import Precision, choose_precision


class ConversationSettings(BaseModel):
    """How a model writes conversations for the text `self`. Of the sampling, None is what the model's folder says, or
    else what `feather chat` takes: temperature 0.8 among the 50 likeliest tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    turns: int = Field(2, ge=1, le=16, description="questions of a conversation, each with the model's answer")
    max_tokens: int = Field(512, ge=1, description="tokens of an answer at most")
    temperature: float | None = Field(None, ge=0, description="logits are divided by it; 0 takes the likeliest token")
    top_k: int | None = Field(None, ge=0, description="sample among the k likeliest tokens, 0: all")
    top_p: float | None = Field(None, ge=0, le=1, description="sample among the likeliest tokens of this probability")
    seed: int = Field(0, ge=0, description="seed of the choice of prompts and of the sampling")
    file: str | None = Field(None, description="where they are kept; else beside the output, OUT.conversations.jsonl")


class CalibrationSettings(BaseModel):
    """The `calibration` field of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    text: tuple[dict[str, float], ...] | None = Field(
        None,
        description="sources with their shares of the windows, like [{self: 0.1}, {corpus.txt: 0.9}]; else shipped",
    )
    conversations: ConversationSettings = Field(
        ConversationSettings(), description="how the model writes the conversations of the text `self`"
    )
    sequences: int = Field(128, ge=1, description="number of windows of text")
    length: int = Field(512, ge=2, description="tokens a window; cut to the model's context")
    seed: int = Field(0, ge=0, description="seed of the choice of windows")
    sequential: bool = Field(
        True, description="inside a block treat one set of layers after the other and gather again in between"
    )
    stream: Literal["quantized", "original"] = Field(
        "quantized",
        description="whose activations are measured: those of the compressed model so far, or the original's",
    )
    held_out: float = Field(
        0.125, ge=0, lt=1, description="share of the windows that only judge what was made with the others; 0 for none"
    )
    token_weights: Literal["none", "attention", "first", "frequency"] = Field(
        "none",
        description="importance of tokens: attention they receive (RSQ), only the first eighth of a window, or rarity",
    )
    guidance: int = Field(
        0,
        ge=0,
        le=64,
        description="runs of a layer's output rows whose statistics weigh tokens by the loss's gradients at them "
        "(GuidedQuant); 1 is nearly as good as more; 0: tokens count alike",
    )
    minimum_weight: float = Field(0.005, ge=0, le=1, description="least token weight before normalisation, of 1")
    exponent: float = Field(1.0, ge=0, description="power to which token weights are raised before normalisation")
    expansion: int = Field(1, ge=1, description="cyclic rolls of every window (RSQ's dataset expansion); 1 for none")
    starved_tokens: float = Field(
        0.5, ge=0, description="a layer that saw fewer tokens than this share of its inputs is starved"
    )
    starved_floor: int = Field(32, ge=1, description="a layer that saw fewer tokens than this is starved in any case")
    batch_tokens: int = Field(4096, ge=1, description="tokens a forward pass; at least one window")
    dtype: Precision = Field(
        "auto",
        description="of weights and activations in forward passes; auto: the faster here; statistics are float32",
    )

    @field_validator("text", mode="before")
    @classmethod
    def _mixture(cls, value: Any) -> Any:
        try:
            return None if value is None else Mixture.of(value).dump()
        except CalibrationError as error:
            raise ValueError(str(error)) from None

    def torch_dtype(self, notify: Observer | None = None, device: torch.device | str = "cpu") -> torch.dtype:
        """What the network runs in on a device of this machine; `notify` is told where that was chosen here."""
        return torch.float32 if choose_precision(self.dtype, notify, device) == "float32" else torch.bfloat16

    def guidance_bytes(self, layers: int) -> int:
        """What the gradients' weights of so many layers take, float32, in memory and on disk."""
        return 4 * self.guidance * self.sequences * self.length * self.expansion * layers

    def least_tokens(self, in_features: int) -> int:
        """Tokens a layer must have seen for its statistics to be used."""
        return max(self.starved_floor, int(self.starved_tokens * in_features))

    def held_out_of(self, sequences: int) -> int:
        """How many of `sequences` are kept apart; at least one is, and at least one is left."""
        if self.held_out == 0 or sequences < 2:
            raise CalibrationError(
                f"held-out statistics are wanted, but {sequences} window{'s' * (sequences != 1)} with "
                f"calibration.held_out {self.held_out} leave none; give more windows or a larger share, or set it to 0 "
                "in a recipe to do without comparing codes on them"
            )
        return min(sequences - 1, max(1, round(sequences * self.held_out)))
