"""The benchmarks run as docs/benchmarks.md says; how fast is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def test_a_training_step_is_timed_beside_the_machines_own_rate() -> None:
    command = [sys.executable, BENCH / "train_step.py", "--shape", "S", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["fraction_of_matmul"] < 1
    assert found["tokens_per_second"] * found["seconds"]["median"] == pytest.approx(16 * 256)
