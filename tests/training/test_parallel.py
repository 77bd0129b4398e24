"""Devices, precision, memory, and the speed limit."""

import mmap
import sys
import time

import pytest
import torch

from unmask.errors import UserError
from unmask.training import parallel

CPU = torch.device("cpu")


def test_a_device_that_is_not_here_is_an_error_that_says_what_is() -> None:
    assert parallel.pick_device("cpu") == CPU
    count = torch.cuda.device_count()
    assert parallel.pick_device().type == ("cuda" if count else "cpu")
    absent = {f"cuda:{count}": f"sees {count} CUDA devices", "tpu": "unknown", "meta": "not supported"}
    for name, message in absent.items():
        with pytest.raises(UserError, match=message):
            parallel.pick_device(name)


def test_the_description_names_the_precision_that_is_used() -> None:
    name = str(parallel.compute_dtype(CPU)).removeprefix("torch.")
    assert name in parallel.describe(CPU)
    assert "core" in parallel.describe(CPU)


def test_the_matmul_rate_is_what_a_product_takes() -> None:
    """Against products timed by hand. Here, on a shared machine, only the order of magnitude is sure."""
    rate = parallel.matmul_rate(torch.float32, seconds=0.1, device=CPU)
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    by_hand = 4 * 2 * 1024**3 / (time.perf_counter() - start)
    assert by_hand / 3 < rate < by_hand * 30


def touch(size: int) -> None:
    """Have so many bytes resident for a moment, past the allocator, which may keep what was freed."""
    with mmap.mmap(-1, size) as memory:
        memory.write(bytes(size // 64) * 64)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    touch(64 << 20)
    parallel.reset_peak_memory(CPU)
    low = parallel.peak_memory(CPU)
    touch(48 << 20)
    rise = parallel.peak_memory(CPU) - low
    assert 40 << 20 < rise < 60 << 20
