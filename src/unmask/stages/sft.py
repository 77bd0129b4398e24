"""Supervised fine-tuning: conversations packed into rows, of which only what the assistant says is learned."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.stages.batches import drawn, sent
from unmask.text.chat import Rendered
from unmask.text.packing import Packed, pack
from unmask.text.sources import Dropped
from unmask.training.optimizer import Optimizer, OptimizerSettings


class Source(NamedTuple):
    """Conversations as ids, and the share of every batch's rows that they fill (shares need not sum to 1)."""

    name: str
    examples: Iterable[Rendered]
    share: float


class Batch(NamedTuple):
    """Rows cut behind their last real token, and the N targets that count: where in (B·T), and which ids."""

    ids_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    before_N: Tensor
    targets_N: Tensor
    tokens: int  # read, padding aside


class Imitation:
    """Mean of −ln p(next token) in nats over what assistants say in a step, their stop tokens included.

    Each source's conversations are packed into rows of `length` once; rows are drawn in shares. A
    conversation sees nothing of its neighbours: attention stays inside, positions begin anew, and its first
    token is no one's target. `tokens` are real ones, padding aside. `dropped` counts what was cut or left
    out while packing. Every target weighs the same, so that long answers weigh more than short ones, as in
    most trainers.
    """

    pause_every = 1

    def __init__(
        self,
        model: Decoder,
        sources: Sequence[Source],
        *,
        length: int,
        tokens: int,
        batch_rows: int,
        micro_rows: int,
        pad: int,
        seed: int,
    ) -> None:
        self.model, self.seed = model, seed
        self.batch_rows, self.micro_rows = batch_rows, micro_rows
        self.dropped = Dropped()
        self.packed = []
        for source in sources:
            packed, dropped = pack(source.examples, length, pad)
            if not packed.rows:
                count = dropped["nothing left to learn"]
                raise UserError(
                    f"source {source.name!r} of [sft] has no answer to learn from: of {count} "
                    f"conversations none has one within the first {length} tokens."
                )
            self.packed.append(packed)
            self.dropped.update(dropped)
        self.sizes, self.shares = (
            [packed.rows for packed in self.packed],
            [source.share for source in sources],
        )
        per_row = [packed.tokens / packed.rows for packed in self.packed]
        mean = sum(share * n for share, n in zip(self.shares, per_row, strict=True)) / sum(self.shares)
        self.tokens_per_step = round(batch_rows * mean)
        self.steps = max(1, tokens // self.tokens_per_step)
        held = [
            (source.name, packed.fingerprint, source.share)
            for source, packed in zip(sources, self.packed, strict=True)
        ]
        self.data = {name: digest for name, digest, _ in held}
        self.fingerprint = hash_json(
            {
                "sources": held,
                "batch_rows": batch_rows,
                "seed": seed,
            }
        )

    def micro_batches(self, step: int) -> list[Batch]:
        rows = drawn(step, self.batch_rows, self.sizes, self.shares, self.seed)
        return [
            self._batch(
                [self.packed[source].batch([row]) for source, row in rows[start : start + self.micro_rows]]
            )
            for start in range(0, self.batch_rows, self.micro_rows)
        ]

    def _batch(self, rows: Sequence[Packed]) -> Batch:
        """These rows as one batch on the model's device."""
        documents_BT = torch.cat([row.documents_BT for row in rows])
        real_B = (documents_BT >= 0).sum(dim=1)
        end = int(real_B.max())  # padding is at the end of a row
        ids_BT, positions_BT, targets_BT, loss_BT = (
            torch.cat(tensors)[:, :end]
            for tensors in zip(
                *((row.ids_BT, row.positions_BT, row.targets_BT, row.loss_BT) for row in rows), strict=True
            )
        )
        before_N = loss_BT.flatten().nonzero()[:, 0]
        targets_N = targets_BT.flatten()[before_N]
        device = self.model.head.device
        return Batch(
            sent(ids_BT, device),
            sent(positions_BT, device),
            sent(documents_BT[:, :end], device),
            sent(before_N, device),
            sent(targets_N, device),
            int(real_B.sum()),
        )

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"trained": len(batch.targets_N)}

    def tokens(self, batch: Batch) -> int:
        return batch.tokens

    def loss(self, batch: Batch, totals: dict[str, int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        # Logits are made where a target counts and nowhere else: prompts cost no vocabulary.
        hidden_ND = self.model.hidden(
            batch.ids_BT,
            positions_BT=batch.positions_BT,
            documents_BT=batch.documents_BT,
            at_N=batch.before_N,
        )
        nats = cross_entropy_sum(hidden_ND, self.model.head, batch.targets_N)
        return nats / max(1, totals["trained"]), {}


def stage(
    parent: Decoder,
    sources: Sequence[Source],
    *,
    length: int,
    tokens: int,
    batch_tokens: int,
    micro_tokens: int,
    pad: int,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    seed: int,
    shard: bool = False,
) -> tuple[Decoder, Imitation, Optimizer]:
    """The parent itself, which is trained on, with its objective and optimizer, ready for the loop.

    `batch_tokens` and `micro_tokens` become whole rows, at least one; `tokens` are real ones, padding
    aside.
    """
    objective = Imitation(
        parent,
        sources,
        length=length,
        tokens=tokens,
        batch_rows=max(1, batch_tokens // length),
        micro_rows=max(1, micro_tokens // length),
        pad=pad,
        seed=seed,
    )
    return parent, objective, Optimizer(parent, settings, dtype, sharded=shard)
