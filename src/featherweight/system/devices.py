"""Where networks run: the processor, or a device that PyTorch knows."""

from __future__ import annotations

import torch

from featherweight.errors import FeatherError


def device_named(name: str | torch.device) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "mps", ...; "auto" is CUDA where there is one, else Apple's MPS,
    else another accelerator that PyTorch finds here, else the CPU.

    Raises
    ------
    FeatherError : there is no such device on this machine, or PyTorch was built without it
    """
    if name == "auto":
        return torch.device(_accelerators()[0] if _accelerators() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100].rstrip(".")
        raise FeatherError(
            f"the device {str(name)!r} cannot be used ({reason}): take {' or '.join(devices_here())}, or auto"
        ) from None
    return device


def devices_here() -> list[str]:
    """Names of the devices of this machine: "cpu", then "cuda:0", "cuda:1", ... or "mps"."""
    counted = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *counted, *(kind for kind in _accelerators() if kind != "cuda")]


def _accelerators() -> list[str]:
    """Kinds of devices beside the CPU, the one that `auto` takes first."""
    found = ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found + ([other.type] if other is not None and other.type not in found else [])


def solving_device(device: torch.device) -> str:
    """Where layers are solved in a run on `device`: there, but in main memory where it has no float64 (Apple's MPS)."""
    return "cpu" if device.type == "mps" else str(device)


def give_back(device: torch.device) -> None:
    """Let others have the memory that PyTorch keeps of a device for later."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given; the CPU has, always."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif wait is not None:  # mps, xpu, ...; torch.cpu has one that does nothing
        wait()


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of a device's own memory that tensors of this process have taken; None where that is not known."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's own memory that are free now; 0 where that is not known, as it is not for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return 0
