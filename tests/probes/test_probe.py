"""Findings are complete, intervals cover what they claim, verdicts say what the floors allow."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from unmask.probes import probe
from unmask.probes.probe import Finding, bootstrap, draws, estimate, share_estimate, verdict, weighted_ratio

KEYS = [
    "probe",
    "metric",
    "group",
    "version",
    "child",
    "parent",
    "child_hash",
    "parent_hash",
    "text_source",
    "n",
    "n_unit",
    "dtype",
    "template",
    "value",
    "unit",
    "exact",
    "ci95",
    "floor_numeric",
    "floor_seed",
    "floor_training",
    "split_half",
    "null_specific",
    "verdict",
    "cost",
    "literature",
]


def finding(**keys):
    whole = {
        "probe": "T1-2",
        "metric": "js",
        "child": "sft",
        "value": 1.0,
        "unit": "nats/token",
        "ci95": (0.5, 1.5),
    }
    return Finding(**(whole | {"n": 3, "n_unit": "prompt"} | keys))


def test_the_json_record_has_every_key_of_the_schema_with_null_where_nothing_is_known():
    record = finding().to_json()
    assert list(record) == KEYS
    assert record["parent"] is None
    assert record["ci95"] == [0.5, 1.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"unit": ""},
        {"ci95": None},
        {"n": None},
        {"n": 0},
        {"n_unit": None},
        {"value": None},
        {"value": math.nan},
        {"ci95": (2.0, 1.0)},
        {"value": 2.0, "ci95": (0.0, 1.0)},
        {"metric": "Not a name"},
        {"colour": "red"},
    ],
    ids=str,
)
def test_a_finding_without_unit_interval_or_n_cannot_be_made(wrong):
    with pytest.raises(ValidationError):
        finding(**wrong)


def test_exact_numbers_need_no_interval_and_abstaining_ones_no_value():
    assert finding(exact=True, ci95=None, n=None, n_unit=None).ci95 is None
    assert finding(value=None, ci95=None, verdict="abstain: n = 0").value is None


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.integers(0, 9))
def test_weights_give_the_same_resample_means_as_picking_rows(values, seed):
    drawn = draws(len(values), 20, seed)
    picked = np.random.default_rng(seed).integers(0, len(values), (20, len(values)))
    by_rows = [np.mean([values[i] for i in row]) for row in picked]
    np.testing.assert_allclose(probe.weighted_mean(np.array(values), drawn), by_rows, atol=1e-12)


def test_the_interval_of_a_mean_agrees_with_the_normal_one_and_covers_it_nine_times_in_ten():
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        sample = rng.normal(3.0, 2.0, 60)
        low, high = bootstrap(sample, n=400, seed=i)
        inside += low <= 3.0 <= high
    assert 0.90 <= inside / 200 <= 0.985
    low, high = bootstrap(sample, seed=1)
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / math.sqrt(60), rel=0.1)


def test_values_of_one_cluster_are_drawn_together():
    """30 clusters of 10 equal values are 30 observations: the interval is √10 times that of 300."""
    rng = np.random.default_rng(1)
    values, clusters = np.repeat(rng.normal(size=30), 10), np.repeat(np.arange(30), 10).tolist()
    low, high = bootstrap(values, clusters)
    narrow_low, narrow_high = bootstrap(values)
    assert (high - low) / (narrow_high - narrow_low) == pytest.approx(math.sqrt(10), rel=0.12)
    assert estimate(values, clusters).n == 30


def test_blocks_of_resamples_change_nothing(monkeypatch):
    values = np.random.default_rng(2).normal(size=40)
    whole = bootstrap(values, n=100)
    monkeypatch.setattr(probe, "BLOCK", 7 * 40)
    assert bootstrap(values, n=100) == whole


def test_fewer_than_two_units_have_no_interval_and_abstain():
    assert bootstrap([1.0]) is None
    assert bootstrap([1.0, 2.0], ["one", "one"]) is None
    fields = estimate([1.0]).fields("prompt")
    assert fields["verdict"] == "abstain: n = 1"
    assert Finding(probe="T1-2", metric="js", child="sft", unit="1", **fields).value == 1.0
    nothing = Finding(probe="T1-2", metric="js", child="sft", unit="1", **estimate([]).fields("prompt"))
    assert nothing.value is None


def test_none_of_a_hundred_still_allows_more_than_three_per_cent():
    """Clopper–Pearson: the largest p under which 0 of n has probability 2.5 %."""
    found = share_estimate(np.zeros(100))
    assert found.ci95[0] == 0.0
    assert (1 - found.ci95[1]) ** 100 == pytest.approx(0.025)
    assert share_estimate(np.ones(100)).ci95 == (1 - found.ci95[1], 1.0)


def test_a_ratio_of_sums_is_not_the_mean_of_ratios():
    pairs = np.array([[1.0, 1.0], [9.0, 3.0], [0.0, 6.0]])
    assert estimate(pairs, statistic=weighted_ratio).value == 1.0


@pytest.mark.parametrize(
    ("ci", "floors", "word"),
    [
        ((0.2, 0.4), {"numeric": 0.1}, "above the numeric floor (no seed or training floor)"),
        ((0.05, 0.4), {"numeric": 0.1}, "not distinguishable (no seed or training floor)"),
        ((-0.4, -0.2), {"numeric": 0.1}, "above the numeric floor (no seed or training floor)"),
        ((-0.4, 0.2), {"numeric": 0.0}, "not distinguishable (no seed or training floor)"),
        ((0.0, 0.0), {"numeric": 0.0}, "not distinguishable (no seed or training floor)"),
        ((0.2, 0.4), {"numeric": 0.1, "seed": 0.15}, "detected (no training floor)"),
        ((0.2, 0.4), {"numeric": 0.1, "seed": 0.25}, "not distinguishable (no training floor)"),
        ((0.2, 0.4), {"numeric": 0.1, "seed": 0.15, "training": 0.3}, "detected"),
        ((0.2, 0.4), {"numeric": 0.1, "seed": 0.15, "training": 0.18}, "specific"),
        (None, {"numeric": 0.1}, "abstain: no interval"),
        ((0.2, 0.4), {"numeric": None}, "abstain: no numeric floor"),
    ],
)
def test_verdict_says_no_more_than_the_floors_allow(ci, floors, word):
    assert verdict(ci, **floors) == word


def test_an_effect_is_measured_from_what_no_change_would_give():
    assert verdict((60.0, 70.0), zero=100.0, numeric=2.0).startswith("above the numeric floor")
    assert verdict((60.0, 99.0), zero=100.0, numeric=2.0).startswith("not distinguishable")
