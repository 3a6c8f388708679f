"""A prepared model under FSDP: two processes with shards of every weight take the steps of one with all of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.integrations.load import load
from models import make_tiny

PROCESS = """
import os, sys
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
import featherweight.train
from featherweight.integrations.load import load

folder, kept, out = sys.argv[1:]
torch.set_num_threads(1)
count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
model, _ = load(folder, dtype=torch.float32)
featherweight.train.prepare(model, "bitnet-b158")
if count > 1:
    distributed.init_process_group("gloo")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
optimiser = torch.optim.Adam(model.parameters(), 1e-2)
draw, losses = torch.Generator().manual_seed(0), []
for _ in range(3):
    ids = torch.randint(4, 200, (2, 24), generator=draw)
    ids = ids[rank :: count]
    loss = model(input_ids=ids, labels=ids).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    both = loss.detach().clone()
    if count > 1:
        distributed.all_reduce(both)
    losses.append(float(both) / count)
whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in model.state_dict().items()}
if rank == 0:
    plain, _ = load(folder, dtype=torch.float32)
    featherweight.train.prepare(plain, "bitnet-b158")
    plain.load_state_dict(whole)
    with torch.no_grad():
        logits = plain.eval()(torch.arange(4, 20)[None]).logits
    torch.save({"losses": losses, "weights": whole, "logits": logits}, kept)
    featherweight.train.export(plain, out, recipe="bitnet-b158", tokenizer=folder)
if count > 1:
    distributed.destroy_process_group()
"""


def run(model: Path, place: Path, processes: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", PROCESS, str(model), str(place.with_suffix(".pt")), str(place)]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(words, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in range(processes)
    ]
    for process in started:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    found: dict[str, Any] = torch.load(place.with_suffix(".pt"))
    return found


def test_shards_take_the_steps_of_the_whole(tmp_path: Path) -> None:
    """The order of sums differs; what is exported is the model that was trained."""
    model = make_tiny("llama", tmp_path / "model", tokenizer=True, initializer_range=0.2)
    alone, shared = run(model, tmp_path / "one", 1), run(model, tmp_path / "two", 2)
    assert alone["losses"][0] > alone["losses"][-1]
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["weights"].keys() == shared["weights"].keys()
    for name, value in alone["weights"].items():  # Adam makes a step of a gradient's last bits where it is near 0
        assert torch.allclose(shared["weights"][name], value, atol=1e-3), name
    packed, _ = load(tmp_path / "two", dtype=torch.float32)
    with torch.no_grad():
        logits = packed(torch.arange(4, 20)[None]).logits
    assert (logits - shared["logits"]).abs().max() < 2e-5 * shared["logits"].abs().max()
