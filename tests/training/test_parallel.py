"""Two processes that train one model, as torchrun starts them (gloo): the same training as one process's."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.files import read_json_lines
from unmask.training.parallel import Ranks, _buckets

SCRIPT = Path(__file__).with_name("ranks.py")
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def trained(
    directory: Path, ranks: int, micro: int = 1, fate: str = ""
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The process, and how many seconds it took."""
    directory.mkdir(exist_ok=True)
    launch = (
        [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    )
    command = [sys.executable, *launch, str(SCRIPT), str(directory), str(micro), fate]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **ENVIRONMENT}
    )
    return done, time.monotonic() - began


def state(directory: Path, rank: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(directory / f"rank_{rank}.pt", weights_only=True)
    return found


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_json_lines(directory / "metrics.jsonl")]


def finished(directory: Path, ranks: int) -> Path:
    done, _ = trained(directory, ranks)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("together"), 2)


def assert_near(ours: Path, theirs: Path) -> None:
    """Equal up to the rounding of sums in float64."""
    for a, b in zip(metrics(ours), metrics(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    for name, tensor in state(ours).items():
        torch.testing.assert_close(tensor, state(theirs)[name], rtol=1e-6, atol=1e-9)


def test_two_ranks_are_the_same_training_as_one_and_equal_each_other_bit_for_bit(
    alone: Path, together: Path
) -> None:
    """Micro-batches of one row: two of eight count nothing, and the ranks' counts differ."""
    assert_near(together, alone)
    for name, tensor in state(together, 1).items():
        assert torch.equal(tensor, state(together, 0)[name]), name


def test_a_rank_without_a_micro_batch_takes_part(alone: Path, tmp_path: Path) -> None:
    done, _ = trained(tmp_path, 2, micro=8)
    assert done.returncode == 0, done.stderr
    assert_near(tmp_path, alone)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    done, _ = trained(tmp_path, 2, fate="nan")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path) if line.get("skipped")] == [4]
    assert all(torch.equal(tensor, state(tmp_path, 1)[name]) for name, tensor in state(tmp_path).items())


def test_a_killed_rank_ends_all_within_half_a_minute_by_name_and_a_restart_goes_on_bit_for_bit(
    together: Path, tmp_path: Path
) -> None:
    done, seconds = trained(tmp_path, 2, fate="killed")
    assert done.returncode != 0
    assert seconds < 30
    assert "rank      : 1" in done.stderr and "SIGKILL" in done.stderr  # torchrun's report
    assert "rank 0 has lost another one" in done.stderr
    done, _ = trained(tmp_path, 2, fate="killed")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stderr
    assert metrics(tmp_path) == metrics(together)
    assert all(torch.equal(tensor, state(together)[name]) for name, tensor in state(tmp_path).items())


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_another_number_of_ranks_may_go_on(
    alone: Path, tmp_path: Path
) -> None:
    done, _ = trained(tmp_path, 2, fate="stopped")
    assert done.returncode != 0
    assert len(metrics(tmp_path)) == 4
    done, _ = trained(tmp_path, 1, fate="stopped")
    assert done.returncode == 0, done.stderr
    assert "saved by 2 processes and goes on with 1" in done.stderr
    assert_near(tmp_path, alone)


def test_micro_batches_are_dealt_out_once_each() -> None:
    batches = list(range(7))
    shares = [Ranks(rank, 3).share(batches) for rank in range(3)]
    assert sorted(batch for share in shares for batch in share) == batches


def test_buckets_keep_the_order_and_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.training.parallel._BUCKET", 5)
    sizes = [[len(t) for t in bucket] for bucket in _buckets([torch.zeros(n) for n in (2, 3, 1, 9, 2)])]
    assert sizes == [[2, 3], [1], [9], [2]]
