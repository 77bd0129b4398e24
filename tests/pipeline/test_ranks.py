"""The whole path by two processes that torchrun starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shrunken import shrunk, unmask

SHARDED = ("pretrain.shard=true", "sft.shard=true", "reward.shard=true")


def by_two_processes(output: Path, *more: str) -> dict[str, Any]:
    """The summary of a run."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "unmask",
    ]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    command = [*launch, *map(str, shrunk(output, *more))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Which layer says what") == 1  # one of them speaks
    told = json.loads(unmask("log", output, "--json").stdout)
    assert told["verified"] is True
    summary: dict[str, Any] = json.loads((output / "summary.json").read_bytes())
    return summary


def test_two_processes_build_a_run_whose_chain_holds_and_sharded_ones_the_same(tmp_path: Path) -> None:
    whole = by_two_processes(tmp_path / "whole")
    assert [stage["metrics"]["ranks"] for stage in whole["stages"]] == [2, 2, 2, 2]
    sharded = by_two_processes(tmp_path / "sharded", *SHARDED)
    for ours, theirs in zip(sharded["stages"], whole["stages"], strict=True):
        if "loss" in theirs["metrics"]:
            assert ours["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=0.01)
