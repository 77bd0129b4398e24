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
from unmask.stages.reward import scores
from unmask.training import parallel


def main(directory: Path, answers: int) -> None:
    written: list[int] = []

    def counted(policy: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Answer]:
        written.append(len(prompts))
        return generate(policy, prompts, **settings)

    gold = scorer(4)
    read = {"by the reward model": 0, "by the second judge": 0}

    def counting(model: Any, texts: Sequence[Sequence[int]], micro_tokens: int) -> Any:
        read["by the second judge" if model is gold else "by the reward model"] += len(texts)
        return scores(model, texts, micro_tokens)

    rollouts.generate, rollouts.scores = counted, counting  # type: ignore[attr-defined]
    with parallel.joined("cpu") as (ranks, _):
        stage = begin(ranks=ranks, answers=answers, minibatches=min(2, answers))
        stage[1].gold = rollouts.RewardModel(gold, 4096)
        train(stage, directory, ranks)
        torch.save(stage[0].state_dict(), directory / f"rank_{ranks.rank}.pt")
        (directory / f"rank_{ranks.rank}.json").write_text(json.dumps({"written": written, **read}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
