"""Preferences from ratings: what a rating is, where a conversation belongs, which windows make a pair."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.text import rated
from unmask.text.rated import Conversation, Window
from unmask.text.sources import held_out


def entry(*turns: list[str], ratings: dict[str, int] | None = None) -> dict[str, object]:
    """A conversation as dataset.json has it; two speakers take turns."""
    messages = [[{"text": text, "sender": "ab"[i % 2]} for text in turn] for i, turn in enumerate(turns)]
    return {"messages": messages} | ({} if ratings is None else {"ratings": ratings})


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Conversation]]:
    """Reads conversations from a dataset.json of the test's own."""

    def write(*entries: dict[str, object]) -> list[Conversation]:
        (tmp_path / "dataset.json").write_text(json.dumps({str(i): e for i, e in enumerate(entries)}))
        monkeypatch.setattr(rated, "demo_package", lambda module: tmp_path)
        return list(rated.installed_conversations.__wrapped__())  # past its cache

    return write


FOUR = (["hi"], ["hello"], ["how are you"], ["fine"])
HIGH = {"witty": 7, "upbeat": 8, "interesting": 9}


def test_a_rating_is_the_mean_of_three_and_none_where_it_says_nothing(
    read: Callable[..., list[Conversation]],
) -> None:
    default = {"witty": 5, "upbeat": 5, "interesting": 5}
    conversations = read(
        entry(*FOUR, ratings=HIGH),
        entry(*FOUR, ratings=default),
        entry(*FOUR),
        entry(*FOUR[:3], ratings=HIGH),
        entry(*FOUR, ratings={"witty": 9}),
        entry(*FOUR, ratings=default | {"witty": 6}),
    )
    assert [c.rating for c in conversations] == [8.0, None, None, None, None, pytest.approx(16 / 3)]


def test_turns_alternate_even_when_an_empty_turn_is_dropped(read: Callable[..., list[Conversation]]) -> None:
    (conversation,) = read(entry(["a", "b"], ["  ", ""], ["c"], ["d"], [], ["e"]))
    assert conversation.turns == ("a b c", "d e")  # d and e are both by the second speaker
    assert conversation.text == "a b c\nd e"


def test_a_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.text.packages.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"chitchat-dataset.*pip install 'unmask\[demo\]'"):
        rated.installed_conversations.__wrapped__()


def talk(number: int, rating: float | None = None, turns: int = 8) -> Conversation:
    return Conversation(f"c{number}", tuple(f"turn {i} of {number}" for i in range(turns)), rating)


def test_the_split_is_exact_in_share_disjoint_and_stays_when_the_share_moves() -> None:
    conversations = [talk(i) for i in range(4000)]
    counts = Counter(rated.split(c, 0.2) for c in conversations)
    assert counts["held_out"] == pytest.approx(800, abs=100)
    assert counts["proxy"] == pytest.approx(1600, abs=130)
    assert counts["gold"] == pytest.approx(1600, abs=130)
    for conversation in conversations:
        narrow, wide = rated.split(conversation, 0.2), rated.split(conversation, 0.5)
        assert wide in ("held_out", narrow)  # a larger share only adds to what is held out
        assert rated.split(conversation, 0.0) != "held_out"
        assert rated.split(conversation, 1.0) == "held_out"


@given(st.lists(st.text(), max_size=3), st.floats(0, 1))
def test_what_is_held_out_of_the_pairs_is_held_out_of_raw_text(turns: list[str], share: float) -> None:
    conversation = Conversation("c", tuple(turns), 8.0)
    assert (rated.split(conversation, share) == "held_out") == held_out(conversation.text, share)


def test_where_a_conversation_belongs_is_the_same_in_every_version() -> None:
    """Another split would train the next version's layers on what this one's were measured on."""
    where = "".join(rated.split(talk(i), 0.2)[0] for i in range(12))
    assert where == "pgphgggghghg"


def test_copies_of_a_conversation_stay_together_whatever_their_id_and_rating() -> None:
    for i in range(50):
        copy = Conversation("another", talk(i).turns, 9.0)
        assert rated.split(copy) == rated.split(talk(i))


@given(st.integers(0, 40), st.sampled_from([2, 4, 8]))
def test_windows_are_whole_do_not_overlap_and_end_with_the_assistant(length: int, turns: int) -> None:
    conversation = talk(0, turns=length)
    windows = rated.windows(conversation, turns)
    assert len(windows) == length // turns
    assert [m["content"] for w in windows for m in w] == list(conversation.turns[: length // turns * turns])
    for window in windows:
        assert [m["role"] for m in window] == ["user", "assistant"] * (turns // 2)


def test_only_rated_conversations_give_rated_windows() -> None:
    windows = rated.rated_windows([talk(0, 7.5), talk(1), talk(2, 2.0, turns=5)])
    assert [(w.conversation, w.rating) for w in windows] == [("c0", 7.5), ("c0", 7.5), ("c2", 2.0)]


def window(conversation: int, rating: float, characters: int) -> Window:
    return Window(str(conversation), [{"role": "assistant", "content": "x" * characters}], rating)


WINDOWS = st.lists(st.tuples(st.integers(0, 10), st.integers(1, 60)), max_size=12).map(
    lambda rows: [window(i, float(rating), characters) for i, (rating, characters) in enumerate(rows)]
)


@settings(deadline=None)
@given(WINDOWS, st.sampled_from([None, 0.1, 0.5]), st.integers(0, 5), st.integers(0, 200))
def test_pairs_are_exactly_those_that_qualify_and_no_pair_comes_twice(
    windows: list[Window], equal_length: float | None, seed: int, limit: int
) -> None:
    def qualifies(a: Window, b: Window) -> bool:
        gap = abs(a.characters - b.characters)
        near = equal_length is None or gap <= equal_length * max(a.characters, b.characters)
        return a.rating - b.rating >= 3 and near

    every = {(a.conversation, b.conversation) for a in windows for b in windows if qualifies(a, b)}
    drawn = rated.pairs(windows, limit=limit, seed=seed, apart=3.0, equal_length=equal_length)
    names = [(a.conversation, b.conversation) for a, b in drawn]
    assert len(names) == len(set(names)) == min(limit, len(every))
    assert set(names) <= every
    assert all(a.conversation != b.conversation for a, b in drawn)
    assert drawn == rated.pairs(windows, limit=limit, seed=seed, apart=3.0, equal_length=equal_length)


@settings(deadline=None)
@given(WINDOWS, st.sampled_from([None, 0.1, 0.5]), st.integers(0, 5), st.integers(2, 5))
def test_rankings_hold_a_window_once_and_exactly_the_pairs_of_their_windows_that_qualify(
    windows: list[Window], equal_length: float | None, seed: int, size: int
) -> None:
    found = rated.rankings(windows, size, seed=seed, equal_length=equal_length)
    names = [window.conversation for ranking in found for window in ranking.windows]
    assert len(names) == len(set(names))
    for ranking in found:
        assert 2 <= len(ranking.windows) <= size
        assert {place for pair in ranking.better for place in pair} == set(range(len(ranking.windows)))
        every = {
            (a.conversation, b.conversation)
            for a, b in rated.pairs(ranking.windows, limit=1000, seed=0, equal_length=equal_length)
        }
        better = [
            (ranking.windows[a].conversation, ranking.windows[b].conversation) for a, b in ranking.better
        ]
        assert len(better) == len(set(better))
        assert set(better) == every


def test_rankings_are_of_similar_length_and_none_that_could_be_compared_is_lost() -> None:
    windows = [window(i, float(i % 2 * 5), 1 + i) for i in range(40)]
    found = rated.rankings(windows, 8, seed=0)
    assert sum(len(ranking.windows) for ranking in found) == 40
    for ranking in found:
        lengths = [each.characters for each in ranking.windows]
        assert max(lengths) - min(lengths) == 7


def test_every_qualifying_pair_is_as_likely_as_another() -> None:
    windows = [window(0, 9, 5), window(1, 8, 5), window(2, 1, 5), window(3, 0, 5), window(4, 5, 5)]
    # 0 over 2, 3, 4; 1 over 2, 3, 4; 4 over 2, 3
    counts = Counter(
        (chosen.conversation, rejected.conversation)
        for seed in range(1600)
        for chosen, rejected in rated.pairs(windows, limit=1, seed=seed)
    )
    assert len(counts) == 8
    assert all(count == pytest.approx(200, abs=60) for count in counts.values())


@given(st.integers(1, 30), st.integers(2, 9))
def test_sft_chats_hold_every_answered_turn_once(length: int, turns: int) -> None:
    conversations = [talk(i, turns=length) for i in range(20)]
    chats = list(rated.chats(conversations, turns))
    expected = [text for c in conversations for text in c.turns[: length // 2 * 2]]
    assert [m["content"] for chat in chats for m in chat] == expected
    for chat in chats:
        assert len(chat) <= turns
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)


def test_the_real_conversations_alternate_and_have_the_ratings_that_the_docs_count() -> None:
    pytest.importorskip("chitchat_dataset")
    conversations = rated.installed_conversations()
    assert len(conversations) == 7168
    ratings = [c.rating for c in conversations if c.rating is not None]
    assert len(ratings) == 2097
    assert all(0 <= rating <= 10 for rating in ratings)
    assert all(turn.strip() == turn != "" for c in conversations for turn in c.turns)
    held_out = rated.rated_windows(c for c in conversations if rated.split(c) == "held_out")
    for chosen, rejected in rated.pairs(held_out, limit=500, seed=0, equal_length=0.1):
        assert chosen.rating - rejected.rating >= 3
        assert abs(chosen.characters / rejected.characters - 1) <= 1 / 9 + 1e-9
