"""The whole path by two processes that torchrun starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

from shrunken import shrunk, unmask


def test_two_processes_build_a_run_whose_chain_holds(tmp_path: Path) -> None:
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
    command = [*launch, *map(str, shrunk(tmp_path / "run"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Which layer says what") == 1  # one of them speaks
    told = json.loads(unmask("log", tmp_path / "run", "--json").stdout)
    assert told["verified"] is True
    summary = json.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert [stage["metrics"]["ranks"] for stage in summary["stages"]] == [2, 2, 2, 2]
