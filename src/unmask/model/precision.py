"""Products in bfloat16 on CPUs: through float32 where a processor has no instructions for them."""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch keeps the kernels that it compiled for each shape of a bfloat16 product, 1,024 of them in each of two
# caches: gigabytes where texts have all lengths. Both caches look here when the first product is made.
for _capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, "128")


@functools.cache
def processor_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def emulated(x: Tensor) -> bool:
    """Whether products of this tensor go through float32."""
    return x.dtype is torch.bfloat16 and x.device.type == "cpu" and not processor_has_bfloat16()


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what norms, rotations and losses are computed in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in x's dtype.

    Products of bfloat16 numbers are exact in float32, are summed there and rounded once: with or without
    instructions for it. Without them PyTorch's own bfloat16 product is some fifty times slower than this.
    """
    if not emulated(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
