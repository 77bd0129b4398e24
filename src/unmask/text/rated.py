"""Rated human conversations, and the preferences over answers that are derived from them.

People who talked in pairs (the Chit-Chat Challenge, package chitchat-dataset) rated their whole conversation
as witty, upbeat and interesting. A reward model wants pairs of answers, one better than the other. The way:

1. A conversation's rating is the mean of its three. Left at the default (all 5), absent, or given to less
   than four turns, it says nothing, and the conversation is unrated.
2. A rated conversation is cut into windows of a few turns, each of which inherits the whole rating. The last
   turn of a window is the answer that is judged; the turns before it are its prompt.
3. Two windows from two conversations whose ratings lie far enough apart make a pair, chosen and rejected,
   without a common prompt. To measure, pairs are drawn; to train, windows are ranked in groups.

So it is assumed that a window is as good as its conversation, and that two raters mean the same by a number.
The first is false for many windows, which bounds the accuracy of every judge. And better-rated conversations
have longer turns, so that length alone orders many pairs; `pairs(equal_length=…)` takes length out.
docs/preferences-from-ratings.md has the figures.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unmask.text import order
from unmask.text.packages import demo_package

_ASPECTS = ("witty", "upbeat", "interesting")
_DEFAULT = 5  # where the sliders stood
_FEWEST_TURNS = 4

Split = Literal["held_out", "proxy", "gold"]


@dataclass(frozen=True)
class Conversation:
    """Two people in turn. `rating` is from 0 to 10, or None where it says nothing."""

    id: str
    turns: tuple[str, ...]
    rating: float | None

    @property
    def text(self) -> str:
        """A turn a line: the conversation as a document."""
        return "\n".join(self.turns)


@dataclass(frozen=True)
class Window:
    """A stretch of a rated conversation as messages, the assistant's last, with the conversation's rating."""

    conversation: str
    messages: list[dict[str, str]]
    rating: float

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


@cache  # parsed in a second, read a dozen times in a run
def installed_conversations() -> tuple[Conversation, ...]:
    """All conversations of the package chitchat-dataset, in its order. UserError if it is not installed."""
    path = demo_package("chitchat_dataset") / "dataset.json"
    return tuple(_conversation(id, entry) for id, entry in json.loads(path.read_text("utf-8")).items())


def split(conversation: Conversation, held_out: float = 0.2) -> Split:
    """Where a conversation belongs: a share that no layer sees, and of the rest two disjoint halves.

    A pure function of the conversation's text, so that copies of a conversation stay together. What is held
    out here is held out of raw text too: `sources.held_out` says the same of the same text and share. The
    halves do not depend on the share.
    """
    digest = hashlib.sha256(conversation.text.encode("utf-8", "surrogatepass")).digest()
    if int.from_bytes(digest[:8]) < held_out * 2**64:
        return "held_out"
    return "proxy" if digest[8] % 2 else "gold"


def windows(conversation: Conversation, turns: int = 4) -> list[list[dict[str, str]]]:
    """Windows of `turns` (an even number) turns without overlap, user first and assistant last."""
    assert turns >= 2, turns
    assert turns % 2 == 0, f"a window of {turns} turns would not end with the assistant"
    starts = range(0, len(conversation.turns) - turns + 1, turns)
    return [_messages(conversation.turns[start : start + turns]) for start in starts]


def rated_windows(conversations: Iterable[Conversation], turns: int = 4) -> list[Window]:
    """All windows of the rated ones among the conversations."""
    return [
        Window(conversation.id, messages, conversation.rating)
        for conversation in conversations
        if conversation.rating is not None
        for messages in windows(conversation, turns)
    ]


@dataclass(frozen=True)
class Ranking:
    """Windows that are compared with each other; `better` are (chosen, rejected), places in `windows`."""

    windows: list[Window]
    better: list[tuple[int, int]]


def rankings(
    windows: Sequence[Window],
    size: int,
    *,
    seed: int,
    apart: float = 3.0,
    equal_length: float | None = None,
) -> list[Ranking]:
    """All windows in groups of at most `size` of similar length, each in one group, with all pairs of a group that
    qualify (see `pairs`).

    So each window is read once for all its comparisons: pairs that were shuffled into one data set show a window
    again and again, and a judge over-fits within a single pass (Ouyang et al., arXiv 2203.02155, section 3.5). Groups
    and windows that have nothing to compare are left out. A pure function of its arguments.
    """
    assert size >= 2, size
    shuffled = order.permutation(seed, 0, len(windows)).tolist()
    by_length = sorted((windows[i] for i in shuffled), key=lambda window: window.characters)
    groups = [by_length[start : start + size] for start in range(0, len(windows), size)]
    found = [_ranked(groups[i], apart, equal_length) for i in order.permutation(seed, 1, len(groups))]
    return [ranking for ranking in found if ranking.better]


def _ranked(windows: Sequence[Window], apart: float, equal_length: float | None) -> Ranking:
    worse = _Worse(windows, apart, equal_length)
    pairs = [(better, int(j)) for better in range(len(windows)) for j in np.flatnonzero(worse.than(better))]
    used = sorted({place for pair in pairs for place in pair})
    new = {place: i for i, place in enumerate(used)}
    return Ranking([windows[i] for i in used], [(new[a], new[b]) for a, b in pairs])


class _Worse:
    """Which windows qualify as the rejected side of a pair."""

    def __init__(self, windows: Sequence[Window], apart: float, equal_length: float | None) -> None:
        assert apart > 0, apart
        self.ratings = np.array([window.rating for window in windows])
        self.lengths = np.array([window.characters for window in windows])
        self.apart, self.equal_length = apart, equal_length

    def than(self, better: int) -> NDArray[np.bool_]:
        """A mask over all windows, for the window `better` as the chosen side."""
        mask: NDArray[np.bool_] = self.ratings <= self.ratings[better] - self.apart
        if self.equal_length is not None:
            longer = np.maximum(self.lengths, self.lengths[better])
            mask &= np.abs(self.lengths - self.lengths[better]) <= self.equal_length * longer
        return mask


def pairs(
    windows: Sequence[Window],
    *,
    limit: int,
    seed: int,
    apart: float = 3.0,
    equal_length: float | None = None,
) -> list[tuple[Window, Window]]:
    """(chosen, rejected), drawn uniformly and without repetition from all pairs of windows that qualify.

    A pair qualifies if the chosen window's rating is at least `apart` points above the rejected one's (so
    they come from two conversations) and, with `equal_length`, if their lengths in characters differ by at
    most this share of the longer one. At most `limit` pairs; fewer only if fewer qualify.
    """
    worse = _Worse(windows, apart, equal_length)
    ends = np.cumsum([int(worse.than(better).sum()) for better in range(len(windows))])
    total = int(ends[-1]) if len(windows) else 0
    draw = random.Random(f"pairs:{seed}")
    drawn = sorted(draw.sample(range(total), min(limit, total)))
    better_of = np.searchsorted(ends, drawn, side="right")
    found = []
    for better, places in groupby(zip(better_of.tolist(), drawn, strict=True), key=lambda place: place[0]):
        rejected = np.flatnonzero(worse.than(better))
        first = int(ends[better]) - len(rejected)
        found += [(windows[better], windows[rejected[place - first]]) for _, place in places]
    draw.shuffle(found)
    return found


def chats(conversations: Iterable[Conversation], turns: int) -> Iterator[list[dict[str, str]]]:
    """Chats for the SFT stage from all these conversations, rated or not.

    A long one is cut into stretches of at most `turns` turns, the user first and the assistant last in each.
    What is left over (a last turn without a reply, a conversation of one turn) has no answer to learn from.
    """
    longest = turns - turns % 2
    assert longest >= 2, f"a chat of {turns} turns has no answer"
    for conversation in conversations:
        answered = conversation.turns[: len(conversation.turns) // 2 * 2]
        for start in range(0, len(answered), longest):
            yield _messages(answered[start : start + longest])


def _conversation(id: str, entry: dict[str, Any]) -> Conversation:
    """One entry of dataset.json. Messages of a turn are joined by a space; empty turns are dropped, and turns
    of one speaker that then follow each other are joined too."""
    turns = (
        (turn[0]["sender"], " ".join(m["text"] for m in turn).strip()) for turn in entry["messages"] if turn
    )
    spoken = ((sender, text) for sender, text in turns if text)
    joined = tuple(
        " ".join(text for _, text in group) for _, group in groupby(spoken, key=lambda turn: turn[0])
    )
    return Conversation(id, joined, _rating(entry.get("ratings") or {}, len(joined)))


def _rating(ratings: dict[str, float], turns: int) -> float | None:
    values = [ratings[aspect] for aspect in _ASPECTS if aspect in ratings]
    if turns < _FEWEST_TURNS or len(values) < len(_ASPECTS) or all(value == _DEFAULT for value in values):
        return None
    return sum(values) / len(values)


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
