"""The reward model: one score for a whole conversation, learned from which of two people preferred.

It reads what a policy's answer looks like at scoring time: the conversation's ids up to and including the
stop token of its last assistant turn, where the score is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.stages.batches import by_length, fingerprint, pad_right
from unmask.stages.objectives import bradley_terry
from unmask.text.chat import Rendered, render
from unmask.text.preferences import Pair, similar_batches
from unmask.text.tokenizer import Tokenizer
from unmask.training.optimizer import Optimizer, OptimizerSettings


class TokenPair(NamedTuple):
    """Two conversations as ids, each ending with a stop token; people preferred the first."""

    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def through_stop(rendered: Rendered) -> list[int]:
    """The ids up to the last stop token of an assistant; what a template adds after it is left out."""
    last = max((i for i, trained in enumerate(rendered.trained) if trained), default=-1)
    return list(rendered.ids[: last + 1])


def tokenize(pairs: Iterable[Pair], tokenizer: Tokenizer, context: int) -> tuple[list[TokenPair], int]:
    """Pairs as ids, and how many were dropped: a side longer than `context`, or without an assistant turn.

    A pair is never cut: a conversation without its end is not what people compared.
    """
    kept, dropped = [], 0
    for pair in pairs:
        both = TokenPair(
            through_stop(render(tokenizer, pair.chosen)), through_stop(render(tokenizer, pair.rejected))
        )
        if both.longest > context or not both.chosen or not both.rejected:
            dropped += 1
        else:
            kept.append(both)
    return kept, dropped


class PairBatch(NamedTuple):
    """n chosen conversations, then the n rejected ones in the same order; `tokens` leaves padding out."""

    ids_BT: Tensor
    lengths_B: Tensor
    tokens: int


class Preference:
    """Mean of −ln σ(score(chosen) − score(rejected)) in nats over the pairs of a step.

    Both sides of a pair stand in one forward pass. A batch holds pairs of similar length, so that little of
    it is padding; which batch comes when is shuffled anew each epoch. Ouyang et al. (arXiv 2203.02155),
    section 3.5; deviations: independent pairs instead of all pairs of K ranked answers, and no
    normalisation by their number.
    """

    pause_every = 1

    def __init__(
        self,
        model: Scorer,
        pairs: Sequence[TokenPair],
        *,
        steps: int,
        batch_pairs: int,
        micro_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.pairs, self.steps = model, pairs, steps
        self.batch_pairs, self.micro_tokens, self.seed = batch_pairs, micro_tokens, seed
        self.batches_per_epoch = -(-len(pairs) // batch_pairs)
        self.tokens_per_step = round(token_count(pairs) / self.batches_per_epoch)
        sides = fingerprint(side for pair in pairs for side in pair)
        self.fingerprint = hash_json(
            {"pairs": sides, "batch_pairs": batch_pairs, "micro_tokens": micro_tokens, "seed": seed}
        )
        self._epoch, self._order = -1, list[NDArray[np.int64]]()

    def micro_batches(self, step: int) -> list[PairBatch]:
        epoch, at = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            lengths = [pair.longest for pair in self.pairs]
            self._epoch = epoch
            self._order = similar_batches(lengths, self.batch_pairs, self.seed, epoch)
        pairs = [self.pairs[i] for i in self._order[at]]
        device = self.model.score.weight.device
        batches = []
        for group in by_length([2 * pair.longest for pair in pairs], self.micro_tokens):
            rows = [pairs[i].chosen for i in group] + [pairs[i].rejected for i in group]
            batches.append(PairBatch(*pad_right(rows, device), sum(map(len, rows))))
        return batches

    def counts(self, batch: PairBatch) -> dict[str, int]:
        return {"pairs": len(batch.ids_BT) // 2, "cells": batch.ids_BT.numel()}

    def tokens(self, batch: PairBatch) -> int:
        return batch.tokens

    def loss(self, batch: PairBatch, totals: dict[str, int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        chosen_B, rejected_B = self.model(batch.ids_BT, batch.lengths_B).chunk(2)
        loss = bradley_terry(chosen_B, rejected_B).sum() / totals["pairs"]
        margins = (chosen_B - rejected_B).detach()
        right = (margins > 0).float() + 0.5 * (margins == 0).float()  # a tie is half right
        return loss, {
            "accuracy": right.sum() / totals["pairs"],
            "margin": margins.sum() / totals["pairs"],
            "padding": (batch.ids_BT.numel() - batch.tokens) / totals["cells"],
        }


def token_count(pairs: Sequence[TokenPair]) -> int:
    return sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


def stage(
    parent: Decoder,
    pairs: Sequence[TokenPair],
    *,
    tokens: int,
    batch_tokens: int,
    micro_tokens: int,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    seed: int,
    epochs: int = 1,
) -> tuple[Scorer, Preference, Optimizer]:
    """A scorer on the parent's trunk with its objective and optimizer, ready for the loop.

    It reads `tokens`, but goes over the pairs at most `epochs` times: Bradley–Terry over-fits from the
    second on. `batch_tokens` becomes a number of pairs, the same in every step, by their mean length.
    """
    if not pairs:
        raise UserError(
            "there is no pair of preferences to train the reward model on. Check the source of [reward]."
        )
    whole = token_count(pairs)
    batch_pairs = max(1, round(batch_tokens * len(pairs) / whole))
    batches = -(-len(pairs) // batch_pairs)
    steps = min(max(1, round(tokens * batches / whole)), epochs * batches)
    model = Scorer.from_decoder(parent, torch.Generator(parent.head.device).manual_seed(seed))
    objective = Preference(
        model, pairs, steps=steps, batch_pairs=batch_pairs, micro_tokens=micro_tokens, seed=seed
    )
    return model, objective, Optimizer(model, settings, dtype)


@torch.no_grad()
def scores(model: Scorer, texts: Sequence[Sequence[int]], micro_tokens: int = 16_384) -> Tensor:
    """The score of each text, less the model's `reward_offset`: (N,) float32 on the CPU, in their order."""
    result = torch.zeros(len(texts))
    for group in by_length([len(text) for text in texts], micro_tokens):
        ids_BT, lengths_B = pad_right([texts[i] for i in group], model.score.weight.device)
        result[group] = model(ids_BT, lengths_B).float().cpu()
    return result - model.config.reward_offset


def centre(model: Scorer, texts: Sequence[Sequence[int]]) -> float:
    """Set the model's `reward_offset` so that the mean score of these texts is 0; return the offset.

    Bradley–Terry knows scores only up to one constant. Over answers of the SFT model, or over the texts that
    taught it, this constant gives an average answer the score 0. The weights stay as they are.
    """
    if not texts:
        raise UserError("the reward model cannot be centred: there is no text to take the mean score of.")
    model.config = replace(model.config, reward_offset=0.0)
    mean = scores(model, texts).double().mean().item()
    model.config = replace(model.config, reward_offset=mean)
    return mean
