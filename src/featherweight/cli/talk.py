"""`generate` and `chat`: text from a model, token by token."""

from __future__ import annotations

import math
import sys
from typing import Any

from featherweight.cli.commands import quiet_transformers
from featherweight.errors import CheckpointError, FeatherError

CACHE_SHARE = (
    0.25  # decoded matrices may take this share of the free memory; they make every token after the first fast
)


class Talker:
    """A loaded model that continues token lists, writing text as it comes."""

    def __init__(self, folder: str, dtype: str, threads: int | None) -> None:
        import torch

        from featherweight.api import load
        from featherweight.kernels.library import thread_count

        quiet_transformers()
        torch.set_num_threads(thread_count(threads))
        chosen = ("auto" if torch.cuda.is_available() else "float32") if dtype == "auto" else dtype
        self.model, self.tokenizer = load(
            folder, dtype=chosen, device_map="auto" if torch.cuda.is_available() else None
        )
        if self.tokenizer is None:
            raise CheckpointError(
                f"{folder} has no tokenizer; put the original model's tokenizer files beside the weights"
            )
        if not self.model.can_generate():
            raise FeatherError(f"{folder} is not a model that writes text (it is a {type(self.model).__name__})")
        self._cache_if_small()

    def _cache_if_small(self) -> None:
        from featherweight.integrations.modules import CodedModule, set_cache
        from featherweight.memory import available_bytes

        coded = [module for module in self.model.modules() if isinstance(module, CodedModule)]
        decoded = sum(module.compute_dtype.itemsize * math.prod(module.spec["shape"]) for module in coded)
        set_cache(self.model, decoded < CACHE_SHARE * available_bytes())

    def write(self, tokens: Any, max_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> str:
        """Continue `tokens` [1, n], print the text as it is made, return it."""
        import torch
        from transformers import TextStreamer

        torch.manual_seed(seed)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        padding = self.tokenizer.pad_token_id
        with torch.inference_mode():
            made = self.model.generate(
                tokens.to(self.model.device),
                attention_mask=torch.ones_like(tokens, device=self.model.device),
                max_new_tokens=max_tokens,
                streamer=streamer,
                pad_token_id=self.tokenizer.eos_token_id if padding is None else padding,
                **sampling,
            )
        return str(self.tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))


def run_generate(
    folder: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    dtype: str,
    threads: int | None,
) -> None:
    talker = Talker(folder, dtype, threads)
    tokens = talker.tokenizer(prompt, return_tensors="pt").input_ids
    if tokens.shape[1] == 0:
        raise FeatherError("the prompt is empty; give some text to continue with --prompt")
    print(prompt, end="", flush=True)
    talker.write(tokens, max_tokens, temperature, top_k, top_p, seed)


def run_chat(
    folder: str,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    dtype: str,
    threads: int | None,
) -> None:
    talker = Talker(folder, dtype, threads)
    template = talker.tokenizer.chat_template is not None
    if not template:
        print("this model has no chat template: it simply continues the conversation's text", file=sys.stderr)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    turn = 0
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        messages.append({"role": "user", "content": said})
        if template:
            text = talker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        tokens = talker.tokenizer(text, return_tensors="pt", add_special_tokens=not template).input_ids
        print("model: ", end="", flush=True)
        answer = talker.write(tokens, max_tokens, temperature, top_k, top_p, seed + turn)
        messages.append({"role": "assistant", "content": answer.strip()})
        turn += 1
