"""The order of the data is a pure function: every row once an epoch, every source its share."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.text import order


@given(st.integers(-5, 2**40), st.integers(0, 1000), st.integers(0, 200))
def test_a_permutation_holds_every_number_once(seed: int, epoch: int, n: int) -> None:
    assert sorted(order.permutation(seed, epoch, n)) == list(range(n))


def test_the_order_is_pinned() -> None:
    """If these change, resumed runs see other data: the numbers must outlive versions of numpy."""
    assert order.permutation(1, 0, 8).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    assert order.permutation(-1, 3, 8).tolist() == [7, 3, 0, 2, 5, 4, 6, 1]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(order.permutation(seed, epoch, 50)) for seed in (-2, -1, 0, 1, 2) for epoch in range(5)}
    assert len(orders) == 25


def test_rows_are_drawn_in_another_order_in_every_epoch() -> None:
    epochs = {
        tuple(order.row_at(k, 50, seed=0) for k in range(50 * epoch, 50 * epoch + 50)) for epoch in range(5)
    }
    assert len(epochs) == 5


def test_all_places_are_equally_likely() -> None:
    counts = np.zeros((5, 5))
    for seed in range(3000):
        counts[np.arange(5), order.permutation(seed, 0, 5)] += 1
    assert abs(counts - 600).max() < 6 * np.sqrt(600)


def test_a_permutation_cannot_be_changed_by_whoever_gets_it() -> None:
    with pytest.raises(ValueError):
        order.permutation(1, 0, 5)[0] = 3


@given(st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_draws_every_row_once(n: int, seed: int) -> None:
    for epoch in range(3):
        drawn = [order.row_at(k, n, seed) for k in range(epoch * n, (epoch + 1) * n)]
        assert sorted(drawn) == list(range(n))


def test_the_order_of_one_epoch_is_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    plainly = order.permutation
    monkeypatch.setattr(
        order, "permutation", lambda seed, epoch, n: drawn.append(epoch) or plainly(seed, epoch, n)
    )
    before = len(order._kept)
    for k in range(3 * 97):
        order.row_at(k, 97, seed=12345)
    assert drawn == [0, 1, 2]
    assert len(order._kept) == before + 1


SHARES = st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda shares: sum(shares) > 0.01)


@settings(deadline=None)
@given(SHARES, st.integers(1, 50), st.integers(1, 12))
def test_the_mixture_does_not_depend_on_how_slots_are_batched(
    shares: list[float], batch: int, steps: int
) -> None:
    parts = [order.mixture(step, batch, shares) for step in range(steps)]
    whole = order.mixture(0, batch * steps, shares)
    for i in (0, 1):
        assert np.concatenate([part[i] for part in parts]).tolist() == whole[i].tolist()


@settings(deadline=None)
@given(SHARES)
def test_each_source_is_drawn_in_its_share_and_counted_without_gaps(shares: list[float]) -> None:
    sources, running = order.mixture(0, 600, shares)
    for source, share in enumerate(shares):
        mine = sources == source
        assert running[mine].tolist() == list(range(mine.sum()))
        expected = np.arange(1, 601) * share / sum(shares)
        assert abs(np.cumsum(mine) - expected).max() <= len(shares) + 0.01
        if share == 0:
            assert not mine.any()


def test_the_share_is_exact_in_the_long_run() -> None:
    sources, running = order.mixture(10**6, 1000, [0.38, 0.31, 0.06, 0.25])
    for source, share in enumerate([0.38, 0.31, 0.06, 0.25]):
        assert running[sources == source][0] / 10**9 == pytest.approx(share, abs=1e-6)


def test_a_source_is_spread_evenly_over_the_slots() -> None:
    sources, _ = order.mixture(0, 400, [0.75, 0.25])
    assert {b - a for a, b in pairwise(np.flatnonzero(sources == 1))} == {4}


@pytest.mark.parametrize("shares", [[], [0.0], [1.0, -0.1], [float("nan")], [float("inf")]])
def test_shares_that_are_none_are_refused(shares: list[float]) -> None:
    with pytest.raises(UserError, match="shares"):
        order.mixture(0, 4, shares)
