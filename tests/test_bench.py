"""The benchmarks run as docs/benchmarks.md says; how fast is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize(
    "command",
    [
        ["startup.py", "--times", "1"],
        ["generate.py", "--batch", "2", "--times", "1"],
        ["data.py", "--mb", "1", "--times", "1"],
        ["compare.py", "--rows", "1", "--times", "1"],
        ["stage_step.py", "--stage", "sft", "--times", "1"],
        ["stage_step.py", "--stage", "reward", "--times", "1"],
        ["stage_step.py", "--stage", "ppo", "--times", "1"],
    ],
    ids=" ".join,
)
def test_each_benchmark_prints_one_json_line(command: list[str]) -> None:
    script, *options = command
    done = subprocess.run(
        [sys.executable, BENCH / script, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bench"] == script.removesuffix(".py")


def test_a_training_step_is_timed_beside_the_machines_own_rate() -> None:
    command = [sys.executable, BENCH / "train_step.py", "--shape", "S", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["fraction_of_matmul"] < 1
    assert found["tokens_per_second"] * found["seconds"]["median"] == pytest.approx(16 * 256)
