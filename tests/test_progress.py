"""What a person sees while something runs."""

import io
import re

import pytest
from rich.console import Console

from unmask import progress
from unmask.errors import nearest
from unmask.progress import Bar, Progress, duration


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def drawn(bar: Bar, width: int = 80, encoding: str = "utf-8") -> str:
    """The bar as a terminal of this width shows it, without colours."""
    raw = io.BytesIO()
    console = Console(
        file=io.TextIOWrapper(raw, encoding),
        force_terminal=True,
        color_system=None,
        width=width,
        legacy_windows=False,
    )
    console.print(bar)
    console.file.flush()
    return raw.getvalue().decode(encoding).rstrip("\n")


def test_a_bar_shows_share_rate_numbers_and_time_left(clock: Clock) -> None:
    bar = Bar("1 base    pretrain", 100_000, "tok", 0, Console(quiet=True))
    assert drawn(bar).startswith("1 base    pretrain  ░░░░░░░░░░░░░░░░    0 %")
    clock.now += 5
    bar.advance(25_000, loss=3.21987, grad_norm=1234.5)
    assert (
        drawn(bar, 120)
        == "1 base    pretrain  ████░░░░░░░░░░░░   25 %  5,000 tok/s  loss 3.22  grad norm 1,234  15 s left"
    )
    clock.now += 15
    bar.advance(75_000, loss=2.0)
    assert drawn(bar, 120).endswith("████████████████  100 %  5,000 tok/s  loss 2  grad norm 1,234  20 s")


def test_numbers_that_do_not_fit_are_left_out_and_the_time_stays(clock: Clock) -> None:
    bar = Bar("base", 1000, "tok", 0, Console(quiet=True))
    clock.now += 1
    bar.advance(500, loss=1.5, **{f"metric_{i}": 0.125 for i in range(10)})
    line = drawn(bar, width=70)
    assert line == "base  ████████░░░░░░░░   50 %  500 tok/s  loss 1.5  1 s left"
    assert "\n" not in drawn(bar, width=30)


def test_a_terminal_without_unicode_gets_ascii(clock: Clock) -> None:
    bar = Bar("base", 4, "tok", 1, Console(quiet=True))
    assert drawn(bar, encoding="ascii").startswith("base  ####............   25 %")


def test_what_was_done_before_does_not_count_as_speed(clock: Clock) -> None:
    bar = Bar("base", 1000, "tok", 900, Console(quiet=True))
    clock.now += 2
    bar.advance(10)
    assert bar.rate == 5
    assert "91 %  5 tok/s" in drawn(bar)


def test_the_rate_is_that_of_the_last_half_minute(clock: Clock) -> None:
    bar = Bar("base", 10_000, "tok", 0, Console(quiet=True))
    for n in [100] * 60 + [10] * 60:
        clock.now += 1
        bar.advance(n)
    assert bar.rate == pytest.approx(10)


def test_without_a_terminal_there_are_plain_lines_now_and_then(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress().bar("base", 1000) as bar:
        for _ in range(1000):
            clock.now += 0.1
            bar.advance(1, loss=2.5)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 10
    assert lines[0] == "base   10 %  10 tok/s  loss 2.5  1.5 min left"
    assert lines[-1] == "base  100 %  10 tok/s  loss 2.5  1.7 min"
    assert "\x1b" not in err


def test_slow_work_gets_a_line_every_15_seconds_and_fast_work_not_more_than_one_a_second(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress().bar("slow", 1_000_000) as bar:
        for _ in range(60):
            clock.now += 1
            bar.advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 4
    with Progress().bar("fast", 100) as bar:
        for _ in range(100):
            clock.now += 0.02
            bar.advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_lines_are_plain_text_and_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().line("set aside in [v2]/[/b]")
    assert capsys.readouterr().err == "set aside in [v2]/[/b]\n"
    Progress().line("word " * 40)
    assert capsys.readouterr().err.count("\n") == 1
    quiet = Progress(quiet=True)
    quiet.line("text")
    with quiet.bar("base", 10) as bar:
        bar.advance(10)
    assert capsys.readouterr() == ("", "")


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0, 0.4, 42, 210, 7560)] == ["0 s", "< 1 s", "42 s", "3.5 min", "2.1 h"]


def test_an_unknown_name_gets_the_nearest_valid_one() -> None:
    assert nearest("warmpu", ["warmup", "decay"]) == " Did you mean 'warmup'?"
    assert nearest("xyz", ["warmup", "decay"]) == ""
    assert re.fullmatch("", nearest("a", []))
