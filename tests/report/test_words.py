"""Numbers on the page have a unit and no more digits than their interval allows."""

import pytest
from fake_run import finding, share

from unmask.report import words


@pytest.mark.parametrize(
    ("value", "ci95", "unit", "shown", "interval"),
    [
        (0.95612, (0.931, 0.977), "1", "0.956", "0.931 to 0.977"),
        (26.812, (25.5, 28.1), "nats", "26.8 nats", "25.5 to 28.1"),
        (-4.05, (-5.0, -3.0), "nats", "−4.0 nats", "−5.0 to −3.0"),
        (0.0123456, (0.0101, 0.0147), "nats/token", "0.0123 nats/token", "0.0101 to 0.0147"),
        (1234.5, (1100.0, 1400.0), "tokens", "1,234 tokens", "1,100 to 1,400"),
        (0.5, (0.5, 0.5), "1", "0.5", "0.5 to 0.5"),
    ],
)
def test_digits_follow_the_interval(
    value: float, ci95: tuple[float, float], unit: str, shown: str, interval: str
) -> None:
    found = finding("kl_child_parent", None, "rl", value, ci95, 100, unit)
    assert words.value(found) == shown
    assert words.interval(found) == interval


def test_shares_are_read_as_per_cent_and_say_what_n_counts() -> None:
    found = share("facts_answered", "both", "sft", 0.5, 100)
    assert words.value(found) == "50.0 %"
    assert words.told(found) == "50.0 % (40.2 to 59.8; n = 100 countries)"
    assert words.told(None) == "not measured"


def test_an_exact_number_says_so_and_has_no_interval() -> None:
    found = finding("bits_per_byte_xz", "chat", "base", 2.5291234, None, None, "bits/byte")
    assert words.value(found) == "2.529 bits/byte"
    assert words.interval(found) == "exact"
    assert words.told(found) == "2.529 bits/byte"


def test_what_could_not_be_measured_is_a_dash_and_not_a_zero() -> None:
    found = finding("gold_gain", None, "rl", 0.5, (0.4, 0.6), 9, "1")
    assert words.value(found.model_copy(update={"value": None, "ci95": None})) == "–"


@pytest.mark.parametrize(
    ("n", "shown"), [(999, "999"), (800_000, "800,000"), (3_000_000, "3 M"), (5_812_480, "5.81 M")]
)
def test_amounts(n: int, shown: str) -> None:
    assert words.amount(n) == shown
