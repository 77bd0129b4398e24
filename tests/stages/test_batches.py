"""Rows of a step: drawn as a pure function, grouped by length without loss, padded to the right."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.stages.batches import by_length, drawn, fingerprint, pad_right


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 1)), min_size=1, max_size=3), st.integers(0, 99))
def test_every_source_gives_all_its_rows_before_one_comes_again(
    sources: list[tuple[int, float]], seed: int
) -> None:
    sizes, shares = [n for n, _ in sources], [share for _, share in sources]
    seen: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    for step in range(12):
        rows = drawn(step, 5, sizes, shares, seed)
        assert rows == drawn(step, 5, sizes, shares, seed)
        for source, row in rows:
            seen[source].append(row)
    for source, size in enumerate(sizes):
        for start in range(0, len(seen[source]) - size + 1, size):
            assert sorted(seen[source][start : start + size]) == list(range(size))
        assert abs(len(seen[source]) - 60 * shares[source] / sum(shares)) <= len(sizes)


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    rows = drawn(0, 60, [30, 30], [1.0, 1.0], 1)
    assert [row for source, row in rows if source == 0] != [row for source, row in rows if source == 1]


def test_another_seed_draws_in_another_order() -> None:
    assert drawn(0, 50, [50], [1.0], 1) != drawn(0, 50, [50], [1.0], 2)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), max_size=40), st.integers(1, 200))
def test_groups_by_length_lose_nothing_fit_and_hold_neighbours(
    items: list[tuple[int, int]], most: int
) -> None:
    lengths, rows = [length for length, _ in items], [n for _, n in items]
    groups = by_length(lengths, most, rows)
    assert Counter(i for group in groups for i in group) == Counter(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(rows[i] for i in group) * max(lengths[i] for i in group) <= most
    assert by_length(lengths, most) == by_length(lengths, most, [1] * len(lengths))
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths, reverse=True)


def test_padding_lies_to_the_right_and_lengths_tell_it_from_a_real_id_0() -> None:
    ids, lengths = pad_right([[5, 0], [7], [1, 2, 3]], torch.device("cpu"))
    assert ids.tolist() == [[5, 0, 0], [7, 0, 0], [1, 2, 3]]
    assert lengths.tolist() == [2, 1, 3]


def test_a_fingerprint_changes_with_ids_order_and_row_boundaries() -> None:
    variants = [[[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 3]], [[1, 2], [4]], [[1, 2], [3], []]]
    assert len({fingerprint(rows) for rows in variants}) == len(variants)
    assert fingerprint(variants[0]) == fingerprint(tuple(tuple(row) for row in variants[0]))
