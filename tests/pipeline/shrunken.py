"""The recipe `tiny`, shrunken until the whole path takes a minute, and the command as a user runs it."""

import subprocess
import sys
from pathlib import Path

SHRUNK = (
    "depth=2", "context=192", "tokenizer.vocabulary=1024",
    "pretrain.tokens=80_000", "pretrain.batch_tokens=2048", "pretrain.micro_tokens=2048",
    "sft.tokens=40_000", "sft.batch_tokens=2048",
    "reward.tokens=30_000", "reward.batch_tokens=2048",
    "rl.tokens=1024", "rl.answers=16", "rl.answer_tokens=16", "rl.prompt_tokens=128",
    "measure.facts_per_group=12", "measure.heldout_bytes=4000", "measure.pairs=60", "measure.prompts=12",
    "measure.floor_prompts=3", "measure.answer_tokens=16", 'measure.questions=["Hello!"]',
)  # fmt: skip


def unmask(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "unmask.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def shrunk(output: Path, *more: str) -> list[str | Path]:
    """Arguments that run the shrunken recipe into `output`."""
    overrides = [argument for override in (*SHRUNK, *more) for argument in ("--set", override)]
    return ["run", "tiny", "--output", output, *overrides]
