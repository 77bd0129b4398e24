"""The benchmarks run as docs/benchmarks.md says; how fast is no test."""

import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_what_is_timed_is_a_whole_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` is what others time too: its loss begins at ln V, a mean over tokens, and a step lowers it."""
    monkeypatch.syspath_prepend(str(BENCH))
    model, loss_fn, optimizer = importlib.import_module("train_step").make("S", "fp32")
    ids = torch.randint(4096, (2, 65), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_fn(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4096), rel=0.02)
    assert losses[1] < losses[0]


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


@pytest.mark.parametrize(
    ("script", "option", "file"),
    [
        ("gpu.py", "--nanogpt-dir", "model.py"),
        ("learning.py", "--nanogpt-dir", "model.py"),
        ("learning.py", "--nanochat-dir", "nanochat/gpt.py"),
        ("train_step.py", "--nanogpt-dir", "model.py"),
        ("train_step.py", "--nanochat-dir", "nanochat/gpt.py"),
    ],
)
def test_a_folder_that_is_no_clone_is_refused_in_one_line(
    script: str, option: str, file: str, tmp_path: Path
) -> None:
    command = [sys.executable, BENCH / script, option, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and f"no clone of it: there is no {file}" in done.stderr


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = random.Random(0).choices(
        ["the", "a", "of", "rain", "sun", "falls", "rises", "over", "under", "hill", "sea", "slowly"],
        k=60_000,
    )
    rows = [json.dumps({"text": " ".join(words[start : start + 600])}) for start in range(0, len(words), 600)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows), "utf-8")
    return tmp_path / "text.jsonl"


def run(script: str, *options: str | Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, BENCH / script, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_learning_is_compared_at_equal_wall_time(tmp_path: Path, text: Path) -> None:
    (tmp_path / "model.py").write_text(PEER, "utf-8")
    options = ("--text", text, "--minutes", "0.01", "--rounds", "1", "--vocabulary", "320")
    found = run("learning.py", *options, "--nanogpt-dir", tmp_path)
    assert [(line["model"], line["minutes"]) for line in found] == [("unmask", 0.01), ("nanogpt", 0.02)]
    assert found[0]["above_ours"] == [0, 0, 0]
    low, difference, high = found[1]["above_ours"]
    assert low < difference < high
    assert difference == pytest.approx(found[1]["nats_a_token"] - found[0]["nats_a_token"], abs=1e-4)
    for line in found:
        assert line["steps"] == max(1, round(60 * line["minutes"] / line["seconds_a_step"]))


def test_a_sweep_says_how_far_the_derived_rates_are_from_the_best(text: Path) -> None:
    options = (
        "--text",
        text,
        "--depths",
        "1",
        "--tokens",
        "8192",
        "--factors",
        "0.01",
        "--vocabulary",
        "320",
    )
    *trials, verdict = run("sweep.py", *options)
    derived = [line["nats_a_token"] for line in trials if line["lr"] == trials[0]["lr"]][:3]
    assert len({line["seed"] for line in trials[:3]}) == 3
    assert verdict["derived"] == pytest.approx(sum(derived) / 3)
    slower = [line["nats_a_token"] for line in trials[3:5]]
    assert min(slower) > verdict["derived"]  # of a hundredth of a rate little is learned
    [best] = verdict["best_other"].values()
    assert best == min(line["nats_a_token"] for line in trials[3:])
    assert verdict["derived_above_best"] == pytest.approx(verdict["derived"] - min(best, *derived))
    assert trials[5]["batch_tokens"] == 256  # no less than a row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_benchmark_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nothing is measured: device 'cuda' is not here")
    assert len(done.stdout.splitlines()) == 1


TRL = """
from types import SimpleNamespace

SFTConfig = RewardConfig = SimpleNamespace

class SFTTrainer:
    def __init__(self, *, args, train_dataset, processing_class, callbacks, **model):
        self.callback, self.steps = callbacks[0], len(train_dataset) // args.per_device_train_batch_size
        for row in train_dataset:
            lengths = {name: len(processing_class(text + "</s>")["input_ids"]) for name, text in row.items()}
            assert lengths.pop("prompt") == 33 and set(lengths.values()) == {64}

    def train(self):
        for _ in range(self.steps):
            self.callback.on_step_end()

RewardTrainer = SFTTrainer
"""


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stages_step_is_timed_in_turn_with_trls_on_as_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    (tmp_path / "trl.py").write_text(TRL, "utf-8")  # what is called of TRL
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [found] = run("stage_step.py", "--stage", stage, "--trl", "--times", "2")
    assert found["seconds"]["n"] == found["trl"]["seconds"]["n"] == found["to_trl"]["n"] == 2
    tokens = found["trl"]["tokens_per_second"] * found["trl"]["seconds"]["median"]
    assert tokens == pytest.approx(32 * 96 * (1 if stage == "sft" else 2))
    assert found["to_trl"]["max"] < 1  # the steps of this one do nothing
