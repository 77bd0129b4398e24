"""How a step gets its rows: which of several sources it draws, and how unequal ones are cut and padded."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.text import order


class Drawn(NamedTuple):
    source: int
    row: int


def drawn(step: int, batch: int, sizes: Sequence[int], shares: Sequence[float], seed: int) -> list[Drawn]:
    """The `batch` rows of a step, from sources of `sizes` rows mixed in `shares`.

    A pure function of its arguments. Every source goes through all its rows in a shuffled order before one
    comes again, however the shares are.
    """
    sources, running = order.mixture(step, batch, shares)
    return [
        Drawn(int(source), order.row_at(int(k), sizes[source], seed + int(source)))
        for source, k in zip(sources, running, strict=True)
    ]


def by_length(lengths: Sequence[int], most_tokens: int, rows: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in groups of similar length, longest first, each of at most `most_tokens` once padded.

    A group takes its rows × its longest one; an index brings one row, or as many as `rows` says. What alone is
    more than `most_tokens` stands alone. Equal lengths keep their order, so the groups are a pure function of
    the arguments.
    """
    rows = [1] * len(lengths) if rows is None else rows
    groups: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (held + rows[index]) * lengths[groups[-1][0]] <= most_tokens:
            groups[-1].append(index)
            held += rows[index]
        else:
            groups.append([index])
            held = rows[index]
    return groups


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU fetches it from pinned memory while the CPU goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with T the longest row, and lengths (B,), both int64.

    Padding is 0 and lies to the right: a causal model never lets a real token see it, and whoever reads its
    outputs goes by the lengths, never by the id.
    """
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return sent(ids, device), sent(lengths, device)


def fingerprint(rows: Iterable[Sequence[int]]) -> str:
    """SHA-256 of rows of ids, in their order; where a row ends counts too."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([len(row), *row], dtype="<i8").tobytes())
    return digest.hexdigest()
