import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.lineage import Checkpoint, write_checkpoint
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.text.tokenizer import Tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "a model of layers, and what each of them did"] * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def decoder(tokenizer: Tokenizer, seed: int) -> Decoder:
    model = Decoder(ModelConfig.from_depth(1, vocabulary=tokenizer.rows, context=32))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def write(path: Path, tokenizer: Tokenizer, *, seed: int = 0, **fields: Any) -> Checkpoint:
    """A checkpoint with made-up training; the directory's name is the layer's unless told."""
    known: dict[str, Any] = {
        "name": path.name,
        "kind": "sft",
        "parent": None,
        "data": {"addresses": "a" * 64},
        "recipe": {"name": "test", "sft": {"tokens": 1000, "lr": 7e-4}},
        "seed": seed,
        "steps": 10,
        "tokens": 1000,
        "flops": 1.5e9,
        "seconds": 2.5,
        "peak_bytes": 10**8,
        "metrics": {"loss": {"last": 2.5, "mean": 2.6}, "grad_norm": 0.5},
    }
    known["model"] = fields.pop("model", None) or decoder(tokenizer, seed)
    return write_checkpoint(path, tokenizer=tokenizer, **(known | fields))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """base ← sft ← rl, and a reward model that rl was trained with. Written once: tests get copies."""
    path = tmp_path_factory.mktemp("whole")
    base = write(path / "base", tokenizer, kind="pretrain")
    sft = write(path / "sft", tokenizer, seed=1, parent=base)
    judge = Scorer.from_decoder(decoder(tokenizer, 1), torch.Generator().manual_seed(2))
    reward = write(path / "reward", tokenizer, model=judge, kind="reward", parent=sft)
    write(path / "rl", tokenizer, seed=3, kind="ppo", parent=sft, inputs={"reward": reward})
    return path


@pytest.fixture
def run(tmp_path: Path, whole_run: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))
