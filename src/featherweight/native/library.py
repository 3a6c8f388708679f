"""Finding, checking and calling the native library (a plain C interface, see native/featherweight.h).

`get()` gives the library, or None with one warning; every caller then uses its PyTorch reference. The environment
variable FEATHERWEIGHT_NATIVE names another file, or turns the library `off`; FEATHERWEIGHT_ISA chooses an instruction
set (`ISAS`) for everything in it. Both are read at first use. What is wrong with one instruction set runs with the next
lower one: see `NativeLibrary.lower`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning, FeatherError
from featherweight.native.place import installed, why_missing
from featherweight.native.ptqtp_reference import Window
from featherweight.native.ptqtp_settings import NonFiniteWeightError, TritPlaneSettings
from featherweight.system.threads import thread_count as thread_count

VERSION = 5

ISAS = ("amx", "bf16", "vbmi", "avx512", "avxvnni", "avx2", "i8mm", "neon", "baseline")
"""Instruction sets of the products, from the best down. The solvers have fewer, and take the nearest one."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
PACKINGS = {"base3": 0, "2bit": 1}
ORDERS = {"lexicographic": 0, "paired": 1}
OK, INVALID, NON_FINITE, NO_MEMORY, CACHE_RANGE = 0, 1, 2, 3, 5


class _Settings(ctypes.Structure):
    """fw_trit_settings of native/featherweight.h."""

    _fields_ = [
        ("tolerance", ctypes.c_double),
        ("ridge", ctypes.c_double),
        ("ridge_max", ctypes.c_double),
        ("condition_threshold", ctypes.c_double),
        ("group_size", ctypes.c_int64),
        ("planes", ctypes.c_int32),
        ("tied", ctypes.c_int32),
        ("tie_order", ctypes.c_int32),
        ("starts", ctypes.c_int32),
        ("final_least_squares", ctypes.c_int32),
        ("canonical", ctypes.c_int32),
    ]


class NativeLibrary:
    """The functions of the native library on tensors. Arguments are checked by the callers, not here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        self._c.fw_version.restype = ctypes.c_int32
        if self._c.fw_version() != VERSION:
            raise OSError(
                f"{path} has interface {self._c.fw_version()}, this package needs {VERSION}; install it again"
            )
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        signatures = {
            "fw_select_isa": [ctypes.c_char_p],
            "fw_squared_errors": [pointer, number, size, size, size, pointer, pointer, pointer, number],
            "fw_pack_trits": [pointer, size, number, pointer],
            "fw_unpack_trits": [pointer, size, number, pointer, pointer],
            "fw_pack_bits": [pointer, size, number, pointer],
            "fw_unpack_bits": [pointer, size, number, pointer],
            "fw_pack_codes": [pointer, size, number, number, pointer, size],
            "fw_decode": [
                pointer,
                size,
                number,
                pointer,
                number,
                number,
                size,
                size,
                size,
                number,
                pointer,
                number,
                pointer,
            ],
            "fw_solve": [pointer, number, size, size, size, pointer, number]
            + [pointer, pointer, pointer, pointer, number, number, pointer],
            "fw_assign": [pointer, number, size, size, size, pointer, pointer, pointer, number],
        }
        for name, arguments in signatures.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = arguments, ctypes.c_int32
        for name in ("fw_isa", "fw_product_isa"):
            function = getattr(self._c, name)
            function.argtypes, function.restype = [], ctypes.c_char_p

    @property
    def isa(self) -> str:
        """The instruction set in use by the solvers: "baseline", "avx2" or "avx512"."""
        return str(self._c.fw_isa().decode())

    @property
    def product_isa(self) -> str:
        """The instruction set in use by the products, one of ISAS."""
        return str(self._c.fw_product_isa().decode())

    def select_isa(self, name: str) -> None:
        """Use another instruction set for the whole process; "auto" for the best. ValueError if it is not there."""
        before = self.isa, self.product_isa
        # The products of one that is not there would be the baseline's.
        if self._c.fw_select_isa(name.encode()) != OK or name not in ("auto", self.product_isa, self.isa):
            self.restore_isa(*before)
            raise ValueError(f"this processor or build has no {name!r}")

    def restore_isa(self, isa: str, product_isa: str) -> None:
        """Go back to what `isa` and `product_isa` were."""
        self._c.fw_select_isa(product_isa.encode())
        if self.isa != isa:  # no VNNI: the solvers have AVX-512, the products do not
            self._c.fw_select_isa(isa.encode())

    def isas(self) -> tuple[str, ...]:
        """The instruction sets of ISAS that this processor and build have."""
        before, found = (self.isa, self.product_isa), []
        for name in ISAS:
            try:
                self.select_isa(name)
                found.append(name)
            except ValueError:
                continue
        self.restore_isa(*before)
        return tuple(found)

    def lower(self, solvers: bool = False) -> bool:
        """Use the next lower instruction set in products (in solvers, with `solvers`); False if there is none."""
        before = self.isa, self.product_isa
        for name in ISAS[ISAS.index(before[1]) + 1 :]:
            try:
                self.select_isa(name)
            except ValueError:
                continue
            if (self.isa != before[0]) if solvers else (self.product_isa != before[1]):
                return True
        self.restore_isa(*before)
        return False

    def pack_trits(self, flat: Tensor, packing: str) -> Tensor:
        per_byte = 5 if packing == "base3" else 4
        packed = torch.empty(-(-flat.numel() // per_byte), dtype=torch.uint8)
        _check(self._c.fw_pack_trits(flat.data_ptr(), flat.numel(), PACKINGS[packing], packed.data_ptr()))
        return packed

    def unpack_trits(self, packed: Tensor, count: int, packing: str) -> Tensor:
        trits = torch.empty(count, dtype=torch.int8)
        bad = ctypes.c_int64(-1)
        status = self._c.fw_unpack_trits(
            packed.data_ptr(), count, PACKINGS[packing], trits.data_ptr(), ctypes.addressof(bad)
        )
        _check(status, bad, packing)
        return trits

    def pack_bits(self, flat: Tensor, bits: int) -> Tensor:
        packed = torch.empty(-(-flat.numel() * bits // 8), dtype=torch.uint8)
        _check(self._c.fw_pack_bits(flat.data_ptr(), flat.numel(), bits, packed.data_ptr()))
        return packed

    def unpack_bits(self, packed: Tensor, count: int, bits: int) -> Tensor:
        values = torch.empty(count, dtype=torch.uint8)
        _check(self._c.fw_unpack_bits(packed.data_ptr(), count, bits, values.data_ptr()))
        return values

    def pack_codes(self, codes: Tensor, packing: str, packed: Tensor, offset: int) -> None:
        """Joint codes, flattened, into the byte columns of packed planes uint8 [K, bytes] from `offset` on."""
        planes, stride = packed.shape
        status = self._c.fw_pack_codes(
            codes.data_ptr(), codes.numel(), planes, PACKINGS[packing], packed.data_ptr() + offset, stride
        )
        _check(status)

    def decode_trit_planes(
        self, packed: Tensor, scales: Tensor, group_size: int, packing: str, out: Tensor, threads: int | None
    ) -> Tensor:
        bad = ctypes.c_int64(-1)
        status = self._c.fw_decode(
            packed.data_ptr(),
            packed.shape[1],
            packed.shape[0],
            scales.data_ptr(),
            DTYPES[scales.dtype],
            int(scales.dim() == 2),
            out.shape[0],
            out.shape[1],
            group_size,
            PACKINGS[packing],
            out.data_ptr(),
            thread_count(threads),
            ctypes.addressof(bad),
        )
        _check(status, bad, packing)
        return out

    def squared_errors(self, weight: Tensor, decoded: Tensor, threads: int | None) -> tuple[Tensor, Tensor]:
        """`errors.squared_errors_reference`."""
        weight, decoded = _rows(weight), decoded.contiguous()
        missed, total = torch.empty(2, weight.shape[0], dtype=torch.float64)
        _check(
            self._c.fw_squared_errors(
                weight.data_ptr(),
                DTYPES[weight.dtype],
                weight.shape[0],
                weight.shape[1],
                weight.stride(0),
                decoded.data_ptr(),
                missed.data_ptr(),
                total.data_ptr(),
                thread_count(threads),
            )
        )
        return missed, total

    def solve_window(
        self,
        weight: Tensor,
        settings: TritPlaneSettings,
        cap: int,
        threads: int | None,
        window: Window | None = None,
    ) -> Window:
        """`ptqtp_reference.solve_window`; with a window, solve again in place its groups with more than `cap` steps."""
        weight = _rows(weight)
        n, d = weight.shape
        groups = -(-d // settings.group_size)
        again = window is not None
        if window is None:
            window = Window(
                torch.empty(n, d, dtype=torch.uint8),
                torch.empty((n, groups) if settings.tied else (n, groups, settings.planes), dtype=torch.float64),
                torch.zeros(n, groups, dtype=torch.uint8),
                torch.zeros(cap + 1, dtype=torch.uint8),
            )
        bad = ctypes.c_int64(-1)
        options = _settings(settings)
        status = self._c.fw_solve(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            n,
            d,
            weight.stride(0),
            ctypes.addressof(options),
            cap,
            window.codes.data_ptr(),
            window.scales.data_ptr(),
            window.steps.data_ptr(),
            window.moving.data_ptr(),
            int(again),
            thread_count(threads),
            ctypes.addressof(bad),
        )
        if status == NON_FINITE:
            raise NonFiniteWeightError(*divmod(bad.value, d))
        _check(status)
        return window

    def assign_window(self, weight: Tensor, scales: Tensor, settings: TritPlaneSettings, threads: int | None) -> Tensor:
        """`ptqtp_reference.assign_window`."""
        weight = _rows(weight)
        scales = scales.to(torch.float64).contiguous()
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        options = _settings(settings)
        status = self._c.fw_assign(
            weight.data_ptr(),
            DTYPES[weight.dtype],
            *weight.shape,
            weight.stride(0),
            ctypes.addressof(options),
            scales.data_ptr(),
            codes.data_ptr(),
            thread_count(threads),
        )
        _check(status)
        return codes


def get() -> NativeLibrary | None:
    """The native library, found once a process; None where it is missing, turned off, or wrong with the instruction set
    in use. FeatherError where FEATHERWEIGHT_ISA names one that is not there."""
    found = _load(os.environ.get("FEATHERWEIGHT_NATIVE", ""))
    return found if found is not None and _trusted(found, found.isa) else None


@functools.lru_cache(maxsize=4)
def _load(choice: str) -> NativeLibrary | None:
    if choice.lower() == "off":
        return None
    path = Path(choice) if choice else installed()
    if path is None:
        _warn(why_missing())
        return None
    try:
        native = NativeLibrary(path)
    except (OSError, AttributeError) as error:
        _warn(str(error))
        return None
    _choose_isa(native, os.environ.get("FEATHERWEIGHT_ISA", "").strip().lower())
    chosen = native.isa, native.product_isa
    while not _trusted(native, wrong := native.isa):
        if not native.lower(solvers=True):
            native.restore_isa(*chosen)
            _warn(f"{path} computes wrong results on this processor")
            return None
        warnings.warn(
            f"featherweight uses {native.isa} instructions instead of {wrong}, with which {path} computes wrong "
            "results on this processor",
            FallbackWarning,
            stacklevel=3,
        )
    return native


def _choose_isa(native: NativeLibrary, name: str) -> None:
    if name in ("", "auto"):
        return
    try:
        native.select_isa(name)
    except ValueError:
        what = "which this processor or build does not have" if name in ISAS else "which is no instruction set"
        raise FeatherError(
            f"FEATHERWEIGHT_ISA is {name!r}, {what}: choose auto or {', '.join(native.isas())}"
        ) from None


@functools.lru_cache(maxsize=16)
def _trusted(native: NativeLibrary, isa: str) -> bool:
    """Whether the solvers compute what they should with the instruction set in use, `isa`."""
    return _self_check(native)


def _warn(reason: str) -> None:
    warnings.warn(
        f"featherweight runs without its native library, slowly, in PyTorch: {reason}", FallbackWarning, stacklevel=3
    )


def why_not() -> str:
    """Why `get()` gives None, and what to do, as a clause of a sentence about the library."""
    choice = os.environ.get("FEATHERWEIGHT_NATIVE", "")
    if choice.lower() == "off":
        return "FEATHERWEIGHT_NATIVE turns it off; unset that"
    if choice:
        return f"{choice}, which FEATHERWEIGHT_NATIVE names, cannot be used; unset that"
    path = installed()
    return why_missing() if path is None else f"{path} cannot be used, as a warning said; install featherweight again"


def _self_check(native: NativeLibrary) -> bool:
    """A small solve against the values of the method's definition, packing there and back, decoding, and its error."""
    j = torch.arange(1, 129, dtype=torch.float64)
    wave = torch.sin(1.7 * j + 0.3 * j * j) + 0.5 * torch.cos(2.9 * j)
    try:
        found = native.solve_window(wave.to(torch.float32)[None], TritPlaneSettings(), 50, 1)
        trits = (found.codes[0] % 3).to(torch.int8) - 1
        packed = [native.unpack_trits(native.pack_trits(trits, p), 128, p) for p in PACKINGS]
        decoded = [
            native.decode_trit_planes(
                native.pack_trits(trits, p)[None], torch.full((2, 1, 1), 0.5, dtype=torch.float32), 64, p, out, 1
            )
            for p in PACKINGS
            for out in [torch.empty(2, 64, dtype=torch.float32)]
        ]
        missed, total = native.squared_errors(wave.to(torch.bfloat16).view(2, 64), 0.5 * trits.view(2, 64).float(), 1)
    except (OSError, ValueError, MemoryError):
        return False
    seen = wave.to(torch.bfloat16).double().view(2, 64)
    expected = torch.tensor([0.77188354, 0.49823528], dtype=torch.float64)
    return (
        bool(((found.scales[0, 0] - expected).abs() < 1e-6).all())
        and int((trits != 0).sum()) == 84
        and all(torch.equal(p, trits) for p in packed)
        and all(torch.equal(d, 0.5 * trits.view(2, 64).float()) for d in decoded)
        and torch.allclose(total, seen.square().sum(1), rtol=1e-12)
        and torch.allclose(missed, (seen - 0.5 * trits.view(2, 64)).square().sum(1), rtol=1e-12)
    )


def _rows(weight: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return weight if weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1] else weight.contiguous()


def _settings(settings: TritPlaneSettings) -> _Settings:
    return _Settings(
        settings.tolerance,
        settings.ridge,
        settings.ridge_max,
        settings.condition_threshold,
        settings.group_size,
        settings.planes,
        int(settings.one_scale),
        ORDERS[settings.tie_order],
        settings.starts,
        int(settings.final_least_squares),
        int(settings.canonical),
    )


def _check(status: int, bad: ctypes.c_int64 | None = None, packing: str = "") -> None:
    """Turn a status of the C interface into an exception."""
    if status == OK:
        return
    if status == NO_MEMORY:
        raise MemoryError("the native library could not get memory for its work space")
    if bad is not None and bad.value >= 0:
        raise ValueError(f"byte {bad.value} of packed trits is not valid {packing}")
    raise ValueError("the native library refused its arguments")


def run_job(function: Callable[[int, int], int], job: ctypes.Structure, threads: int | None) -> None:
    """Call a function of `job_function`. MemoryError without room for its work, ValueError where it refuses."""
    _check(function(ctypes.addressof(job), thread_count(threads)))


def job_function(name: str) -> Callable[[int, int], int] | None:
    """A function of the native library that takes the address of a job and a number of threads; None without it."""
    found = get()
    return None if found is None else _job_function(found, name)


@functools.lru_cache(maxsize=16)
def _job_function(found: NativeLibrary, name: str) -> Callable[[int, int], int] | None:
    function = getattr(ctypes.CDLL(str(found.path)), name, None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_int32
    return function  # type: ignore[no-any-return]
