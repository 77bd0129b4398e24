"""Snapshots: all that a training run needs to go on bit for bit, in directories that are whole or absent.

    step_00000120/  tensors.safetensors  weights and optimizer state
                    meta.json            scalars and the states of the random generators
                    manifest.json        size and SHA-256 of the other two

Nothing in them is pickled, and nothing is read before its hash is found right.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.errors import UserError
from unmask.files import atomic_directory, canonical_json, sha256_file

FORMAT = 1
_TENSORS, _META, _MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(directory: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the snapshot of `step` and keep it and the one before; whatever fails, that one stays.

    Raises UserError if the system refuses the write (disk full, no permission).
    """
    path = directory / f"step_{step:08d}"
    shutil.rmtree(path, ignore_errors=True)  # there only if it was damaged: else we had resumed from it
    with atomic_directory(path) as temporary:
        _save_tensors(tensors, temporary / _TENSORS)
        (temporary / _META).write_text(canonical_json(meta), "utf-8")
        files = {name: _fingerprint(temporary / name) for name in (_TENSORS, _META)}
        (temporary / _MANIFEST).write_text(canonical_json({"format": FORMAT, "files": files}), "utf-8")
    older = [other for other in _all(directory) if other < path]
    for other in _all(directory):
        if other not in (path, *older[:1]):
            shutil.rmtree(other, ignore_errors=True)


def latest(directory: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest whole snapshot. A damaged one is passed over, and `say` is told."""
    for path in _all(directory):
        damage = _damage(path)
        if damage is None:
            meta = json.loads((path / _META).read_text("utf-8"))
            return Snapshot(int(path.name.removeprefix("step_")), load_file(path / _TENSORS), meta)
        say(f"snapshot {path} is damaged ({damage}); going back to the one before it")
    return None


def random_states() -> dict[str, Any]:
    """The states of the generators of python, numpy, torch and CUDA, as JSON."""
    # The global generator of numpy is the one that libraries draw from.
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def restore_random_states(states: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Set them as they were. Where the number of CUDA devices is another, theirs stay, and `say` is told."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_unhex(states["torch"]))
    before, now = len(states["cuda"]), torch.cuda.device_count()
    if before == now:
        torch.cuda.set_rng_state_all([_unhex(state) for state in states["cuda"]])
    else:
        say(
            f"the snapshot was saved with {before} CUDA devices, here are {now}: not bit for bit the same from here"
        )


def _all(directory: Path) -> list[Path]:
    """The snapshots of a directory, newest first, damaged ones included."""
    return sorted(directory.glob("step_*"), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a snapshot, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        if manifest["format"] > FORMAT:
            raise UserError(
                f"snapshot {path} has format {manifest['format']}, and this unmask reads up to {FORMAT}. "
                "Go on with the newer unmask that wrote it, or remove it."
            )
        for name in (_TENSORS, _META):
            if _fingerprint(path / name) != manifest["files"][name]:
                return f"{name} is not what its manifest says"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        return f"{_MANIFEST} is garbled"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(None, str(error)) from error


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
