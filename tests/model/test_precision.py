"""bfloat16 products, with and without instructions for them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from unmask.model import precision
from unmask.model.precision import linear, processor_has_bfloat16


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "processor_has_bfloat16", lambda: False)


@pytest.mark.usefixtures("no_instructions")
@pytest.mark.parametrize("bias", [False, True])
def test_an_emulated_bfloat16_product_is_the_float32_product_rounded_once(bias: bool) -> None:
    x, w, b = (torch.randn(size).bfloat16() for size in ((5, 300), (7, 300), (7,)))
    expected = x.double() @ w.double().T + (b.double() if bias else 0)
    y = linear(x, w, b if bias else None)
    assert y.dtype is torch.bfloat16
    # Accumulated in float32: one rounding to bfloat16 (half a unit of 2^-8) and no more.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)
    assert (y == expected.bfloat16()).double().mean() > 0.95


@pytest.mark.usefixtures("no_instructions")
def test_an_emulated_product_has_gradients_in_the_dtype_of_its_inputs() -> None:
    x, w = torch.randn(5, 30).bfloat16().requires_grad_(), torch.randn(7, 30).bfloat16().requires_grad_()
    linear(x, w).float().sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(x.grad.float(), w.detach().float().sum(0).expand(5, 30), rtol=0.01, atol=0.02)


def test_a_float32_product_is_left_alone() -> None:
    x, w, b = torch.randn(5, 30), torch.randn(7, 30), torch.randn(7)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))


@pytest.mark.skipif(
    not processor_has_bfloat16(), reason="products go through float32, which compiles no kernels"
)
def test_memory_does_not_grow_with_the_number_of_shapes_that_were_multiplied() -> None:
    """600 shapes, three products each: their compiled kernels would be 3 GB if all were kept; 0.08 are seen."""
    program = """
import ctypes
from pathlib import Path
import torch
from unmask.model.precision import linear
weight = torch.randn(768, 256, dtype=torch.bfloat16, requires_grad=True)
def resident():
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds of freed tensors is no kernel
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def multiply(rows):
    linear(torch.randn(rows, 256, dtype=torch.bfloat16, requires_grad=True), weight).sum().backward()
multiply(3000)
before = resident()
for rows in range(1000, 1600):
    multiply(rows)
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400e6
