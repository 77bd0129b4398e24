"""Where a training stands: what its snapshots hold, whose they are, and how it is taken up again."""

import hashlib
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
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

SNAPSHOTS, STABLE = "snapshots", "stable"
# The rules that a training may have of its own when it branches from the stable phase of another.
AFTER_STABLE = ("steps", "warmup_tokens", "decay_tokens", "lr_floor")


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
    """The directory of one training: metrics.jsonl, a line a step, snapshots/, and stable/, the one before the decay.

    `rules` are all settings that decide the result. With the initial weights they are the training's
    identity: a snapshot of another one is refused, and the difference named.
    """

    def __init__(self, directory: Path, optimizer: Optimizer, rules: Mapping[str, Any], ranks: Ranks) -> None:
        self.metrics = directory / "metrics.jsonl"
        self._directory = directory
        self._optimizer, self._ranks = optimizer, ranks
        self.branched = False  # whether `enter` went on from another training
        self._identity = {**rules, "initial weights": _hash_weights(optimizer)}

    def enter(
        self,
        seed: int,
        say: Callable[[str], None],
        branch: Path | None = None,
        stable: range = range(0),
    ) -> State:
        """Set optimizer, random generators and metrics to where the newest snapshot left them; if there is none, to the
        end of the stable phase of the training in `branch`, which has to lie within that of this one, `stable`; or to
        zero."""
        for where in (SNAPSHOTS, STABLE):
            sweep_temporaries(self._directory / where)
        found = snapshot.latest(self._directory / SNAPSHOTS, say)
        if found is not None:
            self._refuse_another(found.meta["identity"])
        elif branch is not None:
            found = self._branch(branch, stable, say)
        else:
            self._clear(say)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 — the generator that libraries draw from
            torch.manual_seed(seed)
            return State()
        state = State(**found.meta["state"])
        self._optimizer.load(found.read_into)
        snapshot.restore_random_states(found.meta["random"], say)
        self._cut_metrics(found.meta["metrics_bytes"], say)
        say(f"{'branching' if self.branched else 'resuming'} after step {state.step}")
        then = _processes(found.meta.get("ranks", 1), found.sharded)
        now = _processes(self._ranks.size, self._optimizer.sharded)
        if then != now:
            say(
                f"it was saved by {then}; it goes on with {now}: from here on the same up to the rounding of sums"
            )
        return state

    def save(self, state: State, where: str = SNAPSHOTS) -> None:
        """By the leader; by all ranks together, where the optimizer is sharded."""
        if not self._ranks.leader:
            snapshot.help_save(self._directory / where, self._optimizer.tensors(), self._ranks)
            return
        sync(self.metrics)
        meta = {
            "identity": self._identity,
            "state": asdict(state),
            "random": snapshot.random_states(),
            "ranks": self._ranks.size,
            "metrics_bytes": self.metrics.stat().st_size,
        }
        snapshot.save(self._directory / where, state.step, self._optimizer.tensors(), meta, self._ranks)

    def _branch(self, other: Path, stable: range, say: Callable[[str], None]) -> snapshot.Snapshot:
        """The end of another training's stable phase, and the metrics up to there."""
        found = snapshot.latest(other / STABLE, say)
        if found is None:
            raise UserError(
                f"{other} holds no whole snapshot of a stable phase: there is nothing to branch from."
            )
        if changes := self._changes(found.meta["identity"], AFTER_STABLE):
            raise UserError(
                f"the training in {other} is another one before its decay: {'; '.join(changes)}. To branch from it, "
                "write the old values into the recipe."
            )
        refuse_outside(found.step, stable, other)
        self.branched = True
        if self._ranks.leader:
            self._clear(say)
            if (other / self.metrics.name).exists():
                shutil.copyfile(other / self.metrics.name, self.metrics)
        return found

    def _clear(self, say: Callable[[str], None]) -> None:
        """Remove what a training left that has no snapshot. Its stable state is not gone on from: it may be that of
        another training, or of a branch, of which its identity says nothing."""
        self.metrics.unlink(missing_ok=True)
        if (stable := self._directory / STABLE).exists():
            say(f"{stable} is removed: it is of a training that left no snapshot")
            shutil.rmtree(stable, ignore_errors=True)

    def _refuse_another(self, then: Mapping[str, Any]) -> None:
        if changes := self._changes(then):
            raise UserError(
                f"{self._directory} holds a training that was begun otherwise: {'; '.join(changes)}. "
                "Go back to what it was begun with, or remove the directory to start anew."
            )

    def _changes(self, then: Mapping[str, Any], but: Sequence[str] = ()) -> list[str]:
        now = self._identity
        return [
            f"{key} was {then.get(key)} and is {now.get(key)}"
            for key in sorted(then.keys() | now.keys())
            if key not in but and then.get(key) != now.get(key)
        ]

    def _cut_metrics(self, size: int, say: Callable[[str], None]) -> None:
        """Remove the lines of steps after the snapshot: these steps are done again."""
        if not self.metrics.exists() or self.metrics.stat().st_size < size:
            say(f"{self.metrics} has lost lines from before the snapshot; training goes on without them")
            self.metrics.touch()
            return
        with self.metrics.open("r+b") as file:
            file.truncate(size)


def refuse_outside(step: int, stable: range, other: Path) -> None:
    """Raises UserError where the stable phase of the training in `other`, whose end `step` is, ends outside `stable`,
    which is that of the training that would go on from there."""
    if step in stable:
        return
    if not stable:
        phase, remedy = "never is", "a shorter `warmup` and `decay`"
    else:
        phase = f"is from step {stable[0]} to {stable[-1]}"
        remedy = "a shorter `warmup`" if step < stable[0] else "more `tokens` or a shorter `decay`"
    raise UserError(
        f"the training in {other} was stable up to step {step}, and this one {phase}: the rate that it wants there is "
        f"another. Give it {remedy}."
    )


def _processes(ranks: int, sharded: bool) -> str:
    return f"{ranks} process{'es' if ranks > 1 else ''}{', sharded' if sharded else ''}"


def _hash_weights(optimizer: Optimizer) -> str:
    digest = hashlib.sha256()
    for name, master in optimizer.masters.items():
        digest.update(f"{name} {master.dtype} {tuple(master.shape)} {optimizer.scales[name]}\n".encode())
        digest.update(whole(master.detach()).cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
