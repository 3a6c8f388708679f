#!/usr/bin/env python
"""Train the bundled reference model: a small Llama-architecture causal LM with its own byte-level BPE tokenizer.

    python scripts/train_reference.py --train novels-train.txt.xz --valid novels-valid.txt.xz --out reference

Text files are plain or xz-compressed. The schedule is warm-up, constant, linear decay, laid out over whichever of
`--epochs` and `--minutes` ends first, so the same script makes the model on a GPU in ten minutes or on two CPU cores
overnight. Every `--save-minutes` the state goes to OUT/state.pt (written aside, then renamed); the same command goes
on from there. The result is a standard Hugging Face folder: bf16 safetensors, tokenizer, config, README.md with the
validation perplexity and its protocol.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, decoding is exact."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Token ids [n] uint16 of the whole text, encoded in pieces that end at line ends (so pieces do not change ids)."""
    lines, pieces, size = text.splitlines(keepends=True), [], 0
    piece: list[str] = []
    for line in lines:
        piece.append(line)
        size += len(line)
        if size > 1 << 18:
            pieces.append("".join(piece))
            piece, size = [], 0
    pieces.append("".join(piece))
    encodings = tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
    return np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in encodings])


class Feed:
    """Shuffled windows of the training tokens; an epoch sees every token once, whatever the window length.

    Tokens are cut into long windows in an order that is shuffled anew each epoch; a step takes the next ones and cuts
    them to the current context, so changing the context keeps the place in the epoch.
    """

    def __init__(self, tokens: np.ndarray, longest: int, batch: int, seed: int) -> None:
        self.tokens, self.longest, self.seed = tokens, longest, seed
        self.rows = batch // longest
        self.steps = (len(tokens) - longest) // longest // self.rows  # steps an epoch

    def batch(self, step: int, context: int) -> torch.Tensor:
        """Windows int64 [batch / context, context] of step `step`."""
        epoch, place = divmod(step, self.steps)
        generator = np.random.default_rng((self.seed, epoch))
        offset = int(generator.integers(self.longest))
        order = generator.permutation((len(self.tokens) - offset) // self.longest)
        rows = order[place * self.rows : (place + 1) * self.rows]
        starts = offset + rows * self.longest
        window = np.stack([self.tokens[start : start + self.longest] for start in starts])
        return torch.from_numpy(window.astype(np.int64)).view(-1, context)


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, context: int, device: str, batch: int = 8) -> float:
    """exp(mean next-token loss) over non-overlapping windows; the first token of a window is context only."""
    model.eval()
    windows = torch.from_numpy(tokens[: len(tokens) // context * context].astype(np.int64)).view(-1, context)
    total, count = 0.0, 0
    for rows in windows.split(batch):
        rows = rows.to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(rows).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]).float(), rows[:, 1:].reshape(-1), reduction="sum"
        )
        total, count = total + loss.item(), count + rows[:, 1:].numel()
    model.train()
    return math.exp(total / count)


def name_for_both(folder: Path) -> None:
    """Add the names that transformers 4.x reads where 5.x writes new ones."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.get("dtype", config.get("torch_dtype"))
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from this model, with its tokenizer and shape (fine-tuning)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--short-context", type=int, default=512, help="window length of the first part of training")
    parser.add_argument("--short-share", type=float, default=0.85, help="share of training at the short context")
    parser.add_argument("--batch", type=int, default=16384, help="tokens a step")
    parser.add_argument("--micro-batch", type=int, default=2048, help="tokens a forward pass")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of matrices")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--save-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--characters", type=int, default=None, help="use only the first N characters (for a trial)")
    arguments = parser.parse_args()
    begun = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")

    train_text = read_text(arguments.train)[: arguments.characters]
    valid_text = read_text(arguments.valid)[: arguments.characters]
    known = arguments.init or arguments.out
    if (known / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(known)
        tokenizer.save_pretrained(arguments.out)
    else:
        tokenizer = train_tokenizer(train_text, arguments.vocabulary)
        tokenizer.save_pretrained(arguments.out)
    train, valid = encode(tokenizer, train_text), encode(tokenizer, valid_text)
    print(f"{len(train):,} training tokens, {len(valid):,} validation tokens, {time.time() - begun:.0f} s", flush=True)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=arguments.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    if arguments.init:
        model = LlamaForCausalLM.from_pretrained(arguments.init).float().to(device)
    else:
        model = LlamaForCausalLM(config).to(device)
        for name, parameter in model.named_parameters():  # residual projections start smaller (GPT-2, section 2.3)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.mul_(1 / math.sqrt(2 * arguments.layers))
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": arguments.decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    feed = Feed(train, arguments.context, arguments.batch, arguments.seed)
    tokens_a_step = feed.rows * arguments.context
    steps = int(arguments.epochs * len(train) / tokens_a_step)
    step, spent, state_file = 0, 0.0, arguments.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        print(f"going on from step {step}", flush=True)
    run = torch.compile(model) if arguments.compile else model
    print(f"{parameters:,} parameters on {device}; at most {steps} steps of {tokens_a_step:,} tokens", flush=True)

    started = saved = time.time()
    log = (arguments.out / "train.jsonl").open("a")
    while step < steps:
        elapsed = spent + time.time() - started
        done = max(step / steps, elapsed / (60 * arguments.minutes))
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 100)
        rate = arguments.rate * warm * min(1.0, 1e-3 + (1 - done) / 0.6)  # last 60 %: linear to zero
        for group in optimizer.param_groups:
            group["lr"] = rate
        context = arguments.short_context if done < arguments.short_share else arguments.context
        rows = feed.batch(step, context)
        total = 0.0
        for micro in rows.split(max(1, arguments.micro_batch // context)):
            micro = micro.to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                logits = run(micro).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]).float(), micro[:, 1:].reshape(-1)
            )
            (loss * len(micro) / len(rows)).backward()
            total += loss.detach() * len(micro) / len(rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or step == steps:
            seconds = spent + time.time() - started
            record = {"step": step, "loss": float(total), "rate": rate, "seconds": round(seconds, 1), "done": done}
            record["tokens"] = step * tokens_a_step
            if step % 200 == 0:
                record["valid_perplexity"] = perplexity(
                    model, valid[: 16 * arguments.context], arguments.context, device
                )
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)
        if time.time() - saved > 60 * arguments.save_minutes:
            saved = time.time()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"spent": spent + saved - started}, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)

    model = model.to(torch.bfloat16)
    final = perplexity(model, valid, arguments.context, device)
    model.save_pretrained(arguments.out, max_shard_size="1GB")
    name_for_both(arguments.out)
    seen = step * tokens_a_step
    card = {
        "parameters": parameters,
        "training_tokens_seen": seen,
        "epochs": seen / len(train),
        "validation_perplexity": final,
        "protocol": f"token perplexity, non-overlapping windows of {arguments.context}, first token of a window not "
        "scored, no BOS added, bf16",
        "validation_sha256": hashlib.sha256(valid_text.encode()).hexdigest(),
        "validation_tokens": len(valid),
        "seconds": round(time.time() - begun),
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("train", "valid", "out")},
    }
    (arguments.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
