"""The training loop: what a step computes, and that nothing that happens on the way changes the result."""

import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import LENGTH, RATES, ROWS, SETTINGS, Net, Toy, in_a_process, random_toy, run

from unmask.errors import Interrupted, UserError
from unmask.files import lock, read_json_lines
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.progress import Progress
from unmask.training import loop, snapshot
from unmask.training.loop import Settings, train, train_step
from unmask.training.optimizer import Optimizer, OptimizerSettings
from unmask.training.resume import Place, State
from unmask.training.signals import end_in_peace, stop_on_signal


def series(directory: Path) -> list[dict[str, Any]]:
    """The metrics file without its clock."""
    lines = read_json_lines(directory / "metrics.jsonl")
    return [{name: line[name] for name in line if name != "seconds"} for line in lines]


def assert_same_training(a: tuple[Path, Optimizer], b: tuple[Path, Optimizer]) -> None:
    """Bit for bit: weights, optimizer state, every line of metrics."""
    ours, theirs = a[1].tensors(), b[1].tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert series(a[0]) == series(b[0])


RARE = replace(SETTINGS, snapshot_seconds=1e9)


# A step


@pytest.mark.parametrize("rates", [RATES, replace(RATES, matrix_lr=None)], ids=["muon", "adamw"])
def test_micro_batches_do_not_change_a_step(rates: OptimizerSettings) -> None:
    """(8 rows, 1 micro-batch) and (1 row, 8 micro-batches, two of them empty) are the same training."""
    results = []
    for micro in (8, 1):
        toy = Toy(Net().double(), micro=micro)
        optimizer = Optimizer(toy.net, rates, torch.float64)
        results.append([train_step(toy, optimizer, step, 1.0, 1.0) for step in range(6)])
    for whole, parts in zip(*results, strict=True):
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
        assert parts.metrics == pytest.approx(whole.metrics, rel=1e-6)
        assert parts.tokens == whole.tokens == ROWS * LENGTH


def test_the_loss_is_the_mean_over_all_counted_tokens_of_the_step() -> None:
    toy = Toy(Net(), micro=2)
    ids, counted = toy.rows(0)
    expected = F.cross_entropy(toy.net(ids[:, :-1])[counted], ids[:, 1:][counted]).item()
    result = train_step(toy, Optimizer(toy.net, RATES), 0, 1.0, 1.0)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.metrics["nats"] == pytest.approx(expected, rel=1e-5)


def test_a_micro_batch_in_which_nothing_counts_has_no_gradient() -> None:
    toy = Toy(Net(), micro=1)
    optimizer = Optimizer(toy.net, RATES)
    empty = toy.micro_batches(0)[0]
    assert toy.counts(empty) == {"tokens": 0}
    loss, _ = toy.loss(empty, {"tokens": 24})
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert all(
        torch.equal(master.grad, torch.zeros_like(master))
        for master in optimizer.masters.values()
        if master.grad is not None
    )


def test_metrics_have_a_line_a_step_with_tokens_rate_and_norm(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, Toy(Net()))
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [48 * n for n in range(1, 7)]
    assert [line["lr_scale"] for line in lines] == pytest.approx([0.25, 0.75, 1, 1, 0.75, 0.25])
    assert all(line["grad_norm"] > 0 and line["nats"] == pytest.approx(line["loss"]) for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert (outcome.steps, outcome.tokens, outcome.skipped_steps) == (6, 288, 0)
    assert outcome.metrics["loss"] == {"last": lines[-1]["loss"], "mean": lines[-1]["loss"]}
    assert outcome.seconds == pytest.approx(seconds[-1], abs=1e-3)
    assert outcome.peak_bytes > 50 << 20


def test_training_learns(tmp_path: Path) -> None:
    class Same(Toy):
        def rows(self, step: int) -> tuple[Tensor, Tensor]:
            return super().rows(0)

    run(tmp_path, Same(Net(), steps=40), RARE)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


class NextToken:
    """The decoder on rows of one period, in halves: what a stage does, in short."""

    steps, tokens_per_step, pause_every, fingerprint = 12, 64, 1, "periods"

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def micro_batches(self, step: int) -> Sequence[Tensor]:
        starts = torch.arange(4)[:, None] + step
        return ((starts + torch.arange(17)) % 8 * 7).split(2)

    def counts(self, batch: Tensor) -> dict[str, int]:
        return {"tokens": batch[:, 1:].numel()}

    def loss(self, batch: Tensor, totals: dict[str, int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        hidden = self.model.hidden(batch[:, :-1]).flatten(0, 1)
        return cross_entropy_sum(hidden, self.model.head, batch[:, 1:].flatten()) / totals["tokens"], {}

    def tokens(self, batch: Tensor) -> int:
        return batch[:, 1:].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_trains_from_ln_v_and_keeps_float32_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Decoder(ModelConfig.from_depth(2, vocabulary=64, context=16))
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = Optimizer(model, RATES, dtype)
    settings = replace(SETTINGS, warmup_tokens=0, snapshot_seconds=1e9)
    outcome = train(model, NextToken(model), optimizer, settings, tmp_path, Progress(quiet=True), "base")
    losses = [line["loss"] for line in read_json_lines(tmp_path / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(64), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]
    assert outcome.metrics["loss"]["last"] == losses[-1]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, optimizer.masters["model.embed_tokens.weight"])


# Steps that are not finite


class Poisoned(Toy):
    poison: frozenset[int] = frozenset()
    in_gradient_only = False

    def loss(
        self, batch: tuple[Tensor, Tensor], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, metrics = super().loss(batch, totals)
        if self.seen[-1] in self.poison:
            loss = loss + (0 * loss).sqrt() if self.in_gradient_only else loss * float("nan")
        return loss, metrics


@pytest.mark.parametrize("in_gradient_only", [False, True])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(
    tmp_path: Path, in_gradient_only: bool
) -> None:
    toy = Poisoned(Net())
    toy.poison, toy.in_gradient_only = frozenset({2, 4}), in_gradient_only
    outcome, optimizer = run(tmp_path, toy)
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    assert outcome.skipped_steps == 2
    assert [line["step"] for line in lines if line.get("skipped")] == [3, 5]
    assert lines[2]["loss" if not in_gradient_only else "grad_norm"] is None
    assert all(master.isfinite().all() for master in optimizer.masters.values())


def test_a_skipped_step_changes_neither_weights_nor_optimizer_state() -> None:
    toy = Poisoned(Net())
    optimizer = Optimizer(toy.net, RATES)
    train_step(toy, optimizer, 0, 1.0, 1.0)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    toy.poison = frozenset({1})
    assert not train_step(toy, optimizer, 1, 1.0, 1.0).finite
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.tensors().items())


def test_ten_such_steps_in_a_row_are_an_error_and_nine_are_not(tmp_path: Path) -> None:
    toy = Poisoned(Net(), steps=30)
    toy.poison = frozenset({*range(2, 11), *range(12, 22)})
    with pytest.raises(UserError, match=r"10 steps in a row, up to step 22 .*learning rate"):
        run(tmp_path, toy)


# Being stopped and going on


class Signalled(Toy):
    """Raises a signal while it makes the batches of one step."""

    at: int = -1
    which: int = signal.SIGTERM

    def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        if step == self.at:
            signal.raise_signal(self.which)
        return super().micro_batches(step)


@pytest.mark.parametrize("rates", [RATES, replace(RATES, matrix_lr=None)], ids=["muon", "adamw"])
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_stopping_and_resuming_equals_never_stopping_bit_for_bit(
    tmp_path: Path, which: int, rates: OptimizerSettings
) -> None:
    unbroken = run(tmp_path / "a", Toy(Net(dropout=0.1), steps=8, draws=True), rates=rates)
    first = Signalled(Net(dropout=0.1), steps=8, draws=True)
    first.at, first.which = 3, which
    with pytest.raises(Interrupted, match="after step 4 of 8"):
        run(tmp_path / "b", first, RARE, rates)
    assert len(series(tmp_path / "b")) == 4

    torch.manual_seed(99)  # the generators stand elsewhere in the new process
    random.seed(99)
    second = Toy(Net(dropout=0.1), steps=8, draws=True)
    outcome, optimizer = run(tmp_path / "b", second, RARE, rates)
    assert second.seen == [4, 5, 6, 7]
    assert_same_training((tmp_path / "b", optimizer), (tmp_path / "a", unbroken[1]))
    assert outcome.tokens == unbroken[0].tokens
    assert outcome.metrics == unbroken[0].metrics


def test_it_stops_only_where_the_objective_may_pause(tmp_path: Path) -> None:
    toy = Signalled(Net(), steps=12, pause_every=4)
    toy.at = 5
    with pytest.raises(Interrupted, match="after step 8 of 12"):
        run(tmp_path, toy)
    kept = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert kept == ["step_00000004", "step_00000008"]


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first, done = run(tmp_path, Toy(Net()))
    again = Toy(Net())
    second, optimizer = run(tmp_path, again)
    assert again.seen == []
    assert second == first
    assert_same_training((tmp_path, optimizer), (tmp_path, done))
    assert torch.equal(again.net.embed.weight, done.masters["embed.weight"])


def test_lost_metrics_are_told_and_do_not_stop_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Toy(Net()))
    (tmp_path / "metrics.jsonl").unlink()
    toy = Toy(Net())
    optimizer = Optimizer(toy.net, RATES)
    outcome = train(toy.net, toy, optimizer, SETTINGS, tmp_path, Progress(), "toy")
    assert "has lost lines" in capsys.readouterr().err
    assert outcome.metrics == {}


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    class Twice(Toy):
        def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
            signal.raise_signal(signal.SIGINT)
            return super().micro_batches(step)

    toy = Twice(Net(), pause_every=100)
    # Whoever runs the tests in the background of a shell hands on that Ctrl-C is to be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, toy)
        assert toy.seen == [0]  # the second step had not begun
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_rank_that_is_about_to_say_why_it_ends_is_not_ended_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with stop_on_signal():
            end_in_peace()
        # It is torchrun's signal, which has seen as well that another is lost.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_stopped_process_took_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second; the first process is the larger one, and is stopped after four of eight."""
    clock, resident = [0.0], [7]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop, "peak_memory", lambda device: resident[0])

    class Slow(Signalled):
        def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
            clock[0] += 1
            return super().micro_batches(step)

    first = Slow(Net(), steps=8)
    first.at = 3
    with pytest.raises(Interrupted):
        run(tmp_path, first, RARE)
    clock[0], resident[0] = 1000.0, 3
    outcome, _ = run(tmp_path, Slow(Net(), steps=8), RARE)
    assert (outcome.seconds, outcome.peak_bytes) == (8.0, 7)


def test_a_snapshot_of_another_precision_is_refused(tmp_path: Path) -> None:
    first = Signalled(Net())
    first.at = 2
    with pytest.raises(Interrupted):
        run(tmp_path, first)
    again = Toy(Net())
    rounded = Optimizer(again.net, RATES, torch.bfloat16)
    with pytest.raises(UserError, match="precision was float32 and is bfloat16"):
        train(again.net, again, rounded, SETTINGS, tmp_path, Progress(quiet=True), "toy")


def test_a_snapshot_with_other_rates_between_parts_is_refused(tmp_path: Path) -> None:
    """As of the critic beside the policy."""
    first = Signalled(Net())
    first.at = 2
    with pytest.raises(Interrupted):
        run(tmp_path, first)
    again = Toy(Net())
    scaled = Optimizer(again.net, RATES, torch.float32, lambda name: 3.0 if "layers" in name else 1.0)
    with pytest.raises(UserError, match="initial weights"):
        train(again.net, again, scaled, SETTINGS, tmp_path, Progress(quiet=True), "toy")


def test_steps_that_a_stopped_process_skipped_count_too(tmp_path: Path) -> None:
    class Both(Poisoned, Signalled): ...

    first = Both(Net())
    first.poison, first.at = frozenset({1}), 3
    with pytest.raises(Interrupted):
        run(tmp_path, first, RARE)
    assert run(tmp_path, Toy(Net()), RARE)[0].skipped_steps == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path, resumed: bool) -> None:
    if resumed:
        run(tmp_path, Toy(Net()))
    left = [tmp_path / where / ".step_00000003.tmp-999999999-0a0a0a0a" for where in ("snapshots", "stable")]
    for path in left:
        path.mkdir(parents=True)
    run(tmp_path, Toy(Net()))
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(("asked", "expected"), [(None, [120, 330, 540]), (100.0, [100, 210, 320, 430, 540])])
def test_snapshots_that_take_long_come_rarely_unless_it_was_said_how_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: float | None, expected: list[int]
) -> None:
    """Steps of 1 s, snapshots of 10 s: a twentieth of the time is one in 200 s. The last is that of the end."""
    clock, began = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    class Slow(Toy):
        def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
            clock[0] += 1
            return super().micro_batches(step)

    save = Place.save

    def slow(place: Place, state: State, where: str) -> None:
        began.append(clock[0])
        clock[0] += 10
        save(place, state, where)

    monkeypatch.setattr(Place, "save", slow)
    steps = 540 - 10 * (len(expected) - 1)
    run(tmp_path, Slow(Net(), steps=steps), replace(SETTINGS, snapshot_seconds=asked))
    assert began == expected


@pytest.mark.parametrize("change", ["objective", "steps", "clip", "weights"])
def test_a_snapshot_of_another_training_is_refused_and_the_difference_named(
    tmp_path: Path, change: str
) -> None:
    first = Signalled(Net())
    first.at = 2
    with pytest.raises(Interrupted):
        run(tmp_path, first)
    toy, settings, named = Toy(Net()), SETTINGS, "clip was 1.0 and is 0.5"
    if change == "objective":
        toy.fingerprint, named = "other data", "data and objective was toy and is other data"
    elif change == "steps":
        toy.steps, named = 7, "steps was 6 and is 7"
    elif change == "weights":
        torch.nn.init.zeros_(toy.net.layers[0].down.weight)
        named = "initial weights was"
    else:
        settings = replace(SETTINGS, clip=0.5)
    with pytest.raises(UserError, match=named):
        run(tmp_path, toy, settings)
    assert len(series(tmp_path)) == 3  # nothing was touched


# Branching from the end of the stable phase


def whole_steps(warmup: int, decay: int, **changes: Any) -> Settings:
    return replace(
        SETTINGS, warmup_tokens=warmup * ROWS * LENGTH, decay_tokens=decay * ROWS * LENGTH, **changes
    )


@pytest.mark.parametrize(("steps", "decay", "floor"), [(10, 4, 0.0), (7, 3, 0.2), (4, 0, 0.0)])
def test_a_branch_of_the_stable_phase_equals_a_whole_training_with_its_decay_bit_for_bit(
    tmp_path: Path, steps: int, decay: int, floor: float
) -> None:
    run(tmp_path / "trunk", Toy(Net(dropout=0.1), steps=8, draws=True), whole_steps(2, 4, keep_stable=True))
    settings = whole_steps(2, decay, lr_floor=floor)
    whole = run(tmp_path / "whole", Toy(Net(dropout=0.1), steps=steps, draws=True), settings)
    branched = Toy(Net(dropout=0.1), steps=steps, draws=True)
    settings = replace(settings, branch=tmp_path / "trunk")
    outcome, optimizer = run(tmp_path / "branch", branched, settings)
    assert branched.seen == list(range(4, steps))
    assert_same_training((tmp_path / "branch", optimizer), (tmp_path / "whole", whole[1]))
    assert (outcome.steps, outcome.tokens, outcome.metrics) == (steps, whole[0].tokens, whole[0].metrics)


def test_a_branch_that_ends_or_decays_where_it_begins_can_be_branched_in_its_turn(tmp_path: Path) -> None:
    run(tmp_path / "trunk", Toy(Net(), steps=8), whole_steps(2, 4, keep_stable=True))
    whole = run(tmp_path / "whole", Toy(Net(), steps=9), whole_steps(2, 4))
    end = whole_steps(2, 0, branch=tmp_path / "trunk", keep_stable=True)
    run(tmp_path / "end", Toy(Net(), steps=4), end)
    last = Toy(Net(), steps=9)
    _, optimizer = run(tmp_path / "last", last, whole_steps(2, 4, branch=tmp_path / "end"))
    assert last.seen == [4, 5, 6, 7, 8]
    assert_same_training((tmp_path / "last", optimizer), (tmp_path / "whole", whole[1]))


def test_what_names_a_stable_state_is_its_tensors_and_not_when_it_was_saved(tmp_path: Path) -> None:
    """So that a training that is killed after it, and comes by again, is still the same to branch from."""
    for name in ("a", "b"):
        run(tmp_path / name, Toy(Net()), whole_steps(1, 3, keep_stable=True))
    run(tmp_path / "c", Toy(Net()), whole_steps(1, 3, keep_stable=True, clip=0.5))
    a, b, c = (snapshot.stamp(tmp_path / name / "stable") for name in ("a", "b", "c"))
    assert a is not None and c is not None
    assert a == b and a != c
    manifest = tmp_path / "a/stable/step_00000003/manifest.json"
    manifest.write_text("garbled")
    assert snapshot.stamp(tmp_path / "a" / "stable") is None


@pytest.mark.parametrize("branches", [False, True])
def test_a_training_that_begins_anew_leaves_no_stable_state_of_the_one_before(
    tmp_path: Path, branches: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was killed before its first snapshot may have been another."""

    class Killed(Toy):
        def tokens(self, batch: tuple[Tensor, Tensor]) -> int:
            if self.seen[-1] == 4:
                raise InterruptedError
            return super().tokens(batch)

    with pytest.raises(InterruptedError):
        run(tmp_path / "x", Killed(Net()), whole_steps(1, 3, keep_stable=True, snapshot_seconds=1e9))
    assert (tmp_path / "x" / "stable").exists()
    settings = whole_steps(6, 0)
    if branches:
        run(tmp_path / "trunk", Toy(Net()), whole_steps(1, 3, keep_stable=True))
        settings = whole_steps(1, 2, branch=tmp_path / "trunk")
    toy = Toy(Net())
    train(toy.net, toy, Optimizer(toy.net, RATES), settings, tmp_path / "x", Progress(), "toy")
    assert not (tmp_path / "x" / "stable").exists()
    assert f"{tmp_path / 'x' / 'stable'} is removed" in capsys.readouterr().err


def test_a_branch_needs_its_trunk_no_more_once_it_has_begun(tmp_path: Path) -> None:
    run(tmp_path / "trunk", Toy(Net()), whole_steps(1, 3, keep_stable=True))
    settings = whole_steps(1, 4, branch=tmp_path / "trunk", snapshot_seconds=1e9)
    toy = Toy(Net(), steps=10)
    toy.tokens = lambda batch: 1 // 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "branch", toy, settings)
    shutil.rmtree(tmp_path / "trunk")
    second = Toy(Net(), steps=10)
    run(tmp_path / "branch", second, settings)
    assert second.seen[0] == 3


def test_a_branch_goes_on_from_its_own_snapshot_once_it_has_one(tmp_path: Path) -> None:
    run(tmp_path / "trunk", Toy(Net()), whole_steps(1, 3, keep_stable=True))
    settings = whole_steps(1, 4, branch=tmp_path / "trunk", snapshot_seconds=1e9)
    first = Signalled(Net(), steps=10)
    first.at = 5
    with pytest.raises(Interrupted, match="after step 6 of 10"):
        run(tmp_path / "branch", first, settings)
    second = Toy(Net(), steps=10)
    run(tmp_path / "branch", second, settings)
    assert (first.seen, second.seen) == ([3, 4, 5], [6, 7, 8, 9])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clip": 0.5}, "clip was 1.0 and is 0.5"),
        ({"decay_tokens": 5.0 * ROWS * LENGTH}, "stable up to step 3, and this one is from step 1 to 1"),
        ({"decay_tokens": 6.0 * ROWS * LENGTH}, "stable up to step 3, and this one never is"),
        (
            {"warmup_tokens": 4.0 * ROWS * LENGTH, "decay_tokens": 0.0},
            "stable up to step 3, and this one is from step 4 to 6",
        ),
    ],
)
def test_a_branch_of_another_stable_phase_is_refused_and_the_difference_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(tmp_path / "trunk", Toy(Net()), whole_steps(1, 3, keep_stable=True))
    with pytest.raises(UserError, match=named):
        run(tmp_path / "branch", Toy(Net()), replace(whole_steps(1, 3, branch=tmp_path / "trunk"), **change))
    assert not (tmp_path / "branch" / "metrics.jsonl").exists()


def test_without_a_stable_phase_there_is_nothing_to_branch_from(tmp_path: Path) -> None:
    run(tmp_path / "trunk", Toy(Net()), whole_steps(4, 4, keep_stable=True))
    with pytest.raises(UserError, match="nothing to branch from"):
        run(tmp_path / "branch", Toy(Net()), whole_steps(1, 3, branch=tmp_path / "trunk"))


def test_two_processes_cannot_train_in_one_directory(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(UserError, match=f"pid {os.getpid()}.* is working in"):
        run(tmp_path, Toy(Net()))


def test_the_allocator_keeps_its_blocks_from_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    toy = Toy(Net())
    monkeypatch.setattr(loop, "keep_large_blocks", lambda: told.append(len(toy.seen)))
    run(tmp_path, toy)
    assert told == [0]


def test_no_steps_is_an_error() -> None:
    with pytest.raises(UserError, match="not one step"):
        run(Path("/nonexistent"), Toy(Net(), steps=0))


# Faults


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is")
def test_the_metrics_reach_the_disk_before_the_snapshot_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run(tmp_path, Toy(Net(), steps=1))
    assert synced.index("metrics.jsonl") < synced.index("manifest.json")


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system's own way to refuse a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_leaves_the_snapshot_before(tmp_path: Path) -> None:
    first = Signalled(Net(), steps=8)
    first.at = 2
    with pytest.raises(Interrupted):
        run(tmp_path / "b", first)
    with full_disk(after=4096), pytest.raises(UserError, match=r"cannot write .*[Ff]ile too large"):
        run(tmp_path / "b", Toy(Net(), steps=8))
    kept = sorted(path.name for path in (tmp_path / "b" / "snapshots").iterdir())
    assert kept == ["step_00000002", "step_00000003"]
    _, optimizer = run(tmp_path / "b", Toy(Net(), steps=8))
    _, unbroken = run(tmp_path / "a", Toy(Net(), steps=8))
    assert_same_training((tmp_path / "b", optimizer), (tmp_path / "a", unbroken))


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json", "manifest.json"])
def test_a_flipped_byte_in_the_newest_snapshot_sends_it_back_to_the_one_before(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Signalled(Net(), steps=8)
    first.at = 4
    with pytest.raises(Interrupted, match="after step 5"):
        run(tmp_path / "b", first)
    file = tmp_path / "b" / "snapshots" / "step_00000005" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    second = Toy(Net(), steps=8)
    said: list[str] = []
    assert snapshot.latest(file.parent.parent, said.append) is not None
    assert "step_00000005 is damaged" in said[0]
    _, optimizer = run(tmp_path / "b", second)
    assert second.seen == [4, 5, 6, 7]
    _, unbroken = run(tmp_path / "a", Toy(Net(), steps=8))
    assert_same_training((tmp_path / "b", optimizer), (tmp_path / "a", unbroken))


STEPS = 40
PROCESSES = multiprocessing.get_context(
    "forkserver"
)  # imports torch once, has no threads to lose when it forks
PROCESSES.set_forkserver_preload(["toy"])


def start(directory: Path) -> BaseProcess:
    process = PROCESSES.Process(target=in_a_process, args=(directory, STEPS))
    process.start()
    return process


def wait_for(directory: Path, pattern: str, process: BaseProcess) -> None:
    """Until such a file is there; at most until the process ends, or a minute."""
    deadline = time.monotonic() + 60
    while process.is_alive() and not list(directory.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Optimizer]:
    directory = tmp_path_factory.mktemp("unbroken")
    _, optimizer = run(directory, random_toy(STEPS), RARE)
    return directory, optimizer


def test_a_process_stopped_by_sigterm_saves_and_another_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, unbroken: tuple[Path, Optimizer]
) -> None:
    process = start(tmp_path)
    wait_for(tmp_path, "metrics.jsonl", process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 1  # Interrupted, which nobody catches there; -15 would be death by the signal
    stopped_at = len(series(tmp_path))
    assert 0 < stopped_at < STEPS
    toy = random_toy(STEPS)
    _, optimizer = run(tmp_path, toy, RARE)
    assert toy.seen[0] == stopped_at
    assert_same_training((tmp_path, optimizer), unbroken)


def test_kill_9_at_any_moment_loses_at_most_what_followed_the_last_snapshot(
    tmp_path: Path, unbroken: tuple[Path, Optimizer]
) -> None:
    """Killed twice while a snapshot is half written, and twice at random; it saves at every step."""
    saved = 0
    for moment in ("half written", "random") * 2:
        process = start(tmp_path)
        mark = f".step_*.tmp-{process.pid}-*" if moment == "half written" else f"step_{saved + 1:08d}"
        wait_for(tmp_path / "snapshots", mark, process)
        if moment == "random":
            time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)  # 0: it was faster than we
        found = snapshot.latest(tmp_path / "snapshots", say=pytest.fail)
        step = found.step if found else 0
        done = (tmp_path / "metrics.jsonl").read_text().count("\n")
        assert saved <= step, "what was saved stays"
        assert done - step <= 1, "only the step that was being saved is lost"
        saved = step
    toy = random_toy(STEPS)
    _, optimizer = run(tmp_path, toy, RARE)
    assert toy.seen[0] == saved
    assert_same_training((tmp_path, optimizer), unbroken)
    assert not list((tmp_path / "snapshots").glob(".*")), (
        "what the killed processes left half written is gone"
    )
