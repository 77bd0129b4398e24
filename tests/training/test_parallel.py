"""Two processes that train one model, as torchrun starts them (gloo): the same training as one process's."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmask.files import read_json_lines
from unmask.training import pulse, snapshot
from unmask.training.parallel import Ranks, _buckets

SCRIPT = Path(__file__).with_name("ranks.py")
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def trained(directory: Path, ranks: int, **asked: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """The process, and how many seconds it took; `asked` is what ranks.py understands."""
    began = time.monotonic()
    process = started(directory, ranks, **asked)
    out, error = process.communicate(timeout=120)
    seconds = time.monotonic() - began
    return subprocess.CompletedProcess(process.args, process.returncode, out, error), seconds


def started(directory: Path, ranks: int, **asked: Any) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    launch = (
        [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    )
    command = [sys.executable, *launch, str(SCRIPT), json.dumps({"directory": str(directory), **asked})]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def state(directory: Path, rank: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(directory / f"rank_{rank}.pt", weights_only=True)
    return found


def told(directory: Path, rank: int = 0) -> dict[str, int]:
    """Master numbers that a rank held, and how often it added up sharded gradients with the others."""
    words: dict[str, int] = json.loads((directory / f"rank_{rank}.json").read_text())
    return words


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0} for line in read_json_lines(directory / "metrics.jsonl")]


def said(directory: Path, ranks: int, **asked: Any) -> str:
    """On the way to the end."""
    done, _ = trained(directory, ranks, **asked)
    assert done.returncode == 0, done.stderr
    return done.stderr


def finished(directory: Path, ranks: int, **asked: Any) -> Path:
    said(directory, ranks, **asked)
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("together"), 2)


def assert_near(ours: Path, theirs: Path) -> None:
    """Equal up to the rounding of sums in float64, in the masters, the optimizer's state and the model itself."""
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
    assert_near(finished(tmp_path, 2, micro=8), alone)
    assert all(torch.equal(tensor, state(tmp_path, 1)[name]) for name, tensor in state(tmp_path).items())


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    finished(tmp_path, 2, fate="nan")
    assert [line["step"] for line in metrics(tmp_path) if line.get("skipped")] == [4]
    assert all(torch.equal(tensor, state(tmp_path, 1)[name]) for name, tensor in state(tmp_path).items())


def test_ranks_whose_batches_differ_end_before_they_take_that_step(tmp_path: Path) -> None:
    done, _ = trained(tmp_path, 2, fate="strays")
    assert done.returncode != 0
    assert "ranks 0 and 1 have different batches: they count {'tokens': 24} and {'tokens': 9}" in done.stderr
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


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


@pytest.mark.parametrize("struck", [1, 0], ids=["another", "the one that holds the store"])
def test_a_rank_that_stands_still_is_noticed_by_name_and_a_restart_goes_on(
    struck: int, together: Path, tmp_path: Path
) -> None:
    """Here after 4 s. torchrun waits half a minute for one that is stopped: the test kills it."""
    asked = {"fate": "hung", "struck": struck, "silence": 4}
    process = started(tmp_path, 2, **asked)
    assert process.stderr is not None
    assert any(f"rank {struck} has given no sign of life for 4 s" in line for line in process.stderr)
    stopped = float((tmp_path / "fate").stat().st_mtime)
    assert time.time() - stopped < 7
    os.kill(int((tmp_path / "fate").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    finished(tmp_path, 2, **asked)
    assert metrics(tmp_path) == metrics(together)


def test_it_is_noticed_within_half_a_minute() -> None:
    """After the last beat that was seen, silence; then the beat at which that is too long."""
    assert pulse.SILENCE + 2 * pulse.BEAT < 30


def test_a_step_may_take_longer_than_a_rank_may_be_silent(together: Path, tmp_path: Path) -> None:
    finished(tmp_path, 2, fate="slow", silence=4)
    assert metrics(tmp_path) == metrics(together)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which rank a process is")
def test_a_pause_of_all_ranks_is_no_silence_of_one(together: Path, tmp_path: Path) -> None:
    """As `scontrol suspend` makes it, or a machine that is moved. Who looks is stopped last and wakes first."""
    process = started(tmp_path, 2, fate="slow", silence=4)
    lines = tmp_path / "metrics.jsonl"
    while not (lines.exists() and len(metrics(tmp_path)) == 3) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)  # both are in the fourth step, which is slow
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    ranks = {
        b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes(): int(pid) for pid in listed.stdout.split()
    }
    leader, other = ranks[True], ranks[False]
    for pid, sent, seconds in (
        (other, signal.SIGSTOP, 2.5),
        (leader, signal.SIGSTOP, 4.0),
        (leader, signal.SIGCONT, 0.5),
        (other, signal.SIGCONT, 0.0),
    ):
        os.kill(pid, sent)
        time.sleep(seconds)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert metrics(tmp_path) == metrics(together)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_another_number_of_ranks_may_go_on(
    alone: Path, tmp_path: Path
) -> None:
    done, _ = trained(tmp_path, 2, fate="stopped", snapshot_seconds=1e9)
    assert done.returncode != 0
    assert all(f"rank {rank} says: toy: stopped after step 4 of 8, saved" in done.stderr for rank in (0, 1))
    assert len(metrics(tmp_path)) == 4
    done, _ = trained(tmp_path, 1, fate="stopped")
    assert done.returncode == 0, done.stderr
    assert "saved by 2 processes; it goes on with 1 process:" in done.stderr
    assert_near(tmp_path, alone)


# Sharded over the ranks

UNEVEN = {"micro": 3}  # three micro-batches of a step: two for rank 0, one for rank 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("whole"), 1, model="tied", muon=True, **UNEVEN)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("sharded"), 2, model="tied", muon=True, sharded=True, **UNEVEN)


def test_a_sharded_training_is_the_same_as_a_whole_one(whole: Path, sharded: Path) -> None:
    assert_near(sharded, whole)


@pytest.mark.parametrize(
    "asked",
    [
        {"model": "tied", **UNEVEN},
        {"model": "untied", "muon": True, "recompute": True, **UNEVEN},
        {"model": "scorer", "muon": True, "micro": 8},
    ],
    ids=["adamw", "untied and recomputed", "a scorer, and a rank that has nothing to do"],
)
def test_so_are_other_models_and_rules(asked: dict[str, Any], tmp_path: Path) -> None:
    finished(tmp_path / "whole", 1, **asked)
    finished(tmp_path / "sharded", 2, sharded=True, **asked)
    assert_near(tmp_path / "sharded", tmp_path / "whole")


def test_in_bfloat16_sharded_ranks_lose_no_more_than_whole_ones(tmp_path: Path) -> None:
    """Both keep float32 masters and add up gradients in float32; sums of other order flip roundings to bfloat16."""
    asked = {"model": "tied", "dtype": "bfloat16", **UNEVEN}
    finished(tmp_path / "whole", 2, **asked)
    finished(tmp_path / "sharded", 2, sharded=True, **asked)
    for a, b in zip(metrics(tmp_path / "sharded"), metrics(tmp_path / "whole"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert {tensor.dtype for tensor in state(tmp_path / "sharded").values()} == {torch.float32}


def test_each_rank_holds_half_of_the_masters(whole: Path, sharded: Path) -> None:
    every = told(whole)["held"]
    held = [told(sharded, rank)["held"] for rank in (0, 1)]
    assert sum(held) == every
    assert max(held) <= 0.51 * every


def test_sharded_gradients_are_added_up_once_a_step(sharded: Path) -> None:
    """Of each of two layers, and of what is around them, however many micro-batches a step has."""
    assert told(sharded)["sums"] == 8 * 3


def test_killed_while_sharded_all_end_by_name_and_a_restart_goes_on_bit_for_bit(
    sharded: Path, tmp_path: Path
) -> None:
    asked = {"model": "tied", "muon": True, "sharded": True, "fate": "killed", **UNEVEN}
    done, seconds = trained(tmp_path, 2, **asked)
    assert done.returncode != 0
    assert seconds < 30
    assert "rank      : 1" in done.stderr and "SIGKILL" in done.stderr
    assert "rank 0 has lost another one" in done.stderr
    assert "resuming after step 3" in said(tmp_path, 2, **asked)
    assert metrics(tmp_path) == metrics(sharded)
    assert all(torch.equal(tensor, state(sharded)[name]) for name, tensor in state(tmp_path).items())


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ((2, True), (1, False), "saved by 2 processes, sharded; it goes on with 1 process:"),
        ((2, True), (2, False), "saved by 2 processes, sharded; it goes on with 2 processes:"),
        ((1, False), (2, True), "saved by 1 process; it goes on with 2 processes, sharded:"),
    ],
)
def test_another_number_of_ranks_or_another_way_may_go_on(
    first: tuple[int, bool], then: tuple[int, bool], words: str, whole: Path, tmp_path: Path
) -> None:
    asked = {"model": "tied", "muon": True, "fate": "stopped", **UNEVEN}
    done, _ = trained(tmp_path, first[0], sharded=first[1], **asked)
    assert done.returncode != 0
    assert len(metrics(tmp_path)) == 4
    assert words in said(tmp_path, then[0], sharded=then[1], **asked)
    assert_near(tmp_path, whole)


def test_a_sharded_branch_of_a_sharded_stable_phase_equals_a_whole_training_bit_for_bit(
    sharded: Path, tmp_path: Path
) -> None:
    asked = {"model": "tied", "muon": True, "sharded": True, **UNEVEN}
    trunk = finished(tmp_path / "trunk", 2, keep_stable=True, **asked)
    assert "branching after step 6" in said(tmp_path / "branch", 2, branch=str(trunk), **asked)
    assert metrics(tmp_path / "branch") == metrics(sharded)
    assert all(
        torch.equal(tensor, state(sharded)[name]) for name, tensor in state(tmp_path / "branch").items()
    )


class Trace:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_nothing_of_a_damaged_sharded_snapshot_is_unpickled(name: str, sharded: Path, tmp_path: Path) -> None:
    """A flipped byte is damage; so is a pickle that would do something, unless the manifest speaks for it."""
    snapshots = tmp_path / "snapshots"
    shutil.copytree(sharded / "snapshots", snapshots)
    file, manifest = (snapshots / "step_00000008" / name for name in (f"shards/{name}", "manifest.json"))
    before = file.read_bytes()
    for damaged in (
        before[:-9] + bytes([before[-9] ^ 4]) + before[-8:],
        pickle.dumps(Trace(tmp_path / "trace")),
    ):
        file.write_bytes(damaged)
        heard: list[str] = []
        found = snapshot.latest(snapshots, heard.append)
        assert found is not None
        assert found.step == 7
        assert f"step_00000008 is damaged (shards/{name} is not what its manifest says)" in heard[0]
    tensors = {"master/model.norm.weight": torch.zeros_like(state(sharded)["master/model.norm.weight"])}
    found.read_into(tensors)
    assert tensors["master/model.norm.weight"].abs().min() > 0
    assert not (tmp_path / "trace").exists()
    if name == ".metadata":  # the pickle is one that works
        listed = json.loads(manifest.read_text())
        listed["files"][f"shards/{name}"] = snapshot._fingerprint(file)
        manifest.write_text(json.dumps(listed))
        found = snapshot.latest(snapshots, pytest.fail)
        assert found is not None
        with pytest.raises(BaseException):  # noqa: B017 — torch's own is no Exception
            found.read_into(tensors)
        assert (tmp_path / "trace").exists()


# Parts


def test_micro_batches_are_dealt_out_once_each() -> None:
    batches = list(range(7))
    shares = [Ranks(rank, 3).share(batches) for rank in range(3)]
    assert sorted(batch for share in shares for batch in share) == batches


def test_what_was_dealt_out_is_put_together_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(range(7))
    shares = [Ranks(rank, 3).share(whole) for rank in range(3)]

    def gather(everyone: list[Any], mine: list[int]) -> None:
        everyone[:] = shares

    monkeypatch.setattr("unmask.training.parallel.dist.all_gather_object", gather)
    assert Ranks(1, 3).gathered(shares[1]) == whole


def test_buckets_keep_the_order_and_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.training.parallel._BUCKET", 5)
    sizes = [[len(t) for t in bucket] for bucket in _buckets([torch.zeros(n) for n in (2, 3, 1, 9, 2)])]
    assert sizes == [[2, 3], [1], [9], [2]]
