"""A small model and objective for the training tests."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.progress import Progress
from unmask.training.loop import Outcome, Settings, train
from unmask.training.optimizer import Optimizer, OptimizerSettings

VOCABULARY, WIDTH, ROWS, LENGTH = 32, 16, 8, 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Net(nn.Module):
    """Predicts a token from the one before; its head is tied, its dropout draws from torch's generator."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = dropout
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.embed(ids_BT)
        for layer in self.layers:
            x = layer(F.dropout(x, self.dropout))
        logits: Tensor = self.head(x)
        return logits


@dataclass
class Toy:
    """Rows of random tokens, of which 0 to LENGTH count: row 0 of every step none, its neighbours few."""

    net: Net
    steps: int = 6
    micro: int = ROWS
    pause_every: int = 1
    fingerprint: str = "toy"
    draws: bool = False  # metrics from the generators of python and numpy
    tokens_per_step: int = ROWS * LENGTH
    seen: list[int] = field(default_factory=list)

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        counted = torch.arange(LENGTH) < torch.tensor([0, 1, 2, 6, 6, 3, 0, 6])[:, None]
        return ids, counted

    def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        self.seen.append(step)
        ids, counted = self.rows(step)
        return list(zip(ids.split(self.micro), counted.split(self.micro), strict=True))

    def counts(self, batch: tuple[Tensor, Tensor]) -> dict[str, int]:
        return {"tokens": int(batch[1].sum())}

    def loss(
        self, batch: tuple[Tensor, Tensor], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        ids, counted = batch
        nats = F.cross_entropy(self.net(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
        loss = (nats * counted).sum() / totals["tokens"]
        metrics: dict[str, Tensor | float] = {"nats": loss}
        if self.draws:
            metrics["draw"] = random.random() + float(np.random.rand())  # noqa: NPY002
        return loss, metrics

    def tokens(self, batch: tuple[Tensor, Tensor]) -> int:
        return batch[1].numel()


SETTINGS = Settings(warmup_tokens=96, decay_tokens=96, clip=1.0, snapshot_seconds=0.0, seed=5)
RATES = OptimizerSettings(lr=0.01, matrix_lr=0.02, weight_decay=0.1)


def run(
    directory: Path, toy: Toy, settings: Settings = SETTINGS, rates: OptimizerSettings = RATES
) -> tuple[Outcome, Optimizer]:
    optimizer = Optimizer(toy.net, rates)
    return train(toy.net, toy, optimizer, settings, directory, Progress(quiet=True), "toy"), optimizer


def random_toy(steps: int) -> Toy:
    """One whose result depends on every generator."""
    return Toy(Net(dropout=0.1), steps=steps, draws=True)


def in_a_process(directory: Path, steps: int) -> None:
    """Train, saving at every step, until the end or the signal."""
    run(directory, random_toy(steps))
