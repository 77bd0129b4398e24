"""Pretraining: the next token of raw text, rows of several sources mixed in fixed shares."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.stages.batches import Drawn, drawn, sent
from unmask.text.shards import Shards
from unmask.training.optimizer import Optimizer, OptimizerSettings


class Source(NamedTuple):
    """Token shards and the share of every batch that comes from them (shares need not sum to 1)."""

    name: str
    shards: Shards
    share: float


class Pretraining:
    """Mean of −ln p(next token) in nats over all tokens of a step; the objective of the training loop.

    A row holds length + 1 tokens of a source's stream, which runs on through documents; each of them begins
    with the end-of-text token, which so is also what a document's last token has to predict. With
    `cross_documents` a token may attend to the documents before its own in the row, as GPT-2's and most
    since do; that is a choice, written in the fingerprint. Without it attention and positions begin anew at
    each document. No z-loss, no label smoothing.
    """

    pause_every = 1

    def __init__(
        self,
        model: Decoder,
        sources: Sequence[Source],
        *,
        length: int,
        steps: int,
        batch_rows: int,
        micro_rows: int,
        end_of_text: int,
        seed: int,
        cross_documents: bool = True,
    ) -> None:
        for source in sources:
            if source.shards.rows(length) == 0:
                raise UserError(
                    f"source {source.name!r} has {source.shards.tokens} tokens, too few for a row of "
                    f"{length}. Give it more text, or lower `context`."
                )
        self.model, self.sources, self.length = model, sources, length
        self.steps, self.batch_rows, self.micro_rows = steps, batch_rows, micro_rows
        self.end_of_text, self.seed, self.cross_documents = end_of_text, seed, cross_documents
        self.tokens_per_step = batch_rows * length
        self.sizes = [source.shards.rows(length) for source in sources]
        self.fingerprint = hash_json(
            {
                "sources": [[source.name, source.shards.fingerprint, source.share] for source in sources],
                "length": length,
                "batch_rows": batch_rows,
                "seed": seed,
                "cross_documents": cross_documents,
            }
        )

    def micro_batches(self, step: int) -> list[list[Drawn]]:
        """Which rows a step reads; `loss` reads them: of several processes each only its own."""
        shares = [source.share for source in self.sources]
        rows = drawn(step, self.batch_rows, self.sizes, shares, self.seed)
        return [rows[start : start + self.micro_rows] for start in range(0, len(rows), self.micro_rows)]

    def read(self, batch: Sequence[Drawn]) -> Tensor:
        """The rows (B, length + 1), int64, on the model's device."""
        rows = [self.sources[source].shards.row(row, self.length) for source, row in batch]
        return sent(torch.from_numpy(np.stack(rows)), self.model.head.device)

    def counts(self, batch: Sequence[Drawn]) -> dict[str, int]:
        return {"tokens": self.tokens(batch)}

    def tokens(self, batch: Sequence[Drawn]) -> int:
        return len(batch) * self.length

    def loss(
        self, batch: Sequence[Drawn], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        ids = self.read(batch)
        inputs_BT, targets_BT = ids[:, :-1], ids[:, 1:]
        if self.cross_documents:
            hidden_BTD = self.model.hidden(inputs_BT)
        else:
            documents_BT, positions_BT = documents_and_positions(inputs_BT, self.end_of_text)
            hidden_BTD = self.model.hidden(inputs_BT, positions_BT=positions_BT, documents_BT=documents_BT)
        nats = cross_entropy_sum(hidden_BTD.flatten(0, 1), self.model.head, targets_BT.flatten())
        return nats / totals["tokens"], {}


def documents_and_positions(ids_BT: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """The running number of each token's document in its row, and the token's position in that document."""
    starts_BT = ids_BT == end_of_text
    at_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    last_start_BT = torch.where(starts_BT, at_T, 0).cummax(dim=1).values
    return starts_BT.cumsum(dim=1), at_T - last_start_BT


@torch.no_grad()
def give_meaning(model: Decoder, unseen: Sequence[int], like: int) -> None:
    """Let control tokens that pretraining never saw begin as copies of one that it saw, `like`.

    A row of the embedding that is never a target is pushed away from everything: it ends long, and the same for
    all such tokens. A base that meets them, at the head of a chat, then recalls little of what it knows
    (docs/decisions/control-tokens.md has figures). What a turn's marks are closest to is the mark between documents.
    """
    for table in (model.model.embed_tokens.weight, model.head):  # one and the same where they are tied
        table[list(unseen)] = table[like].clone()


def whole(tokens: int, batch_tokens: int, length: int) -> tuple[int, int]:
    """Whole steps, and the whole rows of each, in so many tokens."""
    rows = batch_tokens // length
    return tokens // (rows * length), rows


def stage(
    config: ModelConfig,
    sources: Sequence[Source],
    *,
    length: int,
    tokens: int,
    batch_tokens: int,
    micro_tokens: int,
    end_of_text: int,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    cross_documents: bool = True,
    shard: bool = False,
) -> tuple[Decoder, Pretraining, Optimizer]:
    """A fresh model with its objective and optimizer, ready for the loop.

    Amounts are in tokens and become whole rows and steps, rounded down; a micro-batch is at least one row.
    """
    if tokens < batch_tokens or batch_tokens < length:
        raise UserError(
            f"pretraining on {tokens} tokens in batches of {batch_tokens} and rows of {length} is no step. "
            "Raise pretrain.tokens or pretrain.batch_tokens, or lower `context`."
        )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    model.to(device)
    steps, batch_rows = whole(tokens, batch_tokens, length)
    objective = Pretraining(
        model,
        sources,
        length=length,
        steps=steps,
        batch_rows=batch_rows,
        micro_rows=max(1, micro_tokens // length),
        end_of_text=end_of_text,
        seed=seed,
        cross_documents=cross_documents,
    )
    return model, objective, Optimizer(model, settings, dtype, sharded=shard)
