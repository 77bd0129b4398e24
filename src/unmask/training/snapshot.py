"""Snapshots: all that a training run needs to go on bit for bit, in directories that are whole or absent.

    step_00000120/  tensors.safetensors  weights and optimizer state
                    meta.json            scalars and the states of the random generators
                    manifest.json        size and SHA-256 of all other files

Where tensors are sharded over ranks each rank writes its own into shards/ by torch.distributed.checkpoint, and there is
no tensors.safetensors. Those files are pickles, as nothing else of ours is. Nothing is read before its hash is found
right. That guards against damage, not against someone who writes the manifest too: go on with your own runs alone.
"""

import json
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import UserError
from unmask.files import atomic_directory, canonical_json, explained, hash_json, sha256_file
from unmask.training.parallel import Ranks
from unmask.training.shard import sharded, split_like

FORMAT = 1
_TENSORS, _SHARDS, _META, _MANIFEST = "tensors.safetensors", "shards", "meta.json", "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    step: int
    path: Path
    meta: dict[str, Any]

    @property
    def sharded(self) -> bool:
        return (self.path / _SHARDS).is_dir()

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Set these tensors, or the rows of them that this rank has, however they were sharded when they were saved."""
        if self.sharded:
            from torch.distributed.checkpoint.state_dict_loader import load

            # torch warns that no rank waits for another: they need not.
            with warnings.catch_warnings(action="ignore"):
                load(dict(tensors), checkpoint_id=self.path / _SHARDS, no_dist=True)
            return
        with safe_open(self.path / _TENSORS, "pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(split_like(file.get_tensor(name), tensor))


def save(
    directory: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write the snapshot of `step` and keep it and the one before; whatever fails, that one stays.

    The leader calls this; where tensors are sharded, the other ranks `help_save` meanwhile. Raises UserError if the
    system refuses the write (disk full, no permission).
    """
    path = directory / f"step_{step:08d}"
    # There only if it was damaged, or else we had resumed from it; or if it is that of a stable phase, reached anew.
    shutil.rmtree(path, ignore_errors=True)
    with atomic_directory(path) as temporary:
        if any(map(sharded, tensors.values())):
            _save_shards(tensors, Path(ranks.told(str(temporary / _SHARDS))))
        else:
            _save_tensors(tensors, temporary / _TENSORS)
        (temporary / _META).write_text(canonical_json(meta), "utf-8")
        files = {name: _fingerprint(temporary / name) for name in _files(temporary)}
        (temporary / _MANIFEST).write_text(canonical_json({"format": FORMAT, "files": files}), "utf-8")
    older = [other for other in _all(directory) if other < path]
    for other in _all(directory):
        if other not in (path, *older[:1]):
            shutil.rmtree(other, ignore_errors=True)


def help_save(directory: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write this rank's shards where the leader, who is in `save`, wants them."""
    with explained(directory):
        _save_shards(tensors, Path(ranks.told("")))


def latest(directory: Path, say: Callable[[str], None]) -> Snapshot | None:
    """The newest whole snapshot. A damaged one is passed over, and `say` is told."""
    for path in _all(directory):
        damage = _damage(path)
        if damage is None:
            meta = json.loads((path / _META).read_text("utf-8"))
            return Snapshot(_step(path), path, meta)
        say(f"snapshot {path} is damaged ({damage}) and passed over")
    return None


def stamp(directory: Path) -> str | None:
    """A hash of what the newest snapshot's manifest says of weights and optimizer; None if there is none with a
    manifest that can be read. The files themselves are not looked at."""
    for path in _all(directory):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            files = json.loads((path / _MANIFEST).read_text("utf-8"))["files"]
            state = {name: fingerprint for name, fingerprint in files.items() if name != _META}
            return hash_json(state)
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


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _damage(path: Path) -> str | None:
    """What is wrong with a snapshot, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        if manifest["format"] > FORMAT:
            raise UserError(
                f"snapshot {path} has format {manifest['format']}, and this unmask reads up to {FORMAT}. "
                "Go on with the newer unmask that wrote it, or remove it."
            )
        if unknown := {_META, *_files(path)} - manifest["files"].keys():
            return f"{_MANIFEST} does not know {min(unknown)}"
        for name, fingerprint in manifest["files"].items():
            if _fingerprint(path / name) != fingerprint:
                return f"{name} is not what its manifest says"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        return f"{_MANIFEST} is garbled"
    return None


def _files(path: Path) -> list[str]:
    """All that a snapshot's manifest speaks of."""
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in files if name != _MANIFEST)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(None, str(error)) from error


def _save_shards(tensors: Mapping[str, Tensor], directory: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), checkpoint_id=directory)
    except CheckpointException as error:  # no Exception; all ranks get it, whichever failed
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(None, f"rank {rank}: {cause}") from error


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
