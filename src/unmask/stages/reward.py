"""The reward model: one score for a whole conversation, learned from which of two people preferred.

It reads what a policy's answer looks like at scoring time: the conversation's ids up to and including the
stop token of its last assistant turn, where the score is read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.stages import examples
from unmask.stages.batches import by_length, fingerprint, pad_right, sent
from unmask.stages.objectives import bradley_terry
from unmask.text.chat import Rendered, render
from unmask.text.preferences import similar_batches
from unmask.text.tokenizer import Tokenizer
from unmask.training.optimizer import Optimizer, OptimizerSettings


class Ranking(NamedTuple):
    """Conversations as ids, each ending with a stop token; `better` are (chosen, rejected), places in `texts`."""

    texts: list[list[int]]
    better: list[tuple[int, int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.texts))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


def through_stop(rendered: Rendered) -> list[int]:
    """The ids up to the last stop token of an assistant; what a template adds after it is left out."""
    last = max((i for i, trained in enumerate(rendered.trained) if trained), default=-1)
    return list(rendered.ids[: last + 1])


def tokenize(
    rankings: Iterable[examples.Ranking], tokenizer: Tokenizer, context: int
) -> tuple[list[Ranking], int]:
    """Rankings as ids, and how many texts were dropped: longer than `context`, or without an assistant turn.

    A text is never cut: a conversation without its end is not what people compared. Who has nothing left to be
    compared with is dropped too.
    """
    kept, dropped = [], 0
    for chats, better in rankings:
        texts = [through_stop(render(tokenizer, chat)) for chat in chats]
        fits = [0 < len(text) <= context for text in texts]
        pairs = [(a, b) for a, b in better if fits[a] and fits[b]]
        places = {place: new for new, place in enumerate(sorted({place for pair in pairs for place in pair}))}
        dropped += len(texts) - len(places)
        if pairs:
            kept.append(Ranking([texts[i] for i in places], [(places[a], places[b]) for a, b in pairs]))
    return kept, dropped


class RankingBatch(NamedTuple):
    """Conversations padded to the right, and comparisons as rows of them; `tokens` leaves padding out."""

    ids_BT: Tensor
    lengths_B: Tensor
    chosen_P: Tensor
    rejected_P: Tensor
    tokens: int


class Preference:
    """Mean of −ln σ(score(chosen) − score(rejected)) in nats over the comparisons of a step.

    All texts that are compared with each other stand in one forward pass, and each is read once for all its
    comparisons. A batch holds rankings of similar length, so that little of it is padding; which batch comes when is
    shuffled anew each epoch. Ouyang et al. (arXiv 2203.02155), section 3.5; deviation: every comparison of a step
    weighs the same, not every ranking.
    """

    pause_every = 1

    def __init__(
        self,
        model: Scorer,
        rankings: Sequence[Ranking],
        *,
        steps: int,
        batch_rankings: int,
        micro_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.rankings, self.steps = model, rankings, steps
        self.batch_rankings, self.micro_tokens, self.seed = batch_rankings, micro_tokens, seed
        self.batches_per_epoch = -(-len(rankings) // batch_rankings)
        self.tokens_per_step = round(token_count(rankings) / self.batches_per_epoch)
        self.fingerprint = hash_json(
            {
                "texts": fingerprint(text for ranking in rankings for text in ranking.texts),
                "better": hash_json([ranking.better for ranking in rankings]),
                "batch_rankings": batch_rankings,
                "seed": seed,
            }
        )
        self._epoch, self._order = -1, list[NDArray[np.int64]]()

    def micro_batches(self, step: int) -> list[RankingBatch]:
        epoch, at = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            lengths = [ranking.longest for ranking in self.rankings]
            self._epoch = epoch
            self._order = similar_batches(lengths, self.batch_rankings, self.seed, epoch)
        rankings = [self.rankings[i] for i in self._order[at]]
        longest, rows = zip(*((ranking.longest, len(ranking.texts)) for ranking in rankings), strict=True)
        groups = by_length(longest, self.micro_tokens, rows)
        return [self._batch([rankings[i] for i in group]) for group in groups]

    def _batch(self, rankings: Sequence[Ranking]) -> RankingBatch:
        device = self.model.score.weight.device
        rows = [text for ranking in rankings for text in ranking.texts]
        starts = accumulate((len(ranking.texts) for ranking in rankings), initial=0)
        pairs = [
            (at + a, at + b) for at, ranking in zip(starts, rankings, strict=False) for a, b in ranking.better
        ]
        chosen_P, rejected_P = sent(torch.tensor(pairs, dtype=torch.int64).T.contiguous(), device)
        return RankingBatch(*pad_right(rows, device), chosen_P, rejected_P, sum(map(len, rows)))

    def counts(self, batch: RankingBatch) -> dict[str, int]:
        return {"pairs": len(batch.chosen_P), "cells": batch.ids_BT.numel()}

    def tokens(self, batch: RankingBatch) -> int:
        return batch.tokens

    def loss(self, batch: RankingBatch, totals: dict[str, int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        scores_B = self.model(batch.ids_BT, batch.lengths_B)
        chosen_P, rejected_P = scores_B[batch.chosen_P], scores_B[batch.rejected_P]
        loss = bradley_terry(chosen_P, rejected_P).sum() / totals["pairs"]
        margins = (chosen_P - rejected_P).detach()
        right = (margins > 0).float() + 0.5 * (margins == 0).float()  # a tie is half right
        return loss, {
            "accuracy": right.sum() / totals["pairs"],
            "margin": margins.sum() / totals["pairs"],
            "padding": (batch.ids_BT.numel() - batch.tokens) / totals["cells"],
        }


def token_count(rankings: Sequence[Ranking]) -> int:
    return sum(ranking.tokens for ranking in rankings)


def stage(
    parent: Decoder,
    rankings: Sequence[Ranking],
    *,
    tokens: int,
    batch_tokens: int,
    micro_tokens: int,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    seed: int,
    shard: bool = False,
) -> tuple[Scorer, Preference, Optimizer]:
    """A scorer on the parent's trunk with its objective and optimizer, ready for the loop.

    It reads `tokens`, but goes over the texts once at most: Bradley–Terry over-fits from the second time on.
    `batch_tokens` becomes a number of rankings, the same in every step, by their mean length.
    """
    if not rankings:
        raise UserError(
            "there is no pair of preferences to train the reward model on. Check the source of [reward]."
        )
    whole = token_count(rankings)
    batch_rankings = max(1, round(batch_tokens * len(rankings) / whole))
    batches = -(-len(rankings) // batch_rankings)
    steps = min(max(1, round(tokens * batches / whole)), batches)
    model = Scorer.from_decoder(parent, torch.Generator(parent.head.device).manual_seed(seed))
    objective = Preference(
        model, rankings, steps=steps, batch_rankings=batch_rankings, micro_tokens=micro_tokens, seed=seed
    )
    return model, objective, Optimizer(model, settings, dtype, sharded=shard)


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

    Bradley–Terry knows scores only up to one constant. Over answers of the SFT model this constant gives its
    average answer the score 0. The weights stay as they are.
    """
    if not texts:
        raise UserError("the reward model cannot be centred: there is no text to take the mean score of.")
    model.config = replace(model.config, reward_offset=0.0)
    mean = scores(model, texts).double().mean().item()
    model.config = replace(model.config, reward_offset=mean)
    return mean
