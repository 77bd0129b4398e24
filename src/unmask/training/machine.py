"""Where training runs and in which precision: device, dtype, memory, speed limit."""

import ctypes
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from unmask.errors import UserError
from unmask.model import native
from unmask.model.precision import processor_has_bfloat16

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(name: str | None = None) -> torch.device:
    """The named device (cpu, cuda, cuda:1, mps), or the GPU if there is one and the CPU if not.

    MPS is best effort and is taken only by name. Raises UserError for what this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device '{name}'. Use cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device '{name}' is not here: torch {torch.__version__} sees {count} CUDA devices.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not here: it needs an Apple GPU and a torch built for it.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device '{name}' is not supported. Use cpu, cuda, cuda:N or mps.")
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32 (MPS too: best effort)."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and processor_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def describe(device: torch.device | None = None) -> str:
    """The machine (or another device of it) in words: "2 cores of AMD EPYC, bfloat16"."""
    device = device or pick_device()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        where = "Apple GPU"
    else:
        threads = torch.get_num_threads()
        where = f"{threads} core{'s' if threads > 1 else ''} of {_processor()}"
        if native.built().library is None:
            where += ", no compiled kernels"
    if compute_dtype(device) == torch.bfloat16:
        return f"{where}, bfloat16"
    return f"{where}, float32 (no bfloat16 instructions)"


def matmul_rate(dtype: torch.dtype, seconds: float = 0.3, device: torch.device | None = None) -> float:
    """FLOP/s of the best of the square matrix products done in `seconds`: the limit that training is held to.

    One product counts 2·n³. n is 1,024 on a CPU and 8,192 on a GPU, where smaller ones do not fill it.
    """
    device = device or pick_device()
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = a @ b
    synchronize(device)
    best = float("inf")
    end = time.monotonic() + seconds
    while time.monotonic() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def keep_large_blocks() -> None:
    """Tell glibc to keep freed blocks instead of returning each large tensor's pages to the kernel at once.

    A training step frees and takes the same large tensors again and again; by default each costs a page fault
    per 4 KiB. Measured for a decoder of depth 6 in float32 on two cores: 216,000 page faults a step became none,
    and the step a sixth shorter. No effect where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for largest in (2**31 - 1, 2**25):  # older ones take 32 MiB at most, and say 0 to more
        if libc.mallopt(_M_MMAP_THRESHOLD, largest):
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            return


_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")  # of the container that we may be in


def memory(device: torch.device) -> int:
    """Bytes that there are for this process: of the device, or of this machine and what its cgroup allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = _MEMORY_MAX.read_text().strip() if _MEMORY_MAX.exists() else "max"
    return min(whole, int(allowed)) if allowed.isdigit() else whole


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement for `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux, if allowed: sets VmHWM, the peak, to what is resident now
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was resident (on a CUDA device: allocated there) since `reset_peak_memory`.

    Exact on Linux and CUDA. Elsewhere, and where /proc is closed to us, it is the peak of the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for what was begun there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
