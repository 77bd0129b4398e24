"""A toy training as one rank of several: what torchrun starts in test_parallel.py."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import LENGTH, RATES, SETTINGS, VOCABULARY, Net, Toy

from unmask.errors import Interrupted, UserError
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.model.scorer import Scorer
from unmask.progress import Progress
from unmask.training import parallel, pulse
from unmask.training.loop import train
from unmask.training.optimizer import Optimizer
from unmask.training.shard import local, unsharded, whole


@dataclass(frozen=True)
class Asked:
    """What a test wants of the ranks. `fate` comes once, as a step begins, to rank `struck` or to the only process."""

    directory: Path
    model: str = "net"  # or ours: tied, untied, scorer
    micro: int = 1
    fate: str = ""
    struck: int = 1
    silence: float = pulse.SILENCE
    sharded: bool = False
    muon: bool = False
    recompute: bool = False
    keep_stable: bool = False
    snapshot_seconds: float = 0.0
    branch: Path | None = None
    dtype: str = "float64"


@dataclass
class Fated(Toy):
    asked: Asked = Asked(Path())
    at: int = 3

    @property
    def struck(self) -> bool:
        return os.environ.get("RANK") in (None, str(self.asked.struck))

    def micro_batches(self, step: int) -> Sequence[tuple[Tensor, Tensor]]:
        mark = self.asked.directory / "fate"
        sent = {"killed": signal.SIGKILL, "stopped": signal.SIGTERM, "hung": signal.SIGSTOP}
        if step == self.at and self.asked.fate and not mark.exists() and self.struck:
            if self.asked.fate in sent:
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), sent[self.asked.fate])
            if self.asked.fate == "slow":
                time.sleep(2 * pulse.SILENCE)
            if self.asked.fate == "strays":
                return super().micro_batches(step)[1:4]
        return super().micro_batches(step)

    def loss(
        self, batch: tuple[Tensor, Tensor], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, metrics = (
            super().loss(batch, totals) if isinstance(self.net, Net) else self.ours(*batch, totals)
        )
        broken = self.asked.fate == "nan" and self.struck and self.seen[-1] == self.at
        return loss * torch.nan if broken else loss, metrics

    def ours(
        self, ids_BT: Tensor, counted_BT: Tensor, totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """As the stages compute theirs: hidden states and the head apart; of a scorer, that its score be the count."""
        model: Any = self.net
        if isinstance(model, Decoder):
            hidden_ND = model.hidden(ids_BT[:, :-1]).flatten(0, 1)[counted_BT.flatten()]
            loss = cross_entropy_sum(hidden_ND, model.head, ids_BT[:, 1:][counted_BT])
        else:
            loss = (model(ids_BT, counted_BT.sum(1) + 1) - counted_BT.sum(1)).square().sum()
        return loss / totals["tokens"], {"nats": loss / totals["tokens"]}


def network(asked: Asked) -> Any:
    if asked.model == "net":
        return Net()
    config = ModelConfig.from_depth(2, vocabulary=VOCABULARY, context=LENGTH + 1)
    decoder = Decoder(replace(config, tie_word_embeddings=asked.model != "untied"))
    decoder.init_weights(torch.Generator().manual_seed(0))
    model = Scorer.from_decoder(decoder, torch.Generator()) if asked.model == "scorer" else decoder
    model.model.recompute = asked.recompute
    return model


class Sums(TorchDispatchMode):
    """Counts how often sharded gradients are added up over the ranks."""

    times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def main() -> None:
    asked = TypeAdapter(Asked).validate_json(sys.argv[1])
    dtype: torch.dtype = getattr(torch, asked.dtype)
    pulse.SILENCE = asked.silence
    pulse.BEAT = asked.silence / 10
    with parallel.joined("cpu") as (ranks, _):
        model = network(asked)
        toy = Fated(model, steps=8, micro=asked.micro, asked=asked)
        rates = RATES if asked.muon else replace(RATES, matrix_lr=None)
        optimizer = Optimizer(model, rates, dtype, sharded=asked.sharded)
        settings = replace(
            SETTINGS,
            keep_stable=asked.keep_stable,
            branch=asked.branch,
            snapshot_seconds=asked.snapshot_seconds,
        )
        with Sums() as sums:
            train(model, toy, optimizer, settings, asked.directory, Progress(), "toy", ranks=ranks)
        state = {name: whole(tensor) for name, tensor in optimizer.tensors().items()}
        state |= {f"model/{name}": p.detach() for name, p in unsharded(model).named_parameters()}
        torch.save(state, asked.directory / f"rank_{ranks.rank}.pt")
        held = sum(local(master.detach()).numel() for master in optimizer.masters.values())
        (asked.directory / f"rank_{ranks.rank}.json").write_text(
            json.dumps({"held": held, "sums": sums.times})
        )


if __name__ == "__main__":
    try:
        main()
    except (Interrupted, UserError) as error:
        print(f"rank {os.environ.get('RANK')} says: {error}", file=sys.stderr)
        sys.exit(75)
