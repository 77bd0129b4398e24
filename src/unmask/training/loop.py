"""The one training loop. A stage brings an Objective: its batches, what they count, and their loss."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.errors import Interrupted, UserError
from unmask.files import append_lines, lock, read_json_lines
from unmask.progress import Progress
from unmask.training.machine import keep_large_blocks, peak_memory, reset_peak_memory
from unmask.training.optimizer import Optimizer
from unmask.training.parallel import ALONE, Ranks
from unmask.training.resume import SNAPSHOTS, STABLE, Place, State
from unmask.training.schedule import lr_scale, stable_phase
from unmask.training.signals import stop_on_signal

SNAPSHOT_SECONDS = 120.0
_SNAPSHOTS_SHARE = 0.05  # of the time, which they take at most, or else they come more rarely
_HOPELESS = 10  # steps in a row without a finite loss and gradient, after which nothing mends itself


class Objective(Protocol):
    """What a stage trains on and towards. Batches are a pure function of (weights, step, seed)."""

    @property
    def steps(self) -> int: ...

    @property
    def tokens_per_step(self) -> int:
        """What a step is planned to process; the schedule counts these."""

    @property
    def pause_every(self) -> int:
        """Training can be left and resumed only after a multiple of this many steps (PPO: a rollout's)."""

    @property
    def fingerprint(self) -> str:
        """Names the data, their order, and every setting of this objective."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """The batches of a step, each small enough for memory."""

    def counts(self, batch: Any) -> dict[str, int]:
        """What losses and metrics are divided by, say {"tokens": the number that the loss looks at}."""

    def loss(self, batch: Any, totals: dict[str, int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """This batch's share of the step's loss and metrics: a sum over the batch divided by `totals`.

        `totals` are the counts of the whole step, so that the shares of its batches add up. The loss hangs on
        the parameters even where nothing counts: there it is zero, with zero gradient.
        """

    def tokens(self, batch: Any) -> int:
        """How many tokens the model reads for this batch, for the rate."""


@dataclass(frozen=True)
class Settings:
    warmup_tokens: float
    decay_tokens: float
    lr_floor: float = 0.0
    clip: float = 1.0
    snapshot_seconds: float | None = None  # between two; None: two minutes, or more where saving takes long
    seed: int = 0
    keep_stable: bool = False  # a snapshot from before the decay, for others to branch from
    branch: Path | None = None  # the directory of another training whose stable phase this one goes on from


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float  # before clipping
    tokens: int
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Outcome:
    """A finished training, over all processes that worked on it. `started`: when the first did, UTC."""

    steps: int
    tokens: int
    seconds: float
    peak_bytes: int
    skipped_steps: int  # their loss or gradient was not finite
    metrics: dict[str, dict[str, float]]  # name: {"last": …, "mean": … of the last tenth of the steps}
    started: str


def train(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    settings: Settings,
    directory: Path,
    progress: Progress,
    title: str,
    shown: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train to the end, from the newest snapshot in `directory` or else from `settings.branch`, if any; leave the
    masters in the model.

    `shown` are the objective's metrics that stand beside the progress bar; all of them go to metrics.jsonl. Of several
    `ranks` each is called with the same arguments; the leader alone writes and shows.

    On SIGINT or SIGTERM the loop goes on to the next step where it may pause, saves, and raises Interrupted;
    the same call then goes on from there, and ends as if it had never stopped, bit for bit on a CPU. A step
    without a finite loss and gradient is skipped and counted. Raises UserError after ten of these in a row,
    if the snapshot is of another training, or one to branch from of another stable phase, if another process works in
    `directory`, or if the system refuses to write.
    """
    if objective.steps < 1:
        raise UserError(f"{title}: not one step. Give it more tokens, or make its batches smaller.")
    keep_large_blocks()
    device = next(iter(optimizer.masters.values())).device
    total_tokens = objective.steps * objective.tokens_per_step
    stable = stable_phase(
        objective.steps, objective.tokens_per_step, settings.warmup_tokens, settings.decay_tokens
    )
    last_stable = stable[-1] if stable and settings.keep_stable else None

    with lock(directory) if ranks.leader else nullcontext(), stop_on_signal() as stop, ranks.together():
        place = Place(directory, optimizer, _rules(objective, optimizer, settings), ranks)
        with ranks.leader_first():
            state = place.enter(settings.seed, progress.line, settings.branch, stable)
        if state.step == last_stable:  # where a branch may begin
            _save(place, state, optimizer, ranks, STABLE)
        if place.branched:  # from here on it needs the other training no more
            _save(place, state, optimizer, ranks)
        began, saved, saving = time.monotonic() - state.seconds, time.monotonic(), 0.0
        reset_peak_memory(device)
        model.train()
        with progress.bar(title, total_tokens, done=state.tokens) as bar:
            while state.step < objective.steps:
                middle = (state.step + 0.5) * objective.tokens_per_step
                scale = lr_scale(
                    middle, total_tokens, settings.warmup_tokens, settings.decay_tokens, settings.lr_floor
                )
                with ranks.beating():
                    result = train_step(objective, optimizer, state.step, scale, settings.clip, ranks)

                state.step += 1
                state.tokens += result.tokens
                state.skipped += not result.finite
                state.skipped_in_a_row = 0 if result.finite else state.skipped_in_a_row + 1
                state.seconds = time.monotonic() - began
                state.peak_bytes = max(state.peak_bytes, peak_memory(device))
                if ranks.leader:
                    append_lines(place.metrics, [_metrics_line(state, result, scale)])
                bar.total = state.tokens + (objective.steps - state.step) * objective.tokens_per_step
                bar.advance(result.tokens, loss=result.loss, **{name: result.metrics[name] for name in shown})
                if state.skipped_in_a_row == _HOPELESS:
                    raise UserError(_why_hopeless(title, state, result))

                if state.step == last_stable:
                    _save(place, state, optimizer, ranks, STABLE)
                if state.step % objective.pause_every:
                    continue
                wait = settings.snapshot_seconds
                if wait is None:
                    wait = max(SNAPSHOT_SECONDS, saving / _SNAPSHOTS_SHARE)
                stopping, due = ranks.any(stop.is_set(), time.monotonic() - saved >= wait)
                if stopping or due or state.step == objective.steps:
                    saved = time.monotonic()
                    _save(place, state, optimizer, ranks)
                    saved, saving = time.monotonic(), time.monotonic() - saved
                    if stopping:
                        raise Interrupted(
                            f"{title}: stopped after step {state.step} of {objective.steps}, saved in "
                            f"{directory}. The same command goes on from there."
                        )
    optimizer.restore(model)
    return Outcome(
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        peak_bytes=state.peak_bytes,
        skipped_steps=state.skipped,
        metrics=_summary(place.metrics),
        started=state.started,
    )


def train_step(
    objective: Objective, optimizer: Optimizer, step: int, scale: float, clip: float, ranks: Ranks = ALONE
) -> StepResult:
    """One optimizer step over all its micro-batches, on all ranks, as if they were one batch."""
    batches = objective.micro_batches(step)

    # Count first, over the whole step: a mean of the micro-batches' means would weigh their tokens unequally.
    totals: Counter[str] = Counter()
    for batch in batches:
        totals.update(objective.counts(batch))

    optimizer.zero_grad()
    sums: dict[str, Tensor | float] = {}
    mine = ranks.share(batches)
    # A rank that has one fewer than others still gathers sharded layers with them, for a loss that counts nothing.
    turns = -(-len(batches) // ranks.size) if optimizer.sharded else len(mine)
    for turn in range(turns):
        idle = turn == len(mine)
        loss, metrics = objective.loss(batches[0] if idle else mine[turn], dict(totals))
        optimizer.expect(last=turn + 1 == turns)
        torch.autograd.backward(loss * 0 if idle else loss)
        for name, share in {} if idle else {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + (share.detach() if isinstance(share, Tensor) else share)

    if not optimizer.sharded:
        ranks.add_gradients(optimizer.masters)
    grad_norm = optimizer.clip(clip)
    numbers = {name: float(total) for name, total in sums.items()}  # waits for the device, once a step
    numbers = ranks.add_numbers(numbers, totals)
    result = StepResult(numbers.pop("loss"), grad_norm, sum(map(objective.tokens, batches)), numbers)
    if result.finite:
        optimizer.step(scale)
    return result


def _save(place: Place, state: State, optimizer: Optimizer, ranks: Ranks, where: str = SNAPSHOTS) -> None:
    if optimizer.sharded and not ranks.leader:
        place.save(state, where)
    # The others wait as long as it takes: in the next sum they would not.
    with ranks.leader_first():
        if ranks.leader:
            place.save(state, where)


def _rules(objective: Objective, optimizer: Optimizer, settings: Settings) -> dict[str, Any]:
    """All settings that decide the result, by name."""
    rules = asdict(settings) | asdict(optimizer.settings) | {"precision": optimizer.precision}
    for decides_nothing in ("snapshot_seconds", "keep_stable", "branch"):
        del rules[decides_nothing]
    return rules | {
        "betas": list(optimizer.settings.betas),  # as JSON will give it back
        "data and objective": objective.fingerprint,
        "steps": objective.steps,
        "tokens_per_step": objective.tokens_per_step,
        "pause_every": objective.pause_every,
    }


def _metrics_line(state: State, result: StepResult, scale: float) -> dict[str, Any]:
    numbers = {"loss": result.loss, "lr_scale": scale, "grad_norm": result.grad_norm, **result.metrics}
    line: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3)}
    line |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    return line if result.finite else line | {"skipped": True}


def _why_hopeless(title: str, state: State, result: StepResult) -> str:
    return (
        f"{title}: loss or gradient was not finite for {_HOPELESS} steps in a row, up to step {state.step} "
        f"(loss {result.loss}, gradient norm {result.grad_norm}). Lower the learning rate or mend the data."
    )


def _summary(metrics: Path) -> dict[str, dict[str, float]]:
    """Each metric's last value and its mean over the last tenth of the steps, where it was finite."""
    lines = read_json_lines(metrics)
    values: dict[str, list[float]] = {}
    for line in lines[-math.ceil(len(lines) / 10) :]:
        for name, value in line.items():
            if name not in ("step", "tokens", "seconds", "skipped") and value is not None:
                values.setdefault(name, []).append(value)
    return {name: {"last": seen[-1], "mean": sum(seen) / len(seen)} for name, seen in values.items()}
