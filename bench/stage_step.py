"""Time of a post-training step with random weights and made-up ids: prompts of 32 tokens, answers of 64.

    python bench/stage_step.py --stage sft       # 32 conversations a step
    python bench/stage_step.py --stage reward    # 32 pairs a step
    python bench/stage_step.py --stage ppo       # 32 answers a step: written, judged and learned from
    python bench/stage_step.py --stage sft --trl # in turn with TRL, which has sft and reward (pip install trl datasets)

One JSON line: seconds a step, tokens/s (read by the model, padding aside; of ppo prompts and answers), peak memory.
With --trl also TRL's, which reads as many prompts and answers, and how many times faster a token is here.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import peers
import torch
from harness import DTYPES, SHAPES, config, decoder, dtype_here, in_turn, say, spread

from unmask.model.scorer import Scorer
from unmask.stages import ppo, reward, rollouts, sft
from unmask.text.chat import Rendered
from unmask.training.loop import Objective, train_step
from unmask.training.optimizer import Optimizer, OptimizerSettings

PROMPT, ANSWER, ROWS, STEPS = 32, 64, 32, 64
PAD, STOP = 0, 1
ADAMW = OptimizerSettings(lr=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, default="sft")
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--trl", action="store_true", help="in turn with TRL's trainer")
    options = parser.parse_args()
    if options.trl and options.stage == "ppo":
        parser.error("TRL has no PPO any more")
    dtype = dtype_here()
    objective, optimizer = STAGES[options.stage](options.shape, DTYPES[dtype])
    read: list[int] = []

    def step() -> None:
        read.append(train_step(objective, optimizer, len(read), 1.0, 1.0).tokens)

    beside: dict[str, Any] = {}
    if options.trl:
        seconds, theirs = in_turn_with_trl(step, options.stage, options.shape, options.times)
        tokens = ROWS * (PROMPT + ANSWER) * (1 if options.stage == "sft" else 2)
        beside["trl"] = {
            "tokens_per_second": tokens / statistics.median(theirs),
            "seconds": spread(theirs),
        }
        turns = zip(read[1:], seconds, theirs, strict=True)
        beside["to_trl"] = spread([ours / taken * other / tokens for ours, taken, other in turns])
    else:
        seconds = in_turn({"": step}, options.times)[""]
    say(
        "stage_step",
        alone=not options.trl,
        stage=options.stage,
        shape=options.shape,
        dtype=dtype,
        tokens_per_second=sum(read[1:]) / len(read[1:]) / statistics.median(seconds),
        seconds=spread(seconds),
        **beside,
    )


def in_turn_with_trl(
    step: Callable[[], None], stage: str, shape: str, times: int
) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of TRL's, one of ours after each of theirs; the first of each is left out."""
    columns = ("completion",) if stage == "sft" else ("chosen", "rejected")
    drawn = iter(range(10**9))
    # TRL adds the token that ends an answer.
    rows = [
        {"prompt": ids(shape, PROMPT, next(drawn))}
        | {c: ids(shape, ANSWER - 1, next(drawn)) for c in columns}
        for _ in range(ROWS * (times + 1))
    ]
    ours: list[float] = []
    theirs: list[float] = []
    mark = 0.0

    def after_step() -> None:
        nonlocal mark
        theirs.append(time.perf_counter() - mark)
        start = time.perf_counter()
        step()
        mark = time.perf_counter()
        ours.append(mark - start)

    peers.trl(stage, config(shape), rows, ROWS, DTYPES[dtype_here()], after_step)
    return ours[1:], theirs[1:]


def ids(shape: str, length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(2, SHAPES[shape][2]), k=length)


def imitation(shape: str, dtype: torch.dtype) -> tuple[Objective, Optimizer]:
    trained = [False] * PROMPT + [True] * ANSWER
    examples = [Rendered(ids(shape, PROMPT + ANSWER, seed), trained) for seed in range(ROWS * STEPS)]
    length = 2 * (PROMPT + ANSWER)  # of a row: whole conversations fill it
    rows = ROWS * (PROMPT + ANSWER)  # tokens of a step
    _, objective, optimizer = sft.stage(
        decoder(shape), [sft.Source("made up", examples, 1.0)], length=length, tokens=rows * STEPS,
        batch_tokens=rows, micro_tokens=rows, pad=PAD, settings=ADAMW, dtype=dtype, seed=0,
    )  # fmt: skip
    return objective, optimizer


def preference(shape: str, dtype: torch.dtype) -> tuple[Objective, Optimizer]:
    rankings = []
    for seed in range(ROWS * STEPS):
        prompt = ids(shape, PROMPT, seed)
        answers = [ids(shape, ANSWER, 2 * seed + side) for side in (0, 1)]
        rankings.append(reward.Ranking([prompt + answer for answer in answers], [(0, 1)]))
    tokens = 2 * ROWS * (PROMPT + ANSWER)
    _, objective, optimizer = reward.stage(
        decoder(shape), rankings, tokens=tokens * STEPS, batch_tokens=tokens, micro_tokens=tokens,
        settings=ADAMW, dtype=dtype, seed=0,
    )  # fmt: skip
    return objective, optimizer


def reinforcement(shape: str, dtype: torch.dtype) -> tuple[Objective, Optimizer]:
    model = decoder(shape)
    judge = Scorer.from_decoder(model, torch.Generator().manual_seed(0))
    prompts = [ids(shape, PROMPT, seed) for seed in range(ROWS * STEPS)]
    settings = ppo.PPOSettings(
        rollouts=STEPS, answers=ROWS, answer_tokens=ANSWER, critic_rollouts=0, epochs=1, minibatches=1,
        micro_tokens=8192, kl=0.5, gamma=1.0, gae_lambda=0.95, ratio_clip=0.2, value_clip=0.2,
        value_weight=0.5, ptx=0.0, truncation_penalty=2.0,
    )  # fmt: skip
    _, objective, optimizer = ppo.stage(
        model, judge, [rollouts.Source("made up", prompts, 1.0)], settings, stop_ids=[STOP], lr=1e-5,
        critic_lr=1e-5, dtype=dtype, seed=0, say=lambda line: None,
    )  # fmt: skip
    return objective, optimizer


STAGES: dict[str, Callable[[str, torch.dtype], tuple[Objective, Optimizer]]] = {
    "sft": imitation,
    "reward": preference,
    "ppo": reinforcement,
}


if __name__ == "__main__":
    main()
