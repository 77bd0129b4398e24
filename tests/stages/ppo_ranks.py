"""PPO as one rank of several: what torchrun starts in test_ppo.py."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from small_models import scorer
from test_ppo import begin, train

from unmask.generation.engine import Answer, generate
from unmask.stages import rollouts
from unmask.training import parallel


def main(directory: Path, answers: int) -> None:
    written: list[int] = []

    def counted(policy: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Answer]:
        written.append(len(prompts))
        return generate(policy, prompts, **settings)

    rollouts.generate = counted  # type: ignore[attr-defined]
    with parallel.joined("cpu") as (ranks, _):
        stage = begin(ranks=ranks, answers=answers, minibatches=min(2, answers))
        stage[1].gold = scorer(4)
        train(stage, directory, ranks)
        torch.save(stage[0].state_dict(), directory / f"rank_{ranks.rank}.pt")
        (directory / f"rank_{ranks.rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
