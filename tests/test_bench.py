"""The benchmarks run as docs/benchmarks.md says; how fast is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize(
    "command",
    [
        ["startup.py", "--times", "1"],
        ["generate.py", "--batch", "2", "--times", "1"],
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


PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), learning_rate)

    def forward(self, ids, targets):
        logits = self.table(ids) @ self.table.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_the_gpu_benchmark_runs_on_a_cpu_too_in_turn_with_a_clone_of_nanogpt(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(PEER, "utf-8")  # what it calls of nanoGPT
    sizes = {"layers": 2, "width": 64, "vocabulary": 128, "length": 32, "rows": 2, "rounds": 2, "steps": 1}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, BENCH / "gpu.py", "--device", "cpu", "--nanogpt-dir", tmp_path, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["fraction_of_matmul"] < 1
    assert found["tokens_per_second"]["unmask"]["n"] == found["to_nanogpt"]["n"] == 2
    assert found["peak_mb"]["unmask"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_benchmark_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nothing is measured: device 'cuda' is not here")
    assert len(done.stdout.splitlines()) == 1
