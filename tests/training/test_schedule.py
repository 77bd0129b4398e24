"""The learning-rate schedule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.training.schedule import lr_scale, stable_phase

amounts = st.floats(0, 1000)


def test_it_rises_stays_and_falls_linearly() -> None:
    at = [lr_scale(done, 100, 10, 50, floor=0.1) for done in (0, 5, 10, 30, 50, 75, 100)]
    assert at == pytest.approx([0, 0.5, 1, 1, 1, 0.55, 0.1])


@settings(deadline=None)
@given(done=amounts, total=amounts, warmup=amounts, decay=amounts, floor=st.floats(0, 1))
def test_it_stays_between_zero_and_one(
    done: float, total: float, warmup: float, decay: float, floor: float
) -> None:
    assert 0 <= lr_scale(done, total, warmup, decay, floor) <= 1


@settings(deadline=None)
@given(done=st.floats(0, 50), longer=st.floats(0, 1000))
def test_before_the_decay_the_length_of_the_training_does_not_matter(done: float, longer: float) -> None:
    """So a checkpoint of the stable phase can be branched into trainings of any length."""
    assert lr_scale(done, 100, 20, 50) == lr_scale(done, 100 + longer, 20, 50)


@settings(deadline=None)
@given(steps=st.integers(1, 60), tokens=st.integers(1, 50), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_in_the_stable_phase_neither_warm_up_nor_decay_change_a_rate(
    steps: int, tokens: int, warmup: float, decay: float
) -> None:
    """Of the steps from its beginning to its end each has rate 1."""
    total = steps * tokens
    stable = stable_phase(steps, tokens, warmup * total, decay * total)
    for step in list(stable)[:-1]:
        assert lr_scale((step + 0.5) * tokens, total, warmup * total, decay * total) == 1


def test_the_stable_phase_is_from_the_end_of_the_warm_up_to_the_step_before_the_decay() -> None:
    assert stable_phase(10, 100, 200, 500) == range(2, 6)
    assert stable_phase(10, 100, 201, 450) == range(3, 6)  # the sixth step's middle is where the decay begins
    assert stable_phase(10, 100, 200, 400) == range(2, 7)
    assert stable_phase(10, 100, 0, 0) == range(1, 11)  # never after 0 steps: nothing was trained yet
    assert not stable_phase(10, 100, 501, 500)  # still warming up


def test_without_warm_up_and_decay_it_is_constant() -> None:
    assert {lr_scale(done, 100, 0, 0) for done in (0, 50, 100)} == {1.0}


def test_where_warm_up_and_decay_overlap_the_smaller_holds() -> None:
    assert [lr_scale(done, 100, 100, 100) for done in (25, 50, 75)] == pytest.approx([0.25, 0.5, 0.25])
