"""What writes the answers: the native decoder, and transformers where that does not know the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from featherweight.errors import CalibrationError
from featherweight.events import Observer
from featherweight.integrations.sampling import sampling_arguments
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.sampling import Sampling
from featherweight.model.text.tokenizer import quiet
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.transformers_calls import asking_transformers

TOGETHER = 16
"""Conversations that the native decoder writes side by side; what it writes does not depend on it."""


class Writer(Protocol):
    """A model that answers. `together` is how many prompts it takes at a time."""

    together: int

    def write(self, prompts: Sequence[Sequence[int]], most: int, seeds: Sequence[int]) -> list[list[int]]:
        """At most `most` new tokens for each prompt, without the stop token; each has random numbers of its seed."""


class NativeWriter:
    """The native decoder."""

    together = TOGETHER

    def __init__(self, model: NativeModel, sampling: Sampling, stops: Sequence[int]) -> None:
        self.model, self.sampling, self.stops = model, sampling, stops

    def write(self, prompts: Sequence[Sequence[int]], most: int, seeds: Sequence[int]) -> list[list[int]]:
        samplings = [replace(self.sampling, seed=seed) for seed in seeds]
        return self.model.generate_batch(prompts, most, samplings, stops=self.stops)


class TransformersWriter:
    """Any causal model that transformers loads, one conversation at a time."""

    together = 1

    def __init__(self, model: Any, sampling: Sampling, stops: Sequence[int]) -> None:
        self.model, self.sampling, self.stops = model, sampling, stops

    def write(self, prompts: Sequence[Sequence[int]], most: int, seeds: Sequence[int]) -> list[list[int]]:
        return [self._write(prompt, most, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _write(self, tokens: Sequence[int], most: int, seed: int) -> list[int]:
        torch.manual_seed(seed % 2**63)
        prompt = torch.tensor([list(tokens)], device=self.model.device)
        chosen = sampling_arguments(self.sampling)
        if self.stops:
            chosen |= {"eos_token_id": list(self.stops), "pad_token_id": self.stops[0]}
        with asking_transformers("generate with this model", error=CalibrationError), quiet(), torch.inference_mode():
            made = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, **chosen)
        answer: list[int] = made[0, len(tokens) :].tolist()
        end = next((place for place, token in enumerate(answer) if token in self.stops), len(answer))
        return answer[:end]


def open_writer(
    checkpoint: Checkpoint, sampling: Sampling, stops: Sequence[int], device: torch.device, notify: Observer
) -> Writer:
    """The native decoder on the CPU, if it computes this model; else transformers on `device`.

    Raises CalibrationError for a model that writes no text, CheckpointError for one that cannot be loaded.
    """
    model = checkpoint.folder if len(checkpoint.files) != 1 else checkpoint.files[0].path
    if device.type == "cpu":
        try:
            return NativeWriter(NativeModel.open(model), sampling, stops)
        except UnsupportedModelError as reason:
            notify({"event": "note", "text": f"{reason}; transformers writes the conversations instead"})
    from featherweight.integrations.load import load

    loaded, _ = load(model, trust_remote_code=checkpoint.trust_remote_code)
    if not loaded.can_generate() or getattr(loaded.config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"{checkpoint.folder} is not a model that writes conversations (it is a {type(loaded).__name__}): "
            "calibrate with other text than self"
        )
    return TransformersWriter(loaded.to(device), sampling, stops)
