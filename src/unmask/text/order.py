"""The order of the data: pure functions from a step to the rows that it trains on.

Nothing is consumed and nothing is remembered, so that a resumed run, or one with other workers, sees
exactly the rows that it would have seen.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError

_UNITS = 2**20  # shares are rounded to this many parts, so that the arithmetic is of whole numbers

_kept: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}  # (seed, rows) → epoch under way, its order


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The numbers 0 … n-1 in a shuffled order, int64 and read-only; another for every seed and epoch.

    The order sorts n draws of the Philox generator by their raw bits: those are fixed, where the algorithm of
    numpy's own `permutation` may change with its version.
    """
    state = np.random.SeedSequence([abs(seed), seed < 0, epoch])
    draws = np.random.Philox(state).random_raw(n)
    order = np.argsort(draws, kind="stable")
    order.setflags(write=False)
    return order


def row_at(k: int, n: int, seed: int) -> int:
    """The k-th row (k = 0, 1, …) ever drawn from n rows: each epoch draws all of them once.

    The order of one epoch is kept, 8 bytes a row: hardly 2 % of rows of 256 tokens on disk.
    """
    epoch, place = divmod(k, n)
    if (seed, n) not in _kept or _kept[seed, n][0] != epoch:
        _kept[seed, n] = epoch, permutation(seed, epoch, n)
    return int(_kept[seed, n][1][place])


def mixture(step: int, batch: int, shares: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which source each slot of a step's batch draws from, and the how-many-th draw from that source it is.

    Two arrays of length `batch`. Sources are spread evenly, not at random: after any number of slots each
    source has had its share of them to within one slot for each source listed up to it. Shares need not sum
    to 1. Raises UserError for shares that are negative, not finite, or all zero.
    """
    if not all(0 <= share < float("inf") for share in shares) or sum(shares) <= 0:
        raise UserError(
            f"shares of sources must be numbers of 0 or more, not all 0; they are {list(shares)}."
        )
    # The first source takes floor(j·share) of j slots; the second its part of the slots that are left; and
    # so on.
    left = [sum(shares[i:]) for i in range(len(shares))]
    weights = [round(_UNITS * share / rest) if rest else 0 for share, rest in zip(shares, left, strict=True)]
    weights[max(i for i, share in enumerate(shares) if share)] = _UNITS  # whoever is last takes what is left
    sources = np.empty(batch, dtype=np.int64)
    running = np.empty(batch, dtype=np.int64)
    for slot in range(batch):
        among_left = step * batch + slot
        for source, weight in enumerate(weights):
            before, after = among_left * weight // _UNITS, (among_left + 1) * weight // _UNITS
            if after > before:
                sources[slot], running[slot] = source, before
                break
            among_left -= before
    return sources, running
