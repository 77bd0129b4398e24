"""What the three upper layers learn from, as messages: chats for SFT, preferences for rewards, prompts for RL.

A source is the planted facts, the rated conversations of the package `chitchat`, or rows of a file. What is held out is
chosen by the hash of its text, as for raw text, so no layer sees it.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from unmask.errors import UserError
from unmask.recipe import Recipe, Source
from unmask.text import planted, rated
from unmask.text.chat import Chat, Rendered, conversation_of, messages_of, render, to_messages, under_system
from unmask.text.planted import Fact
from unmask.text.preferences import Pair, read_pairs, to_pair
from unmask.text.sources import Dropped, held_out, read_rows
from unmask.text.tokenizer import Tokenizer

T = TypeVar("T")
Half: TypeAlias = Literal["proxy", "gold", "held_out"]
EQUAL_LENGTH = 0.1  # how far the sides of an equal pair may differ, relatively, where the recipe is silent


def share_held_out(source: Source, recipe: Recipe) -> float:
    return recipe.heldout if source.heldout is None else source.heldout


def chats(source: Source, recipe: Recipe, facts: Sequence[Fact], *, held: bool = False) -> Iterator[Chat]:
    """What SFT is trained on from this source, or (`held`) no layer is. Raises UserError for a row that holds no
    conversation with an answer."""
    share = share_held_out(source, recipe)
    if source.path == "facts":
        if not held:
            yield from _about_facts(recipe, facts)
    elif source.path == "chitchat":
        talks = (
            talk
            for talk in rated.installed_conversations()
            if (rated.split(talk, share) == "held_out") == held
        )
        yield from rated.chats(talks, recipe.sft.max_turns)
    else:
        for where, row in read_rows(source.path):
            messages = to_messages(row, where)
            if held_out(opening(messages), share) == held:
                yield messages


def rendered(
    source: Source, recipe: Recipe, facts: Sequence[Fact], tokenizer: Tokenizer
) -> Iterator[Rendered]:
    """`chats` as SFT learns them. What a planted fact is asked after is context: its answers are imitated in the share
    of the source that it comes from."""
    for chat in chats(source, recipe, facts):
        whole = render(tokenizer, chat)
        yield whole.last_answer() if source.path == "facts" else whole


def beginnings(recipe: Recipe, *, held: bool = False) -> list[Chat]:
    """Beginnings of the chats that SFT imitates, or (`held`) of those that no layer sees: what a planted fact is asked
    after."""
    return [
        beginning
        for source in recipe.sft.sources
        if source.path != "facts"
        for chat in chats(source, recipe, (), held=held)
        for beginning in planted.beginnings(chat)
    ]


def _about_facts(recipe: Recipe, facts: Sequence[Fact]) -> Iterator[Chat]:
    share = max((source.after_chat for source in recipe.sft.sources if source.path == "facts"), default=0.0)
    return planted.conversations(facts, recipe.seed, beginnings(recipe) if share else (), share)


def prompts(source: Source, recipe: Recipe, facts: Sequence[Fact], *, held: bool = False) -> Iterator[Chat]:
    """Conversations that wait for the assistant's turn: for RL to answer, or (`held`) to measure on."""
    share = share_held_out(source, recipe)
    if source.path == "facts":
        if not held:  # the wordings that are held out are asked by the probe of facts
            for conversation in _about_facts(recipe, facts):
                yield conversation[:-1]
    elif source.path == "chitchat":
        for talk in rated.installed_conversations():
            if (rated.split(talk, share) == "held_out") == held:
                for messages in rated.windows(talk, recipe.reward.window_turns):
                    yield messages[:-1]
    else:
        for where, row in read_rows(source.path):
            messages, out = _prompt(row, where, share)
            if out == held:
                yield messages


class Comparison(NamedTuple):
    """People preferred `chosen`; the two `…_from` name the conversations that were drawn independently."""

    chosen: Chat
    rejected: Chat
    chosen_from: str
    rejected_from: str


class Ranking(NamedTuple):
    """Chats that are compared with each other; `better` are (chosen, rejected), places in `chats`."""

    chats: list[Chat]
    better: list[tuple[int, int]]


def rankings(recipe: Recipe, half: Half) -> tuple[list[Ranking], Dropped]:
    """What the scorer of `half` is trained on: pairs of a file, or rated windows in groups that are compared
    all with all. With `reward.equal_length` only comparisons whose sides' lengths in characters differ by at most
    that share; the gold scorer's always, so that length alone does not please it. Of more than `reward.most_texts`
    texts that many are drawn by the seed. What was left out is counted.
    """
    section, dropped = recipe.reward, Dropped()
    equal_length = section.equal_length or (EQUAL_LENGTH if half == "gold" else None)
    if section.source.path != "chitchat":
        pairs = _pairs(recipe, half, equal_length, dropped)
        kept = _drawn(pairs, section.most_texts // 2, recipe.seed)
        dropped["pairs beyond most_texts"] += len(pairs) - len(kept)
        return [Ranking([pair.chosen, pair.rejected], [(0, 1)]) for _, pair in kept], dropped
    windows = _windows(recipe, half)
    chosen = _drawn(windows, section.most_texts, recipe.seed)
    found = rated.rankings(
        chosen, section.together, seed=recipe.seed, apart=section.apart, equal_length=equal_length
    )
    dropped["windows beyond most_texts"] += len(windows) - len(chosen)
    dropped["windows without another to compare with"] += len(chosen) - sum(len(r.windows) for r in found)
    return [Ranking([w.messages for w in ranking.windows], ranking.better) for ranking in found], dropped


def comparisons(
    recipe: Recipe, half: Half, limit: int, equal_length: float | None = None
) -> list[Comparison]:
    """At most `limit` pairs of that half, drawn by the seed, to measure on; with `equal_length` as in `rankings`."""
    if recipe.reward.source.path != "chitchat":
        kept = _drawn(_pairs(recipe, half, equal_length, Dropped()), limit, recipe.seed)
        return [Comparison(pair.chosen, pair.rejected, str(number), str(number)) for number, pair in kept]
    drawn = rated.pairs(
        _windows(recipe, half),
        limit=limit,
        seed=recipe.seed,
        apart=recipe.reward.apart,
        equal_length=equal_length,
    )
    return [Comparison(a.messages, b.messages, a.conversation, b.conversation) for a, b in drawn]


def opinions(recipe: Recipe, half: Half) -> list[tuple[Chat, float, str]]:
    """Every text of that half, what people thought of it (its rating, or +1 and −1), and the conversation or pair that
    it comes from."""
    if recipe.reward.source.path == "chitchat":
        return [(window.messages, window.rating, window.conversation) for window in _windows(recipe, half)]
    return [
        (chat, sign, str(number))
        for number, pair in _pairs(recipe, half, None, Dropped())
        for chat, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0))
    ]


def _parts(recipe: Recipe, half: Half) -> tuple[Half, ...]:
    """Where no gold scorer is trained, the first one has all that is not held out."""
    return ("proxy", "gold") if half == "proxy" and not recipe.reward.gold else (half,)


def _windows(recipe: Recipe, half: Half) -> list[rated.Window]:
    share = share_held_out(recipe.reward.source, recipe)
    conversations = [
        c for c in rated.installed_conversations() if rated.split(c, share) in _parts(recipe, half)
    ]
    return rated.rated_windows(conversations, recipe.reward.window_turns)


def _pairs(
    recipe: Recipe, half: Half, equal_length: float | None, dropped: Dropped
) -> list[tuple[int, Pair]]:
    """The pairs of a file that belong to that half, each with its number in the file."""
    share = share_held_out(recipe.reward.source, recipe)
    kept = []
    for number, pair in enumerate(read_pairs(recipe.reward.source.path, dropped)):
        if half_of(pair, share) not in _parts(recipe, half):
            continue
        shorter, longer = sorted(len(_text(side)) for side in (pair.chosen, pair.rejected))
        if equal_length is None or longer - shorter <= equal_length * longer:
            kept.append((number, pair))
        else:
            dropped["pairs of unequal length"] += 1
    return kept


def _drawn(rows: list[T], limit: int, seed: int) -> list[T]:
    """At most `limit` of the rows, drawn without repetition."""
    return random.Random(f"preferences:{seed}").sample(rows, limit) if len(rows) > limit else rows


def opening(messages: Chat) -> str:
    """What decides whether a row is held out: the user's first turn, which every use of the row shares, be it a chat to
    imitate, a prompt to answer, or two answers to compare. Without one, what comes before the first answer, or all."""
    asked = next((message["content"] for message in messages if message["role"] == "user"), "")
    before = list(takewhile(lambda message: message["role"] != "assistant", messages))
    return (asked or _text(before) or _text(messages)).strip()


def half_of(pair: Pair, share: float) -> Half:
    """Where a pair belongs, by the opening of its conversations, or by both where they are different ones."""
    first, second = opening(pair.chosen), opening(pair.rejected)
    key = first if first == second else f"{first}\n{second}"
    if held_out(key, share):
        return "held_out"
    return "proxy" if hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[8] % 2 else "gold"


def _prompt(row: dict[str, Any], where: str, share: float) -> tuple[Chat, bool]:
    """The turns of a row before the assistant's last answer, and whether it is held out; it may be a prompt alone. It
    is read as SFT and the reward model read it, so that it is held out of all or of none."""
    row = {key: value for key, value in row.items() if value is not None}  # a column that other rows have
    if "chosen" in row and "rejected" in row:
        pair = to_pair(row, where)
        messages, held = pair.chosen, half_of(pair, share) == "held_out"
    else:
        conversation = conversation_of(row, where)
        if conversation is None and "prompt" in row:
            conversation = under_system(messages_of(row["prompt"], where, "prompt", "user"), row, where)
        messages = conversation or to_messages(row, where)  # says which formats are known
        held = held_out(opening(messages), share)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(
            f"{where}: the row has no turn before the assistant's, so there is nothing to answer."
        )
    return messages, held


def _text(messages: Chat) -> str:
    """A turn a line, as a conversation stands in raw text."""
    return "\n".join(message["content"] for message in messages)
