"""Several processes that train one model, each with a share of every step's batches.

Started by `accelerate launch` or `torchrun`. All hold the same weights; gradients are summed over them in one buffer a
type, so every process makes the same step. One of them writes. Sharded weights (FSDP) are for transformers' Trainer,
whose models `featherweight.train.prepare` makes low-bit as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError


@dataclass(frozen=True)
class Processes:
    """number : of this one, from 0; count : of all"""

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Those that a launcher has started; one where there is none. FeatherError without the package accelerate."""
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise FeatherError(
                "several processes train together by the package accelerate: pip install accelerate"
            ) from None
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def writes(self) -> bool:
        """Whether this is the one that logs, saves and writes."""
        return self.number == 0

    def share(self, batches: int) -> range:
        """Numbers of a step's batches that are this one's; FeatherError where they cannot be shared evenly."""
        if batches % self.count:
            raise FeatherError(
                f"{self.count} processes cannot share {batches} batches of a step evenly: make --accumulate a multiple"
            )
        return range(self.number, batches, self.count)

    def add_up(self, model: nn.Module, loss: float) -> float:
        """Gradients of all processes, summed in place; returns the sum of their losses."""
        if self.count == 1:
            return loss
        from torch import distributed

        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)
        device = next(model.parameters()).device
        total: Tensor = torch.tensor(loss, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        distributed.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()
