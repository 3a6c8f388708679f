"""What changes the process for a moment, changes it for one thread only."""

from __future__ import annotations

import threading

import torch
from torch import nn

from featherweight.model.network.skeleton import _parameters_on_meta


def test_modules_that_another_thread_makes_are_real() -> None:
    begun, made = threading.Event(), threading.Event()
    built: list[nn.Module] = []

    def build() -> None:
        with _parameters_on_meta():
            begun.set()
            made.wait(30)
            built.append(nn.Linear(4, 3))

    thread = threading.Thread(target=build)
    thread.start()
    begun.wait(30)
    other = nn.Linear(4, 3)
    nn.init.constant_(other.bias, 2.0)
    made.set()
    thread.join(30)
    assert not other.weight.is_meta
    assert torch.equal(other.bias, torch.full((3,), 2.0))
    assert all(parameter.is_meta for parameter in built[0].parameters())
    assert not nn.Linear(4, 3).weight.is_meta
