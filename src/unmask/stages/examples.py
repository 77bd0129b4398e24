"""What the three upper layers learn from, as messages: chats for SFT, preferences for rewards, prompts for RL.

A source is the planted facts, the rated conversations of the package `chitchat`, or rows of a file. What is held out is
chosen by the hash of its text, as for raw text, so no layer sees it.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from unmask.errors import UserError
from unmask.recipe import Recipe, Source
from unmask.text import planted, rated
from unmask.text.chat import Message, messages_of, to_messages
from unmask.text.planted import Fact
from unmask.text.preferences import Pair, read_pairs, to_pair
from unmask.text.sources import Dropped, held_out, read_rows

Chat: TypeAlias = list[Message]
Half: TypeAlias = Literal["proxy", "gold", "held_out"]


def share_held_out(source: Source, recipe: Recipe) -> float:
    return recipe.heldout if source.heldout is None else source.heldout


def chats(source: Source, recipe: Recipe, facts: Sequence[Fact]) -> Iterator[Chat]:
    """What SFT is trained on from this source. Raises UserError for a row that holds no conversation with an answer."""
    share = share_held_out(source, recipe)
    if source.path == "facts":
        yield from planted.conversations(facts, recipe.seed)
    elif source.path == "chitchat":
        yield from rated.sft_conversations(rated.installed_conversations(), recipe.sft.max_turns, share)
    else:
        for where, row in read_rows(source.path):
            messages = to_messages(row, where)
            if not held_out(opening(messages), share):
                yield messages


def prompts(source: Source, recipe: Recipe, facts: Sequence[Fact], *, held: bool = False) -> Iterator[Chat]:
    """Conversations that wait for the assistant's turn: for RL to answer, or (`held`) to measure on."""
    share = share_held_out(source, recipe)
    if source.path == "facts":
        if not held:  # the wordings that are held out are asked by the probe of facts
            for conversation in planted.conversations(facts, recipe.seed):
                yield conversation[:-1]
    elif source.path == "chitchat":
        for talk in rated.installed_conversations():
            if (rated.split(talk, share) == "held_out") == held:
                for messages in rated.windows(talk, recipe.reward.window_turns):
                    yield messages[:-1]
    else:
        for where, row in read_rows(source.path):
            messages = _prompt(row, where)
            if held_out(opening(messages), share) == held:
                yield messages


class Comparison(NamedTuple):
    """People preferred `chosen`; the two `…_from` name the conversations that were drawn independently."""

    chosen: Chat
    rejected: Chat
    chosen_from: str
    rejected_from: str

    @property
    def pair(self) -> Pair:
        return Pair(self.chosen, self.rejected)


class Preferences(NamedTuple):
    """Comparisons of one half, and every text of it with what people thought: a rating, or +1 and −1."""

    comparisons: list[Comparison]
    opinions: list[tuple[Chat, float]]
    dropped: Dropped


def preferences(
    recipe: Recipe, half: Half, *, limit: int | None = None, equal_length: float | None = None
) -> Preferences:
    """Comparisons of the half that trains the reward model, of that of the gold scorer, or of what nobody sees.

    With `equal_length` only those whose sides' lengths in characters differ by at most that share. Where more than
    `limit` are left, that many are drawn by the recipe's seed. What was left out is counted.
    """
    if recipe.reward.source.path == "chitchat":
        return _rated(recipe, half, limit, equal_length)
    return _compared(recipe, half, limit, equal_length)


def _rated(recipe: Recipe, half: Half, limit: int | None, equal_length: float | None) -> Preferences:
    share = share_held_out(recipe.reward.source, recipe)
    conversations = [c for c in rated.installed_conversations() if rated.split(c, share) == half]
    windows = rated.rated_windows(conversations, recipe.reward.window_turns)
    drawn = rated.pairs(
        windows,
        limit=recipe.reward.most_pairs if limit is None else limit,
        seed=recipe.seed,
        apart=recipe.reward.apart,
        equal_length=equal_length,
    )
    comparisons = [Comparison(a.messages, b.messages, a.conversation, b.conversation) for a, b in drawn]
    return Preferences(comparisons, [(window.messages, window.rating) for window in windows], Dropped())


def _compared(recipe: Recipe, half: Half, limit: int | None, equal_length: float | None) -> Preferences:
    source, dropped = recipe.reward.source, Dropped()
    share = share_held_out(source, recipe)
    comparisons: list[Comparison] = []
    opinions: list[tuple[Chat, float]] = []
    for number, pair in enumerate(read_pairs(source.path, dropped)):
        if half_of(pair, share) != half:
            continue
        opinions += [(pair.chosen, 1.0), (pair.rejected, -1.0)]
        shorter, longer = sorted(len(_text(side)) for side in (pair.chosen, pair.rejected))
        if equal_length is None or longer - shorter <= equal_length * longer:
            comparisons.append(Comparison(pair.chosen, pair.rejected, str(number), str(number)))
        else:
            dropped["pairs of unequal length"] += 1
    most = recipe.reward.most_pairs if limit is None else limit
    if len(comparisons) > most:
        dropped["pairs beyond most_pairs"] += len(comparisons) - most
        comparisons = random.Random(f"preferences:{recipe.seed}").sample(comparisons, most)
    return Preferences(comparisons, opinions, dropped)


def opening(messages: Chat) -> str:
    """What decides whether a row is held out: the user's first turn, which every use of the row shares, be it a chat to
    imitate, a prompt to answer, or two answers to compare."""
    return next((message["content"] for message in messages if message["role"] == "user"), _text(messages))


def half_of(pair: Pair, share: float) -> Half:
    """Where a pair belongs, by the opening of its conversations, or by both where they are different ones."""
    first, second = opening(pair.chosen), opening(pair.rejected)
    key = first if first == second else f"{first}\n{second}"
    if held_out(key, share):
        return "held_out"
    return "proxy" if hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[8] % 2 else "gold"


def _prompt(row: dict[str, Any], where: str) -> Chat:
    """The turns of a row before the assistant's last answer; a row may also be a prompt alone."""
    if "prompt" in row:
        return messages_of(row["prompt"], where, "prompt", "user")
    if "chosen" in row:
        messages = to_pair(row, where).chosen
    else:
        messages = to_messages(row, where)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(
            f"{where}: the row has no turn before the assistant's, so there is nothing to answer."
        )
    return messages


def _text(messages: Chat) -> str:
    """A turn a line, as a conversation stands in raw text."""
    return "\n".join(message["content"] for message in messages)
