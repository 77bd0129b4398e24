"""Compiles `rowwise.cpp` for this processor, once, and loads it. Without a compiler plain PyTorch does its work.

PyTorch has no fused CPU kernels for what a decoder does row by row, and where matrix products are fast a small model
spends half its time there. The file is compiled by g++ into the user's cache, which takes a second or two.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.files import atomic_directory, hash_json, sha256_file

SOURCE = Path(__file__).with_name("rowwise.cpp")
LIBRARY = "rowwise.so"
PARTS = 16  # rows of the partial sums that `rowwise.cpp` makes of a weight's gradient

_pointer, _float, _long, _bool = ctypes.c_void_p, ctypes.c_float, ctypes.c_long, ctypes.c_bool
_FUNCTIONS = {
    "rms_norm": (*[_pointer] * 2, _float, _long, _long, *[_pointer] * 2),
    "rms_norm_backward": (*[_pointer] * 4, _long, _long, *[_pointer] * 2),
    "norm_rotate": (*[_pointer] * 2, _float, *[_pointer] * 2, *[_long] * 5, *[_pointer] * 2),
    "norm_rotate_backward": (*[_pointer] * 6, *[_long] * 5, *[_pointer] * 2),
    "swiglu": (*[_pointer] * 2, _long, _pointer),
    "swiglu_backward": (*[_pointer] * 3, _long, *[_pointer] * 2),
    "attention_weights": (_pointer, _float, _pointer, *[_long] * 6),
    "attention_weights_backward": (_pointer, _pointer, _float, *[_long] * 4),
    "cross_entropy": (_pointer, _pointer, _bool, _long, _long, _pointer),
}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Built(NamedTuple):
    library: ctypes.CDLL | None
    words: str  # for people: what compiled it, or why there is none


def takes(*tensors: Tensor) -> bool:
    """Whether these tensors, alike in dtype, are what the library works on, and there is a library."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(t.dtype is not dtype or t.device.type != "cpu" for t in tensors):
        return False
    return built().library is not None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """A function of the library for this dtype. Tensors have to be contiguous; None is a null pointer."""
    for argument in arguments:
        if isinstance(argument, Tensor) and not argument.is_contiguous():
            raise ValueError(f"{name}: a strided tensor")
    getattr(built().library, f"{name}_{DTYPES[dtype]}")(
        *(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    )


@functools.cache
def built() -> Built:
    """The library, compiled if this source and processor come for the first time, or if what is kept is damaged."""
    compiler = shutil.which("g++")
    if compiler is None:
        return Built(None, "not compiled: there is no g++")
    try:
        version = _run(compiler, "-dumpfullversion").strip()
        kept = _cache() / f"rowwise-{_key(version)}"
        if not _whole(kept):
            shutil.rmtree(kept, ignore_errors=True)
            _compile(compiler, kept)
        library = ctypes.CDLL(str(kept / LIBRARY), mode=os.RTLD_NOW)
        for name, arguments in _FUNCTIONS.items():
            for dtype in DTYPES.values():
                function = getattr(library, f"{name}_{dtype}")
                function.argtypes, function.restype = arguments, None
    except (OSError, RuntimeError, AttributeError, UserError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Built(None, f"not compiled: {said[-1] if said else error}")
    return Built(library, f"compiled by g++ {version}")


def _cache() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "unmask"


def _key(version: str) -> str:
    """Of everything that decides the library: another source, flag, compiler or processor has another one."""
    told = [SOURCE.read_text("utf-8"), *_flags(), version, platform.machine(), _processor()]
    return hash_json(told)[:16]


def _whole(kept: Path) -> bool:
    """Whether a library is there, is what was compiled, and is ours: it will be run."""
    try:
        said = (kept / "sha256").read_bytes()
        return kept.stat().st_uid == os.getuid() and sha256_file(kept / LIBRARY).encode() == said
    except OSError:
        return False


def _compile(compiler: str, kept: Path) -> None:
    try:
        with atomic_directory(kept) as work:
            _run(compiler, *_flags(), "-fopenmp", "-fPIC", "-c", str(SOURCE), "-o", str(work / "rowwise.o"))
            # Linked without OpenMP: it is to find the one that PyTorch has loaded. Two of them would each start
            # threads for every core, which then wait for one another.
            _run(compiler, "-shared", str(work / "rowwise.o"), "-o", str(work / LIBRARY))
            (work / "sha256").write_text(sha256_file(work / LIBRARY), "utf-8")
    except UserError:
        if not _whole(kept):  # else another process was faster
            raise


def _flags() -> tuple[str, ...]:
    wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
    return ("-std=c++17", "-O3", "-march=native", *wide, "-fno-math-errno", "-fno-trapping-math")


def _processor() -> str:
    """What -march=native goes by, where Linux says it: a cache may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
