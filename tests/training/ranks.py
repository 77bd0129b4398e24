"""The toy training as one rank of several: what torchrun starts in test_parallel.py."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from toy import RATES, SETTINGS, Net, Toy

from unmask.errors import Interrupted, UserError
from unmask.progress import Progress
from unmask.training import parallel
from unmask.training.loop import train
from unmask.training.optimizer import Optimizer


@dataclass
class Fated(Toy):
    """Does to one rank, once, what can happen to it when a step begins."""

    fate: str = ""
    at: int = 3

    def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        mark = Path(sys.argv[1]) / "fate"
        sent = {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}.get(self.fate)
        if step == self.at and sent and not mark.exists() and os.environ.get("RANK") == "1":
            mark.touch()
            os.kill(os.getpid(), sent)
        return super().micro_batches(step)

    def loss(
        self, batch: tuple[Tensor, Tensor], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, metrics = super().loss(batch, totals)
        broken = self.fate == "nan" and os.environ.get("RANK") == "1" and self.seen[-1] == self.at
        return loss * torch.nan if broken else loss, metrics


def main() -> None:
    directory, micro, fate = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with parallel.joined("cpu") as (ranks, _):
        toy = Fated(Net().double(), steps=8, micro=micro, fate=fate)
        optimizer = Optimizer(toy.net, replace(RATES, matrix_lr=None), torch.float64)
        train(toy.net, toy, optimizer, SETTINGS, directory, Progress(), "toy", ranks=ranks)
        torch.save(optimizer.tensors(), directory / f"rank_{ranks.rank}.pt")


if __name__ == "__main__":
    try:
        main()
    except (Interrupted, UserError) as error:
        print(f"rank {os.environ.get('RANK')} says: {error}", file=sys.stderr)
        sys.exit(75)
