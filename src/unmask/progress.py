"""What a person sees while something long runs: a live bar on a terminal, plain lines elsewhere.

Everything here goes to standard error, so that a command's result on standard output stays clean.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

# For str.translate: a model may say the bytes that clear a screen.
UNPRINTABLE = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "�")

_WIDTH = 16  # cells of the bar
_WINDOW = 30.0  # seconds that the rate looks back
_PLAIN_SECONDS = 15.0  # without a terminal: a line each 15 s, or each tenth of the work, but …
_PLAIN_PAUSE = 1.0  # … not more than one a second


def speaks() -> bool:
    """Whether people hear of this process: of several that torchrun started, the first one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def console() -> Console:
    """The console for a command's results (standard output)."""
    return Console(highlight=False, quiet=not speaks())


class Progress:
    """Bars and lines of one command. `quiet` shows neither."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or not speaks()
        self._console = Console(stderr=True, highlight=False, quiet=self.quiet)

    def line(self, text: str) -> None:
        """Print one line of plain text, above a bar if one is running."""
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)  # a log is not to be broken

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "tok", done: int = 0) -> Iterator["Bar"]:
        """A bar over `total` units; `done` of them were done by an earlier process and do not count as speed.

        The bar of an interrupted block stays where it was.
        """
        bar = Bar(title, total, unit, done, self._console)
        if self._console.is_terminal and not self.quiet:
            with Live(bar, console=self._console, refresh_per_second=4):
                yield bar
        else:
            yield bar
            bar.close()


class Bar:
    """One piece of work under way. On a terminal it draws itself; elsewhere it prints a line now and then."""

    def __init__(self, title: str, total: int, unit: str, done: int, console: Console) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._numbers: dict[str, float | str] = {}
        self._console = console
        self._started = time.monotonic()
        self._seen = deque([(self._started, done)])
        self._printed = (self._started, done)

    def advance(self, n: int, **numbers: float | str) -> None:
        """`n` more units are done; `numbers` (loss=2.3, …) stand beside the bar until they are replaced."""
        now = time.monotonic()
        self.done += n
        self._numbers |= numbers
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and self._seen[1][0] < now - _WINDOW:
            self._seen.popleft()
        if not self._console.is_terminal:
            since, at = self._printed
            tenth = self.done - at >= self.total / 10
            if now - since >= _PLAIN_SECONDS or (tenth and now - since >= _PLAIN_PAUSE):
                self._print(now)

    def close(self) -> None:
        """Print the last line, where lines are printed."""
        if self._printed[1] != self.done or self.done == 0:
            self._print(time.monotonic())

    @property
    def rate(self) -> float:
        """Units a second over the last half minute."""
        (t0, n0), (t1, n1) = self._seen[0], self._seen[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def _print(self, now: float) -> None:
        self._printed = (now, self.done)
        self._console.print(Text(f"{self.title}  {self._facts()}"), soft_wrap=True)

    def _facts(self, width: int | None = None) -> str:
        """Share, rate, numbers, time left (when done: taken); numbers that exceed `width` are left out."""
        share = min(1.0, self.done / self.total) if self.total else 1.0
        head = [f"{100 * share:3.0f} %"]
        if self.rate:
            head.append(f"{_amount(self.rate)} {self.unit}/s")
        tail = []
        if share == 1:
            tail.append(duration(time.monotonic() - self._started))
        elif self.rate:
            tail.append(f"{duration((self.total - self.done) / self.rate)} left")
        numbers = [f"{name.replace('_', ' ')} {_amount(number)}" for name, number in self._numbers.items()]
        while numbers and width is not None and len("  ".join(head + numbers + tail)) > width:
            numbers.pop()
        return "  ".join(head + numbers + tail)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, empty = ("#", ".") if options.ascii_only else ("█", "░")
        filled = min(_WIDTH, _WIDTH * self.done // self.total) if self.total else _WIDTH
        text = Text(f"{self.title}  ", no_wrap=True, overflow="ellipsis")
        text.append(full * filled + empty * (_WIDTH - filled), style="cyan")
        text.append("  " + self._facts(options.max_width - len(text) - 2))
        yield text


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3.5 min, 2.1 h; 0 s for none."""
    if 0 < seconds < 0.5:
        return "< 1 s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _amount(value: float | str) -> str:
    """A number as people read it: four digits, thousands set apart."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
