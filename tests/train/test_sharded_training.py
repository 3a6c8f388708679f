"""A prepared model under FSDP: two processes with shards of every weight take the steps of one with all of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import featherweight.train
from featherweight.integrations.load import load
from models import make_tiny
from outputs import start


def train(folder: Path, out: Path, rank: int, count: int, port: int) -> None:
    """Three steps of one process of `count`; the first keeps what was reached beside `out` and exports it."""
    model, _ = load(folder, dtype=torch.float32)
    featherweight.train.prepare(model, "bitnet-b158")
    if count > 1:
        shard(model, rank, count, port)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    draw, losses = torch.Generator().manual_seed(0), list[float]()
    for _ in range(3):
        ids = torch.randint(4, 200, (2, 24), generator=draw)[rank::count]
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
        keep(folder, whole, losses, out)
    if count > 1:
        distributed.destroy_process_group()


def shard(model: Any, rank: int, count: int, port: int) -> None:
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=count)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def keep(folder: Path, weights: dict[str, Any], losses: list[float], out: Path) -> None:
    plain, _ = load(folder, dtype=torch.float32)
    featherweight.train.prepare(plain, "bitnet-b158")
    plain.load_state_dict(weights)
    with torch.no_grad():
        logits = plain.eval()(torch.arange(4, 20)[None]).logits
    torch.save({"losses": losses, "weights": weights, "logits": logits}, out.with_suffix(".pt"))
    featherweight.train.export(plain, out, recipe="bitnet-b158", tokenizer=folder)


def run(model: Path, out: Path, processes: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [start(train, model, out, rank, processes, port) for rank in range(processes)]
    for process in started:
        process.join(240)
        assert process.exitcode == 0
    found: dict[str, Any] = torch.load(out.with_suffix(".pt"))
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
