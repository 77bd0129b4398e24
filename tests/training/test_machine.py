"""Devices, precision, memory, and the speed limit."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from unmask.errors import UserError
from unmask.model import native
from unmask.training import machine

CPU = torch.device("cpu")


def test_a_device_that_is_not_here_is_an_error_that_says_what_is() -> None:
    assert machine.pick_device("cpu") == CPU
    count = torch.cuda.device_count()
    assert machine.pick_device().type == ("cuda" if count else "cpu")
    absent = {f"cuda:{count}": f"sees {count} CUDA devices", "tpu": "unknown", "meta": "not supported"}
    for name, message in absent.items():
        with pytest.raises(UserError, match=message):
            machine.pick_device(name)


def test_the_description_names_the_precision_that_is_used() -> None:
    name = str(machine.compute_dtype(CPU)).removeprefix("torch.")
    assert name in machine.describe(CPU)
    assert "core" in machine.describe(CPU)


def test_the_matmul_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that gives products of 4, 2 and 8 ms; one of 1,024 costs 2·1024³ operations."""
    ticks = iter([0.0, 0.004, 1.0, 1.002, 2.0, 2.008])
    ends = iter([0.0, 0.1, 0.2, 0.3, 0.5])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(ends))
    rate = machine.matmul_rate(torch.float32, seconds=0.4, device=CPU)
    assert rate == pytest.approx(2 * 1024**3 / 0.002)


def touch(size: int) -> None:
    """Have so many bytes resident for a moment, past the allocator, which may keep what was freed."""
    with mmap.mmap(-1, size) as memory:
        for _ in range(size >> 20):  # no copy of the whole beside it, which the allocator would keep or not
            memory.write(bytes(1 << 20))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    touch(64 << 20)
    machine.reset_peak_memory(CPU)
    low = machine.peak_memory(CPU)
    touch(48 << 20)
    rise = machine.peak_memory(CPU) - low
    assert 40 << 20 < rise < 60 << 20


def test_a_container_has_no_more_memory_than_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_MEMORY_MAX", tmp_path / "memory.max")
    whole = machine.memory(CPU)
    for allowed, expected in (("max", whole), ("123456789", 123456789), (str(2 * whole), whole)):
        (tmp_path / "memory.max").write_text(f"{allowed}\n")
        assert machine.memory(CPU) == expected


def test_a_machine_without_compiled_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, said in ((object(), False), (None, True)):
        monkeypatch.setattr(machine.native, "built", lambda library=library: native.Built(library, ""))
        assert ("no compiled kernels" in machine.describe(CPU)) is said


@pytest.mark.parametrize("most", [2**31 - 1, 2**25, 0])
def test_glibc_keeps_large_blocks_as_far_as_it_lets_itself_be_told(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older glibc refuses a threshold above 32 MiB; told of the trimming alone it would be slower than before."""
    told: dict[int, int] = {}

    class Libc:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            if option == machine._M_MMAP_THRESHOLD and value > most:
                return 0
            told[option] = value
            return 1

    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Libc)
    machine.keep_large_blocks()
    kept = {machine._M_MMAP_THRESHOLD: most, machine._M_TRIM_THRESHOLD: 2**31 - 1}
    assert told == (kept if most else {})
