"""Sampling: what is drawn has the distribution that is recorded, and nothing else decides it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unmask.errors import UserError
from unmask.generation.sampling import check_settings, restrict, sample, uniforms

INF = math.inf


def logits_of(probabilities: list[float]) -> Tensor:
    return torch.tensor([probabilities]).log()


def test_the_frequencies_of_what_is_drawn_are_the_softmax_of_logits_over_temperature() -> None:
    n, temperature = 200_000, 0.7
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0])
    points = torch.from_numpy(uniforms(7, 0, n))
    ids, log_probs = sample(logits.expand(n, -1), points, temperature)
    expected = (logits / temperature).softmax(-1)
    found = torch.bincount(ids, minlength=5) / n
    assert torch.all((found - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt())
    assert torch.allclose(log_probs, expected.log()[ids], atol=1e-6)


def test_every_token_owns_an_interval_of_the_uniform_numbers_of_its_probability() -> None:
    points = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    ids, _ = sample(logits_of([0.25, 0.5, 0.25]).expand(6, -1), points, 1.0)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_rare_tokens_are_drawn_with_their_own_probability_and_not_one_that_rounding_chose() -> None:
    # Float32 steps near 1 are 6e-8 wide: a tail of 1e-10 would own no interval at all.
    logits = torch.tensor([[0.0, math.log(1e-10)]]).expand(2, -1)
    ids, log_probs = sample(logits, torch.tensor([1 - 2e-10, 1 - 0.5e-10], dtype=torch.float64), 1.0)
    assert ids.tolist() == [0, 1]
    assert log_probs[1].item() == pytest.approx(math.log(1e-10), abs=1e-4)


@given(st.integers(0, 2**32), st.floats(0, 1, exclude_max=True))
def test_a_token_of_probability_zero_is_never_drawn(seed: int, u: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    logits[:, 20:] = -INF
    logits[:, 0] = -INF
    for point in (u, 0.0, 1 - 2**-53):
        ids, _ = sample(logits, torch.tensor([point], dtype=torch.float64), 1.0)
        assert 0 < int(ids) < 20


def test_temperature_zero_takes_the_lowest_id_of_the_likeliest_and_records_it_at_temperature_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 0.0, 1.0, -1.0]])
    for u in (0.0, 0.999):
        ids, log_probs = sample(logits, torch.full((2,), u), 0.0)
        assert ids.tolist() == [1, 0]
        assert torch.allclose(log_probs, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])


def test_the_recorded_log_probability_ignores_top_k_and_top_p() -> None:
    logits = logits_of([0.5, 0.3, 0.2])
    ids, log_probs = sample(logits, torch.tensor([0.99]), 1.0, top_k=2)
    assert ids.tolist() == [1]
    assert log_probs.item() == pytest.approx(math.log(0.3), abs=1e-6)


@pytest.mark.parametrize("top_k", [0, 5, 6, 1_000_000])
def test_top_k_of_zero_or_not_below_the_vocabulary_restricts_nothing(top_k: int) -> None:
    log_probs = torch.randn(3, 5).log_softmax(-1)
    assert torch.equal(restrict(log_probs, top_k), log_probs)


def test_top_k_keeps_the_k_likeliest_and_whatever_ties_with_the_last_of_them() -> None:
    log_probs = logits_of([0.1, 0.4, 0.2, 0.2, 0.1])
    assert (restrict(log_probs, 1) > -INF).tolist() == [[False, True, False, False, False]]
    assert (restrict(log_probs, 2) > -INF).tolist() == [[False, True, True, True, False]]
    assert (restrict(log_probs, 3) > -INF).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, [False, True, False, False]),  # one at least
        (0.4999, [False, True, False, False]),
        (0.5001, [False, True, True, True]),  # 0.2 and 0.2 tie
        (0.8999, [False, True, True, True]),
        (0.9001, [True, True, True, True]),
        (1.0, [True, True, True, True]),
    ],
)
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_with_that_mass(
    top_p: float, kept: list[bool]
) -> None:
    assert (restrict(torch.tensor([[0.1, 0.5, 0.2, 0.2]]).double().log(), 0, top_p) > -INF).tolist() == [kept]


def test_top_p_counts_the_mass_within_what_top_k_left() -> None:
    # Of the two kept by top-k the first has 0.4 / 0.7 > 0.55, though only 0.4 of everything.
    assert (restrict(logits_of([0.4, 0.3, 0.2, 0.1]), 2, 0.55) > -INF).tolist() == [
        [True, False, False, False]
    ]


@given(st.integers(0, 2**32), st.integers(0, 60), st.floats(0, 1))
def test_restricting_never_empties_a_row_and_keeps_every_token_at_least_as_likely_as_one_it_keeps(
    seed: int, top_k: int, top_p: float
) -> None:
    log_probs = (
        torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)).mul(3).round().log_softmax(-1)
    )
    for row, kept in zip(log_probs, restrict(log_probs, top_k, top_p) > -INF, strict=True):
        assert kept.any()
        assert torch.equal(kept, row >= row[kept].min())


def test_a_uniform_number_depends_on_seed_stream_and_place_alone() -> None:
    assert np.array_equal(uniforms(3, 5, 10), uniforms(3, 5, 100)[:10])
    first = uniforms(3, 5, 10)
    for other in (uniforms(4, 5, 10), uniforms(3, 6, 10), uniforms(5, 3, 10)):
        assert not np.isin(first, other).any()
    assert first.min() >= 0
    assert first.max() < 1


def test_uniform_numbers_are_uniform_along_a_stream_and_across_streams() -> None:
    along = uniforms(1, 1, 4000)
    across = np.array([uniforms(1, stream, 1)[0] for stream in range(4000)])
    for numbers in (along, across):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 50  # χ² with 19 degrees of freedom: p < 2e-4 beyond


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "named"),
    [(-0.1, 0, 1.0, "temperature"), (math.nan, 0, 1.0, "temperature"), (INF, 0, 1.0, "temperature"),
     (1.0, -1, 1.0, "top_k"), (1.0, 0, 1.01, "top_p"), (1.0, 0, -0.1, "top_p"), (1.0, 0, math.nan, "top_p")],
)  # fmt: skip
def test_settings_that_describe_no_distribution_are_named(
    temperature: float, top_k: int, top_p: float, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        check_settings(temperature, top_k, top_p)
