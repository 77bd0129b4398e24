"""torch.compile, where it helps: on a GPU, for what plain PyTorch does there in many small kernels.

On a CPU it is no faster than `rowwise.cpp` and starts for seconds: nothing is compiled there.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Kinds of input that one function may be compiled for. A batch's rows, tokens and positions each become a size of any
# value once they have been seen to differ; gradients or none, masks or none, and a size of 1 stay apart.
VARIANTS = 64


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as whole graphs, compiled when it is called with something of a new kind."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = VARIANTS
    return torch.compile(function, fullgraph=True)


def compiles(device: torch.device) -> bool:
    """Whether what runs on this device is to be compiled."""
    return device.type == "cuda" and lacking(device) is None


@functools.cache
def lacking(device: torch.device) -> str | None:
    """What a CUDA device would need for torch.compile and has not, in words."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "a GPU of compute capability 7.0 or newer"
    return lacking_here()


def lacking_here() -> str | None:
    """The same of the machine: Triton compiles a C file that includes Python.h for each kernel."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler (gcc)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python.h (the package python3-dev)"
    return None
