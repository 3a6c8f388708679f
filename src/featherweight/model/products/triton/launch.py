"""What all launches share: block sizes, the number of splits, the device, the choice among few configurations."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

WAVES = 4
"""Programs a multiprocessor should have at least: enough loads in flight to hide the latency of memory."""


@dataclass(frozen=True)
class Config:
    """Rows of a program's tile and its elements (`matvec`: chunks side by side), tokens (0: those of the call), warps,
    pipeline stages; `halves` of the full size of a chunk (`matvec`): a full one has more loads under way, half a one
    leaves registers for more programs."""

    block_n: int
    block_e: int
    tokens: int = 0
    num_warps: int = 4
    num_stages: int = 2
    halves: int = 2


# Four rows a lane: loads of 16 bytes.
MATVEC = (
    Config(64, 16, num_warps=8),
    Config(32, 16),
    Config(128, 8, num_warps=8),
    Config(32, 32, num_warps=8),
    Config(128, 4),
    Config(64, 32, num_warps=16),
    Config(64, 16, num_warps=8, halves=1),
    Config(32, 16, halves=1),
)
SMALL_BATCH = (Config(64, 32, 16, 4, 3), Config(128, 16, 16, 4, 3), Config(32, 64, 16, 4, 3))
PREFILL = (Config(128, 32, 128, 8, 3), Config(64, 32, 128, 4, 3), Config(64, 32, 64, 4, 3))
INTERPRETED = {"matvec": Config(64, 2), "tiles": Config(64, 16, 16), "group tiles": Config(64, 0, 16)}


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1): for tests, without a GPU."""
    return not isinstance(_probe, triton.runtime.JITFunction)


@triton.jit
def _probe() -> None:
    pass


def candidates(name: str, tokens: int) -> tuple[Config, ...]:
    """The configurations worth trying for "matvec", "matvec int8", "tiles", "group tiles" or "int8" (the last two: any
    `block_e`)."""
    if interpreted():
        return (INTERPRETED["group tiles" if name == "int8" else name.removesuffix(" int8")],)
    if name.startswith("matvec"):
        return MATVEC
    return SMALL_BATCH if tokens <= 16 else PREFILL


def divisor(most: int, count: int) -> int:
    """The largest power of two that divides `count` and is not above `most`, a power of two."""
    return min(most, count & -count)


def fitted(most: int, count: int) -> int:
    """Parts of at most this many make up `count` with the least padding in as few parts as that takes."""
    return -(-count // -(-count // most))


def splits_for(programs: int, blocks: int, device: torch.device, waves: int = WAVES) -> tuple[int, int]:
    """Parts, and blocks of a part, into which a sum over `blocks` is cut, for `waves` programs a multiprocessor."""
    wanted = 2  # without a GPU: the interpreter is to see the sum over splits too
    if device.type == "cuda":
        wanted = max(1, waves * _multiprocessors(device.index or 0) // programs)
    per_split = -(-blocks // min(wanted, blocks))
    return -(-blocks // per_split), per_split


@functools.lru_cache(maxsize=16)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


_fastest: dict[tuple[object, ...], Config] = {}
_measuring = threading.Lock()


def fastest(
    key: tuple[object, ...], configs: Iterable[Config], run: Callable[[Config], object], device: torch.device
) -> Config:
    """The configuration that was fastest for this key; measured once, never while a CUDA graph is captured."""
    configs = tuple(configs)
    if key in _fastest:
        return _fastest[key]
    if len(configs) == 1 or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return configs[0]
    with _measuring:  # two at a time would measure each other
        if key not in _fastest:
            times = {}
            for config in configs:
                with contextlib.suppress(triton.runtime.errors.OutOfResources):  # a tile too large for this device
                    times[config] = triton.testing.do_bench(functools.partial(run, config), warmup=5, rep=20)
            _fastest[key] = min(times, key=times.__getitem__) if times else configs[0]
    return _fastest[key]


MOST_NARROW = 1 << 31
"""Elements of a tensor that offsets of 32 bits reach."""


def wide(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels need offsets of 64 bits into any of these, which takes them more instructions."""
    return any(tensor.numel() >= MOST_NARROW for tensor in tensors)


def has_ptx() -> bool:
    """Whether kernels may contain NVIDIA's instructions."""
    return not interpreted() and torch.version.hip is None


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which must be that of the tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def power_above(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()
