"""Packing: several conversations in one row of fixed length, none of which can see another.

Rows are inputs and targets already shifted: `ids[t]` is read, `targets[t]`, the next id of the same
conversation, is predicted. A conversation's last id is thus never read and its first never predicted, and
no target lies in another conversation. Attention must stay inside equal `documents`, and `positions` begin
anew with each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.files import sha256_hex
from unmask.text.chat import Rendered
from unmask.text.sources import Dropped


@dataclass(frozen=True)
class Packed:
    """Rows of inputs with their targets. All (B, T); int64 but for `loss_BT`, bool: whether the target
    counts.

    `documents_BT` numbers the conversations of a row from 0; padding, at the end, is -1 (with the pad id, and
    positions from 0), so that it sees itself alone.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    loss_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor


class PackedRows:
    """Examples and which of them share a row; tensors are made a batch at a time.

    `length`: tokens of a row; `rows`: how many; `tokens`: real inputs in all of them; `trained`: targets that
    count; `fingerprint`: a hash of every id, of what counts and of where it lies.
    """

    def __init__(
        self, examples: Sequence[NDArray[Any]], layout: Sequence[Sequence[int]], length: int, pad: int
    ) -> None:
        """`examples`: (2, n) int32, ids above and trained below. `layout`: the examples of each row."""
        self._examples, self._layout, self._pad = examples, layout, pad
        self.length, self.rows = length, len(layout)
        self.tokens = sum(example.shape[1] - 1 for example in examples)
        self.trained = sum(int(example[1, 1:].sum()) for example in examples)
        whole = [
            np.array([length, pad, *map(len, layout)]),
            *(examples[i].ravel() for row in layout for i in row),
        ]
        self.fingerprint = sha256_hex(b"".join(part.astype("<i4").tobytes() for part in whole))

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> Packed:
        """The rows of these numbers."""
        shape = (len(rows), self.length)
        ids, targets = np.full(shape, self._pad), np.full(shape, self._pad)
        loss, positions, documents = (
            np.zeros(shape, dtype=bool),
            np.zeros(shape, dtype=np.int64),
            np.full(shape, -1),
        )
        for b, row in enumerate(rows):
            start = 0
            for document, example in enumerate(self._layout[row]):
                said, trained = self._examples[example]
                end = start + len(said) - 1
                ids[b, start:end], targets[b, start:end] = said[:-1], said[1:]
                loss[b, start:end] = trained[1:]
                positions[b, start:end] = np.arange(end - start)
                documents[b, start:end] = document
                start = end
            positions[b, start:] = np.arange(self.length - start)
        return Packed(*map(torch.from_numpy, (ids, targets, loss, positions, documents)))


def pack(examples: Iterable[Rendered], length: int, pad: int) -> tuple[PackedRows, Dropped]:
    """Put examples into rows of `length` inputs, best fit decreasing: the longest first, each into the row in
    which it leaves the least room. Equal lengths keep their order: a pure function of its arguments.

    They are kept in 8 bytes a token, so let them come one at a time: as lists each takes five times that.
    What follows an example's last trained id teaches nothing and is left off. An example with more than
    length + 1 ids is cut to them, and an assistant's turn that was cut has no stop. One in which nothing is
    left that counts is left out. `Dropped` has both: "cut to the row's length", "nothing left to learn".
    """
    assert length > 0, length
    dropped = Dropped()
    kept: list[NDArray[Any]] = []
    for ids, trained in examples:
        end = max((i for i, counts in enumerate(trained) if counts), default=-1) + 1
        if end > length + 1:
            dropped["cut to the row's length"] += 1
            end = length + 1
        if not any(trained[1:end]):  # the first id is never predicted
            dropped["nothing left to learn"] += 1
            continue
        kept.append(np.array([ids[:end], trained[:end]], dtype=np.int32))
    return PackedRows(
        kept, _best_fit([example.shape[1] - 1 for example in kept], length), length, pad
    ), dropped


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which items share a row. Each has at least one and at most `length` tokens, so each finds room."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # room left → rows that have it
    open_rooms = 0  # bit r: some row has room r
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        enough = open_rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(item)
        by_room[room - size].append(row)
        open_rooms |= 1 << (room - size)
    return rows
