"""What a line typed into the chat asks for: a pure function from text to a command."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unmask.errors import nearest


@dataclass(frozen=True)
class Say:
    text: str


@dataclass(frozen=True)
class Switch:
    layer: int


@dataclass(frozen=True)
class All:
    text: str  # "": what was said last


@dataclass(frozen=True)
class Temperature:
    value: float


@dataclass(frozen=True)
class Word:
    """A command without an argument: new, help, quit; or nothing, for a blank line."""

    name: str


@dataclass(frozen=True)
class Wrong:
    message: str


Command = Say | Switch | All | Temperature | Word | Wrong


def parse(line: str, names: Sequence[str]) -> Command:
    """What a line asks for. `names`: the layers', oldest first.

    A command or a layer may be shortened to any beginning that no other shares. Two slashes begin words that
    begin with one.
    """
    line = line.strip()
    if not line:
        return Word("nothing")
    if not line.startswith("/") or line.startswith("//"):
        return Say(line.removeprefix("/"))
    word, _, rest = line[1:].partition(" ")
    known = ["all", "new", "temperature", "help", "quit", *names]
    begun = [name for name in known if name.lower().startswith(word.lower())] if word else []
    if word not in known:
        if not begun:
            return Wrong(f"There is no /{word}.{nearest(word, known)} /help lists what there is.")
        if len(begun) > 1:
            return Wrong(f"/{word} may mean {' or '.join('/' + name for name in begun)}.")
        word = begun[0]
    rest = rest.strip()
    if word == "all":
        return All(rest)
    if word == "temperature":
        return _temperature(rest)
    if rest:
        return Wrong(f"/{word} takes nothing after it. Say it in a line of its own.")
    return Word(word) if word in ("new", "help", "quit") else Switch(names.index(word))


def _temperature(text: str) -> Command:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        return Wrong("/temperature takes a number of 0 or more, as /temperature 0.7")
    return Temperature(value)
