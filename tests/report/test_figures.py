"""A figure shows its numbers where they are, in its text as well, and follows the page's colours."""

import re
import sys
from itertools import pairwise

import pytest

from unmask.errors import UserError
from unmask.report.figures import POINTS, Dot, Figure, Series, dots, lines, thin

ONE, TWO = Series.of("one", 0), Series.of("two", 1, hollow=True)


def drawn(**options: object) -> Figure:
    points = [
        Dot("first", ONE, 0.2, 0.1, 0.3, "0.2 (0.1 to 0.3)"),
        Dot("first", TWO, 0.5, 0.4, 0.9, "0.5 (0.4 to 0.9)"),
        Dot("second", ONE, 0.7, 0.7, 0.7, "0.7"),
    ]
    return dots("Title", "Caption.", points, axis="share", **options)  # type: ignore[arg-type]


def translations(svg: str, role: str) -> list[tuple[float, float]]:
    """Where the marks of a kind are moved to."""
    inside = "".join(re.findall(rf'<g class="mark-{role} role-mark.*?</g>', svg, re.S))
    return [
        (float(x), float(y)) for x, y in re.findall(r'transform="translate\(([-\d.]+),([-\d.]+)\)"', inside)
    ]


def test_dots_stand_at_their_values_and_series_below_one_another() -> None:
    figure = drawn(domain=(0.0, 1.0))
    points = translations(figure.svg, "symbol")
    assert len(points) == 3
    (a, b), (c, _) = sorted(points)[:2], sorted(points)[2]
    assert (b[0] - a[0]) / (c - a[0]) == pytest.approx((0.5 - 0.2) / (0.7 - 0.2), abs=1e-3)
    assert b[1] > a[1]
    lengths = [
        float(x2) for x2 in re.findall(r'<line[^>]*?transform="[^"]*" x2="([\d.]+)" y2="0"', figure.svg)
    ]
    assert max(lengths) / (c - a[0]) == pytest.approx((0.9 - 0.4) / (0.7 - 0.2), abs=1e-3)
    rules = translations(figure.svg, "rule")
    assert sorted(x for x, _ in rules)[0] == pytest.approx(a[0] - (b[0] - a[0]) / 3, abs=0.1)


def test_a_logarithmic_axis_is_one() -> None:
    points = [Dot(str(x), ONE, x, x, x, "") for x in (0.001, 0.01, 1.0)]
    svg = dots("T", "C", points, axis="nats", log=True).svg
    left, middle, right = sorted(x for x, _ in translations(svg, "symbol"))
    assert (middle - left) / (right - left) == pytest.approx(1 / 3, abs=1e-3)


def test_every_number_stands_in_the_table_too() -> None:
    figure = drawn()
    assert figure.header == ["", "one", "two"]
    assert figure.rows == [["first", "0.2 (0.1 to 0.3)", "0.5 (0.4 to 0.9)"], ["second", "0.7", "–"]]


def test_series_differ_without_colour() -> None:
    series = [Series.of(str(place), place, hollow=hollow) for place in range(4) for hollow in (False, True)]
    assert len({each.sign for each in series}) == len(series)


def test_colours_are_those_of_the_page_and_nothing_is_loaded() -> None:
    curve = lines("T", "C", [(ONE, [(0, 1), (1, 2)])], x_title="step", y_title="nats").svg
    for svg in (drawn(reference=0.5).svg, curve):
        assert "var(--layer-0)" in svg
        assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r"url\(#[^)]*\)", "", svg))
        assert "http" not in svg
        assert "NaN" not in svg


def test_labels_are_escaped() -> None:
    point = Dot("<script>alert(1)</script>", ONE, 0.5, 0.4, 0.6, "")
    assert "<script" not in dots("T", "C", [point], axis="<b>").svg


def test_long_curves_become_means_of_neighbours() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    few = thin(points)
    assert len(few) <= POINTS
    assert all(a < b for (a, _), (b, _) in pairwise(few))
    step = -(-len(points) // POINTS)
    assert few[0] == (pytest.approx((step - 1) / 2), pytest.approx(sum(y for _, y in points[:step]) / step))
    assert few[-1][0] == pytest.approx(
        sum(x for x, _ in points[(len(few) - 1) * step :]) / (len(points) - (len(few) - 1) * step)
    )
    assert thin(points[:5]) == points[:5]
    assert thin([]) == []


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"pip install 'unmask\[report\]'"):
        drawn()
