"""Where networks run: the processor, or a device that PyTorch knows."""

from __future__ import annotations

import torch

from featherweight.errors import FeatherError


def device_named(name: str | torch.device) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "mps", ...; "auto" is the accelerator that PyTorch finds here, or
    else the CPU.

    Raises
    ------
    FeatherError : there is no such device on this machine, or PyTorch was built without it
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100].rstrip(".")
        raise FeatherError(f"the device {str(name)!r} cannot be used ({reason}): take cpu, or auto") from None
    return device
