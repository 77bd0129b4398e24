"""What is told of one response: the numbers read at each of its positions, and the metrics made of them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask import delta
from unmask.probes.forward import Read
from unmask.probes.probe import Floats

# What is read at each position for each pair of models.
KL_CHILD_PARENT, KL_PARENT_CHILD, JS, RANK, TIES, ENTROPY_PARENT, COLUMNS = range(7)


def read_pairs(places: Sequence[tuple[int, int]]) -> Read:
    """A read of COLUMNS numbers for each (parent, child) place among the models, side by side."""

    def read(logits: Sequence[Tensor], targets_N: Tensor) -> Tensor:
        columns: list[Tensor] = []
        for parent, child in places:
            far = delta.divergences(logits[child], logits[parent])
            rank_N, ties_N = delta.shift(logits[child], logits[parent])
            columns += [
                far.kl_child_parent_T,
                far.kl_parent_child_T,
                far.js_T,
                rank_N,
                ties_N,
                far.entropy_parent_T,
            ]
        return torch.stack([column.float() for column in columns], 1)

    return read


class Metric(NamedTuple):
    """A number of one response, from its rows (A, COLUMNS); NaN where the response is too short to have it.

    `same` is what two equal models give, which is what the floor and the verdict count from; None where
    no such value exists.
    """

    probe: str
    name: str
    unit: str
    of: Callable[[Floats], float]
    group: str | None = None
    same: float | None = 0.0


def half_life(row: Floats) -> float:
    """The least k for which the first k tokens hold half of the summed kl_child_parent; NaN where all
    of it is 0."""
    total = np.cumsum(row[:, KL_CHILD_PARENT])
    return float(np.searchsorted(total, total[-1] / 2) + 1) if total[-1] > 0 else math.nan


def early_share(row: Floats, k: int) -> float:
    """Share of the summed kl_child_parent that the first k of T tokens hold, less k/T; NaN without more
    than k tokens."""
    kl = row[:, KL_CHILD_PARENT]
    return float(kl[:k].sum() / kl.sum() - k / len(kl)) if len(kl) > k and kl.sum() > 0 else math.nan


def mean_of(column: int, first: int = 1, last: int | None = None) -> Callable[[Floats], float]:
    """Mean of a column over the tokens first to last (from 1) that a response has."""
    return lambda row: float(row[first - 1 : last, column].mean()) if len(row) >= first else math.nan


def share_of(low: int, high: float, first: int = 1, last: int | None = None) -> Callable[[Floats], float]:
    """Per cent of the tokens first to last at which the child's likeliest token has rank low to high
    under the parent."""

    def read(row: Floats) -> float:
        rank = row[first - 1 : last, RANK]
        return 100 * float(((rank >= low) & (rank <= high)).mean()) if len(rank) else math.nan

    return read


KL = Metric("T1-2", "kl_child_parent", "nats/token", mean_of(KL_CHILD_PARENT))
DISTANCES = (
    KL,
    Metric("T1-2", "kl_parent_child", "nats/token", mean_of(KL_PARENT_CHILD)),
    Metric("T1-2", "js", "nats/token", mean_of(JS)),
)
SHIFTS = (
    Metric("T1-1", "unshifted", "%", share_of(1, 1), same=100.0),
    Metric("T1-1", "marginal", "%", share_of(2, 3)),
    Metric("T1-1", "shifted", "%", share_of(4, math.inf)),
)
SPANS = (
    ("token 1", 1, 1),
    ("token 2", 2, 2),
    ("tokens 3–5", 3, 5),
    ("tokens 6–10", 6, 10),
    ("tokens 11–20", 11, 20),
    ("tokens 21+", 21, None),
)
PROFILE = (
    Metric(
        "T1-2", "kl_child_parent_response", "nats/response", lambda row: float(row[:, KL_CHILD_PARENT].sum())
    ),
    Metric("T1-2", "depth_half_life", "tokens", half_life, same=None),
    *(
        Metric("T1-2", "early_share", "1", partial(early_share, k=k), f"first {k}", same=None)
        for k in (1, 3, 5, 10)
    ),
    *(
        metric
        for group, first, last in SPANS
        for metric in (
            Metric("T1-2", "kl_child_parent", "nats/token", mean_of(KL_CHILD_PARENT, first, last), group),
            Metric(
                "T1-2", "entropy_parent", "nats/token", mean_of(ENTROPY_PARENT, first, last), group, same=None
            ),
        )
    ),
)
BY_POSITION = (
    *(
        Metric("T1-1", "unshifted", "%", share_of(1, 1, first, last), group, 100.0)
        for group, first, last in SPANS
    ),
    Metric("T1-1", "ties", "%", lambda row: 100 * float((row[:, TIES] > 0).mean())),
)


def defined(read: Callable[[Floats], float], rows: Sequence[Floats]) -> Floats:
    """What `read` makes of each response that has it."""
    values = np.array([read(row) for row in rows], dtype=np.float64)
    return values[np.isfinite(values)]
