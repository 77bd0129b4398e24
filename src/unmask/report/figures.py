"""Figures as SVG, drawn when the page is written: no JavaScript and no network when it is read.

Two kinds serve the whole page: dots with their intervals, and lines over training. Colours are the page's CSS
variables, so that a figure follows the reader's light or dark ground; series differ in shape as well. Each figure
comes with the table of its numbers.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from markupsafe import Markup

from unmask.colours import layer_colour
from unmask.errors import UserError
from unmask.files import sha256_hex

WIDTH, NARROW = 360, 280  # with labels: a figure fits a phone as it is, and is enlarged on a desk
ROW, SERIES_GAP = 24, 12
POINTS = 240  # of a line: what a screen can show

SHAPES = {
    "■": "square",
    "▲": "triangle-up",
    "●": "circle",
    "◆": "diamond",
    "▼": "triangle-down",
    "|": "stroke",
}
HOLLOW = {"■": "□", "▲": "△", "●": "○", "◆": "◇", "▼": "▽"}

INK, SOFT, LINE = "var(--ink)", "var(--soft)", "var(--line)"
STYLE: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "padding": 2,
    "autosize": {"type": "fit", "contains": "padding"},
    "view": {"stroke": None},
    "axis": {
        "labelColor": SOFT,
        "titleColor": SOFT,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 6,
        "gridColor": LINE,
        "domain": False,
        "ticks": False,
        "labelPadding": 6,
    },
    "axisY": {"labelLimit": 130},
}


@dataclass(frozen=True)
class Series:
    """A set of points or a line: its name in the legend, its colour, and a mark that tells it without colour."""

    name: str
    colour: str
    mark: str
    hollow: bool = False
    dash: tuple[int, ...] = ()

    @property
    def sign(self) -> str:
        """The mark as a character, for the legend."""
        return HOLLOW.get(self.mark, self.mark) if self.hollow else self.mark

    @staticmethod
    def of(name: str, place: int, *, hollow: bool = False, dash: tuple[int, ...] = ()) -> "Series":
        """In the colour and with the mark of the layer at this place."""
        colour = f"var(--layer-{place})" if place >= 0 else "var(--layer-none)"
        return Series(name, colour, layer_colour(place).mark if place >= 0 else "|", hollow, dash)


class Dot(NamedTuple):
    row: str
    series: Series
    value: float
    low: float
    high: float
    label: str  # the value with its interval, for the table


class Figure(NamedTuple):
    title: str
    caption: str
    svg: Markup
    legend: list[Series]
    header: list[str]
    rows: list[list[str]]


def dots(
    title: str,
    caption: str,
    points: Sequence[Dot],
    *,
    axis: str,
    domain: tuple[float, float] | None = None,
    percent: bool = False,
    log: bool = False,
    reference: float | None = None,
) -> Figure:
    """Values with their intervals, a row for each group; series of a row stand below one another.

    `reference` draws an upright line, as chance. With `log` the axis is logarithmic: all ends must be above 0.
    """
    alt = _altair()
    rows = list(dict.fromkeys(point.row for point in points))
    legend = list(dict.fromkeys(point.series for point in points))
    names = [series.name for series in legend]
    data = alt.Data(
        values=[
            {"row": p.row, "series": p.series.name, "value": p.value, "low": p.low, "high": p.high}
            for p in points
        ]
    )
    scale: dict[str, Any] = {"zero": False, "nice": domain is None}
    ticks: dict[str, Any] = {"tickCount": 5}
    if log:
        powers = _powers_of_ten(min(p.low for p in points), max(p.high for p in points))
        scale, ticks = {"type": "log", "domain": [powers[0], powers[-1]]}, {"values": powers}
        ticks["labelExpr"] = "format(datum.value, datum.value < 0.01 ? '.0e' : '~r')"
    elif domain is not None:
        scale["domain"] = list(domain)
    x_axis = alt.Axis(title=axis, format=".0%" if percent else "~r", **ticks)
    y = alt.Y("row:N", sort=rows, title=None, axis=alt.Axis(labelColor=INK, domain=False))
    offset = alt.YOffset("series:N", sort=names, scale=alt.Scale(domain=names, paddingOuter=0.6))
    colour = alt.Color(
        "series:N", scale=alt.Scale(domain=names, range=[s.colour for s in legend]), legend=None
    )
    base = alt.Chart(data)
    bars = base.mark_rule(strokeWidth=2, opacity=0.55).encode(
        x=alt.X("low:Q", scale=alt.Scale(**scale), axis=x_axis),
        x2="high:Q",
        y=y,
        yOffset=offset,
        color=colour,
    )
    layers = [bars]
    for series in legend:
        look: dict[str, Any] = {"fill": "var(--raised)"} if series.hollow else {"filled": True}
        if series.mark == "|":
            look = {"angle": 90, "strokeWidth": 2.4, "size": 130}
        mark = base.transform_filter(alt.datum.series == series.name).mark_point(
            **{"shape": SHAPES[series.mark], "size": 55, "opacity": 1, "strokeWidth": 1.6, **look}
        )
        layers.append(mark.encode(x=alt.X("value:Q"), y=y, yOffset=offset, color=colour))
    if reference is not None:
        line = alt.Chart(alt.Data(values=[{"at": reference}])).mark_rule(color=SOFT, strokeDash=[2, 3])
        layers.insert(0, line.encode(x=alt.X("at:Q", scale=alt.Scale(**scale), axis=x_axis)))
    height = 40 + len(rows) * (ROW + SERIES_GAP * (len(legend) - 1))
    svg = _svg(alt.layer(*layers).properties(width=WIDTH, height=height))
    header, table = _table(points, legend, rows)
    return Figure(title, caption, svg, legend, header, table)


def lines(
    title: str,
    caption: str,
    curves: Sequence[tuple[Series, Sequence[tuple[float, float]]]],
    *,
    x_title: str,
    y_title: str,
) -> Figure:
    """Curves over training. A curve of more points than a screen shows is drawn as means of neighbours."""
    alt = _altair()
    names = [series.name for series, _ in curves]
    thinned = [(series, thin(points)) for series, points in curves]
    values = [{"x": x, "y": y, "series": series.name} for series, points in thinned for x, y in points]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=1.8, clip=True)
        .encode(
            x=alt.X("x:Q", title=x_title, axis=alt.Axis(grid=False, tickCount=4, format="~s")),
            y=alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "series:N", scale=alt.Scale(domain=names, range=[s.colour for s, _ in curves]), legend=None
            ),
            strokeDash=alt.StrokeDash(
                "series:N",
                scale=alt.Scale(domain=names, range=[list(s.dash) or [1, 0] for s, _ in curves]),
                legend=None,
            ),
        )
        .properties(width=NARROW, height=150)
    )
    header = [x_title, *names]
    rows = _sampled(thinned)
    legend = [replace(series, mark="╌" if series.dash else "─") for series, _ in curves]
    return Figure(title, caption, _svg(chart), legend, header, rows)


def _powers_of_ten(low: float, high: float) -> list[float]:
    """From the last one that is at most `low` to the first that is at least `high`."""
    return [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, at most POINTS of them."""
    step = -(-len(points) // POINTS) or 1
    chunks = [points[i : i + step] for i in range(0, len(points), step)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def _table(
    points: Sequence[Dot], legend: Sequence[Series], rows: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    found = {(point.row, point.series): point.label for point in points}
    header = ["", *(series.name for series in legend)]
    return header, [[row, *(found.get((row, series), "–") for series in legend)] for row in rows]


def _sampled(
    curves: Iterable[tuple[Series, Sequence[tuple[float, float]]]], rows: int = 8
) -> list[list[str]]:
    """A few points of each curve, for the table: all curves at the places of the first."""
    columns = [points for _, points in curves]
    n = min(map(len, columns))
    picked = sorted({round(i * (n - 1) / (rows - 1)) for i in range(rows)}) if n else []
    return [[f"{columns[0][i][0]:,.0f}", *(f"{column[i][1]:.4g}" for column in columns)] for i in picked]


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the page's figures need the extra 'report' ({error.name} is missing): pip install 'unmask[report]'"
        ) from error
    return altair


def _svg(chart: Any) -> Markup:
    """The chart as inline SVG that scales with its box; readers of screens get the caption and the table instead."""
    import vl_convert

    spec = chart.to_dict()
    spec["config"] = STYLE
    svg = vl_convert.vegalite_to_svg(spec)
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    assert size is not None
    body = svg[svg.index(">") + 1 :]
    prefix = f"f{sha256_hex(svg.encode())[:8]}-"  # ids of clip paths would collide between figures of a page
    body = re.sub(r'id="(clip\d+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r"url\(#(clip\d+)\)", rf"url(#{prefix}\1)", body)
    return Markup(f'<svg viewBox="0 0 {size[1]} {size[2]}" aria-hidden="true">{body}')
