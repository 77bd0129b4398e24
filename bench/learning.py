"""Held-out loss at equal wall time: this project's base at depth 6, and peers that are given more time.

    python bench/learning.py --text FOLDER --minutes 10 --nanogpt-dir CLONE --nanochat-dir CLONE

Steps of all of them are timed in turn, so that what else the machine does falls on all alike. Then each trains for as
many steps as fit into its time, nanoGPT twice as many minutes, nanochat one and a half times. All read batches of
16 rows of 256 tokens of the same text in the same order, in bfloat16 where the processor has it, with what their
authors set for small models and the schedule stretched to the steps. Compiling and measuring are not counted. How long
a training really took beside what else the machine did is said too.
One JSON line each: nats a token on the same held-out rows, and how much more than ours, with a 95 % interval over rows.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peers
import torch
from harness import CPU, DTYPES, dtype_here, say
from torch import Tensor

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import token_log_probs
from unmask.progress import Progress
from unmask.recipe.derive import pretraining_rates
from unmask.stages import pretrain
from unmask.stages.batches import drawn
from unmask.text.shards import Shards, build
from unmask.text.sources import held_out, read_texts
from unmask.text.tokenizer import Tokenizer
from unmask.training import loop, machine
from unmask.training.optimizer import Optimizer, OptimizerSettings

LENGTH, ROWS = 256, 16
HELD = 256  # rows that are measured
TIME = {"unmask": 1.0, "nanogpt": 2.0, "nanochat": 1.5}


class Text(NamedTuple):
    """Shards to train on, held-out rows (HELD, LENGTH + 1) of different documents in turn, and the embedding's rows."""

    train: Shards
    held: Tensor
    vocabulary: int
    end_of_text: int


def read(path: str, vocabulary: int, directory: Path) -> Text:
    """Tokens of a source, a twentieth of its documents held out."""
    texts = list(read_texts(path))
    kept = [text for text in texts if not held_out(text, 0.05)]
    tokenizer = Tokenizer.train((text[:20_000] for text in kept), vocabulary)
    train = build(directory / "train", kept, tokenizer)
    others = build(directory / "held", [text[:20_000] for text in texts if held_out(text, 0.05)], tokenizer)
    there = others.rows(LENGTH)
    rows = [others.row(i * there // HELD, LENGTH) for i in range(HELD)]
    return Text(train, torch.from_numpy(np.stack(rows)), tokenizer.rows, tokenizer.end_of_text)


def shape(text: Text, depth: int = 6) -> ModelConfig:
    return ModelConfig.from_depth(depth, vocabulary=text.vocabulary, context=LENGTH)


def stage(
    text: Text, tokens: int, depth: int = 6, seed: int = 0, batch_tokens: int = ROWS * LENGTH, **rates: float
) -> tuple[Decoder, loop.Objective, Optimizer]:
    """This project's base, with the rates that a recipe leaves to be derived, or with given ones."""
    rates = pretraining_rates(depth, batch_tokens) | rates
    return pretrain.stage(
        shape(text, depth),
        [pretrain.Source("text", text.train, 1.0)],
        length=LENGTH,
        tokens=tokens,
        batch_tokens=batch_tokens,
        micro_tokens=min(batch_tokens, ROWS * LENGTH),
        end_of_text=text.end_of_text,
        settings=OptimizerSettings(lr=rates["lr"], matrix_lr=rates["matrix_lr"]),
        dtype=DTYPES[dtype_here()],
        device=CPU,
        seed=seed,
    )


def trained(model: Decoder, objective: loop.Objective, optimizer: Optimizer, seed: int = 0) -> float:
    """Train by the loop, with the schedule that recipes have by default; the seconds that it took."""
    total = objective.steps * objective.tokens_per_step
    settings = loop.Settings(0.02 * total, 0.5 * total, snapshot_seconds=1e9, seed=seed)
    with tempfile.TemporaryDirectory() as work:
        return loop.train(
            model, objective, optimizer, settings, Path(work), Progress(quiet=True), "base"
        ).seconds


@torch.no_grad()
def held_losses(model: Decoder, text: Text) -> Tensor:
    """Nats a token of each held-out row, (HELD,), in the model's own precision."""
    losses = []
    for rows in torch.split(text.held, 32):
        hidden = model.hidden(rows[:, :-1]).flatten(0, 1)
        losses.append(-token_log_probs(hidden, model.head, rows[:, 1:].flatten()).view(len(rows), -1).mean(1))
    return torch.cat(losses)


class Contender(NamedTuple):
    """One training step, with the number of the step and how many there are; and nats a token of each held-out row."""

    step: Callable[[int, int], object]
    held_losses: Callable[[], Tensor]


def batch(text: Text, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (ROWS, LENGTH): the rows that this project's step of the same number reads."""
    sizes = [text.train.rows(LENGTH)]
    rows = np.stack([text.train.row(row, LENGTH) for _, row in drawn(step, ROWS, sizes, [1.0], seed=0)])
    ids = torch.from_numpy(rows)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def unmask(text: Text) -> Contender:
    """Only to time its steps: it is trained by the loop."""
    model, objective, optimizer = stage(text, 2**30)
    return Contender(
        lambda number, steps: loop.train_step(objective, optimizer, number, 0.0, 1.0),
        lambda: held_losses(model, text),
    )


def nanogpt(text: Text, clone: Path) -> Contender:
    """train.py with config/train_shakespeare_char.py, its author's for small models, but no dropout: one epoch."""
    warmup, lr, least = 100, 1e-3, 1e-4
    peer = peers.nanogpt(clone, shape(text), lr=lr, betas=(0.9, 0.99))

    def step(number: int, steps: int) -> None:
        done = (number - warmup) / max(1, steps - warmup)
        now = lr * (number + 1) / (warmup + 1)
        if number >= warmup:
            now = least + 0.5 * (1 + math.cos(math.pi * done)) * (lr - least)
        for group in peer.optimizer.param_groups:
            group["lr"] = now
        peer.step(*batch(text, number), clip=1.0)

    return Contender(step, lambda: _losses(peer.logits, text))


def nanochat(text: Text, clone: Path) -> Contender:
    """scripts/base_train.py with its defaults, and what it derives from a batch of 4,096 tokens and the steps."""
    share = (ROWS * LENGTH / 2**19) ** 0.5
    rates = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
    peer = peers.nanochat(clone, shape(text), **{name: rate * share for name, rate in rates.items()})
    # It tunes at depth 12; the decay of other models falls as their tokens grow.
    layers, head = 12 * 12 * 768**2, text.vocabulary * 768
    counts = peer.model.num_scaling_params()
    decay = 0.28 * share * (layers + head) / (counts["transformer_matrices"] + counts["lm_head"])

    def step(number: int, steps: int) -> None:
        left = min(1.0, (steps - number) / max(1, round(0.65 * steps)))
        scale = (number + 1) / 40 if number < 40 else left + (1 - left) * 0.05
        momentum = 0.85 + 0.12 * number / 400 if number < 400 else 0.90 + 0.07 * left
        for group in peer.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * number / steps))
        peer.step(*batch(text, number))

    return Contender(step, lambda: _losses(peer.logits, text))


@torch.no_grad()
def _losses(logits: Callable[[Tensor], Tensor], text: Text) -> Tensor:
    """Nats a token of each held-out row, from logits in float32."""
    losses = []
    for rows in torch.split(text.held, 32):
        log_p = logits(rows[:, :-1].contiguous()).float().log_softmax(-1)
        losses.append(-log_p.gather(2, rows[:, 1:, None])[..., 0].mean(1))
    return torch.cat(losses)


def seconds_a_step(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Medians of steps that are done in turn, after three that compile and allocate. The models are thrown away."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 3):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.step(number, rounds + 3)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[3:]) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="sotu", help="a source as a recipe names them")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--nanogpt-dir", type=peers.clone_with("model.py"), help="a clone of karpathy/nanoGPT"
    )
    parser.add_argument(
        "--nanochat-dir", type=peers.clone_with("nanochat/gpt.py"), help="a clone of karpathy/nanochat"
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that are timed")
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    makers: dict[str, Callable[[Text], Contender]] = {"unmask": unmask}
    if options.nanogpt_dir:
        makers["nanogpt"] = lambda text: nanogpt(text, options.nanogpt_dir)
    if options.nanochat_dir:
        makers["nanochat"] = lambda text: nanochat(text, options.nanochat_dir)
    machine.keep_large_blocks()
    with tempfile.TemporaryDirectory() as directory:
        text = read(options.text, options.vocabulary, Path(directory))
        taken = seconds_a_step({name: make(text) for name, make in makers.items()}, options.rounds)
        reference: Tensor | None = None
        for name, make in makers.items():
            minutes = options.minutes * TIME[name]
            steps = max(1, round(60 * minutes / taken[name]))
            began = time.perf_counter()
            if name == "unmask":
                model, objective, optimizer = stage(text, steps * ROWS * LENGTH)
                elapsed = trained(model, objective, optimizer)
                losses = held_losses(model, text)
                reference = losses
            else:
                contender = make(text)
                for number in range(steps):
                    contender.step(number, steps)
                elapsed = time.perf_counter() - began
                losses = contender.held_losses()
            assert reference is not None
            difference = losses - reference
            half = 1.96 * float(difference.std()) / len(difference) ** 0.5
            say(
                "learning",
                model=name,
                minutes=minutes,
                seconds_a_step=taken[name],
                seconds_taken=elapsed,
                steps=steps,
                tokens=steps * ROWS * LENGTH,
                nats_a_token=float(losses.mean()),
                rows=len(losses),
                above_ours=[float(difference.mean()) + sign * half for sign in (-1, 0, 1)],
            )


if __name__ == "__main__":
    main()
