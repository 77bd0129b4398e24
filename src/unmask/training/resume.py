"""Where a training stands: what its snapshots hold, whose they are, and how it is taken up again."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.errors import UserError
from unmask.files import sweep_temporaries, sync
from unmask.training import snapshot
from unmask.training.optimizer import Optimizer
from unmask.training.parallel import Ranks
from unmask.training.shard import whole


@dataclass
class State:
    """What is counted along the way. `seconds` and `peak_bytes` go over all processes that worked on it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class Place:
    """The directory of one training: metrics.jsonl, a line a step, and snapshots/.

    `rules` are all settings that decide the result. With the initial weights they are the training's
    identity: a snapshot of another one is refused, and the difference named.
    """

    def __init__(self, directory: Path, optimizer: Optimizer, rules: Mapping[str, Any]) -> None:
        self.metrics = directory / "metrics.jsonl"
        self._directory, self._snapshots = directory, directory / "snapshots"
        self._optimizer = optimizer
        self._identity = {**rules, "initial weights": _hash_weights(optimizer)}

    def enter(self, seed: int, ranks: Ranks, say: Callable[[str], None]) -> State:
        """Set optimizer, random generators and metrics to where the newest snapshot left them, or to zero."""
        self._ranks = ranks
        sweep_temporaries(self._snapshots)
        found = snapshot.latest(self._snapshots, say)
        if found is None:
            self.metrics.unlink(missing_ok=True)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 — the generator that libraries draw from
            torch.manual_seed(seed)
            return State()
        self._refuse_another(found.meta["identity"])
        state = State(**found.meta["state"])
        self._optimizer.load(found.read_into)
        snapshot.restore_random_states(found.meta["random"], say)
        self._cut_metrics(found.meta["metrics_bytes"], say)
        say(f"resuming after step {state.step}")
        then = _hands(found.meta.get("ranks", 1), found.sharded)
        now = _hands(ranks.size, self._optimizer.sharded)
        if then != now:
            say(
                f"it was saved by {then}; it goes on with {now}: from here on the same up to the rounding of sums"
            )
        return state

    def save(self, state: State) -> None:
        """By the leader; by all ranks together, where the optimizer is sharded."""
        if not self._ranks.leader:
            snapshot.help_save(self._snapshots, self._optimizer.tensors(), self._ranks)
            return
        sync(self.metrics)
        meta = {
            "identity": self._identity,
            "state": asdict(state),
            "random": snapshot.random_states(),
            "ranks": self._ranks.size,
            "metrics_bytes": self.metrics.stat().st_size,
        }
        snapshot.save(self._snapshots, state.step, self._optimizer.tensors(), meta, self._ranks)

    def _refuse_another(self, then: Mapping[str, Any]) -> None:
        now = self._identity
        changes = [
            f"{key} was {then.get(key)} and is {now.get(key)}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if changes:
            raise UserError(
                f"{self._directory} holds a training that was begun otherwise: {'; '.join(changes)}. "
                "Go back to what it was begun with, or remove the directory to start anew."
            )

    def _cut_metrics(self, size: int, say: Callable[[str], None]) -> None:
        """Remove the lines of steps after the snapshot: these steps are done again."""
        if not self.metrics.exists() or self.metrics.stat().st_size < size:
            say(f"{self.metrics} has lost lines from before the snapshot; training goes on without them")
            self.metrics.touch()
            return
        with self.metrics.open("r+b") as file:
            file.truncate(size)


def _hands(ranks: int, sharded: bool) -> str:
    return f"{ranks} process{'es' if ranks > 1 else ''}{', sharded' if sharded else ''}"


def _hash_weights(optimizer: Optimizer) -> str:
    digest = hashlib.sha256()
    for name, master in optimizer.masters.items():
        digest.update(f"{name} {master.dtype} {tuple(master.shape)} {optimizer.scales[name]}\n".encode())
        digest.update(whole(master.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
