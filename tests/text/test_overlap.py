"""Copies and what was seen in training, on texts where the answer is known."""

import random

import pytest

from unmask.text import overlap
from unmask.text.overlap import Copies, Overlap, runs, words

pytest.importorskip("datasketch")
VOCABULARY = [f"word{i}" for i in range(2000)]


def made_up(seed: int, length: int = 120) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def test_a_copy_is_one_whatever_its_case_marks_and_spaces() -> None:
    copies = Copies()
    for text in ("The river, is LONG.", "the river is long", "The  river\nis long!", "the river is short"):
        copies.add(text)
    assert (copies.documents, copies.exact, copies.near) == (4, 2, 0)


def test_documents_with_a_word_changed_are_near_copies_and_halves_are_not() -> None:
    """A changed word takes four or five of 116 runs, which leaves 0.92 of all that both have; a half leaves 0.32."""
    copies = Copies()
    for seed in range(40):
        copies.add(" ".join(made_up(seed)))
    assert copies.near == 0
    for seed in range(40):
        changed = made_up(seed)
        changed[3] = "other"
        copies.add(" ".join(changed))
    assert copies.near >= 36  # a hash may miss one
    for seed in range(40):
        copies.add(" ".join(made_up(seed)[:60] + made_up(seed + 1000)[:60]))
    assert copies.near <= 42
    assert copies.exact == 0


def test_near_copies_are_told_at_the_share_that_is_said() -> None:
    """n words changed at the end leave J = (296 − n)/(296 + n) of 300-word texts: 17 leave 0.89, 52 leave 0.70."""
    found = {}
    for changed in (17, 52):
        copies = Copies()
        for seed in range(60):
            copies.add(" ".join(made_up(seed, 300)))
            copies.add(" ".join(made_up(seed, 300)[:-changed] + made_up(seed + 1000, changed)))
        found[changed] = copies.near
    assert found[17] >= 57
    assert found[52] <= 3


def test_near_copies_are_looked_for_among_the_first_documents_and_exact_ones_among_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overlap, "COMPARED", 2)
    copies = Copies()
    for text in (made_up(1), [*made_up(1), "end"], [*made_up(1), "stop"], made_up(1)):
        copies.add(" ".join(text))
    assert (copies.documents, copies.exact, copies.near) == (4, 1, 1)


def test_texts_without_a_word_are_copies_only_of_themselves() -> None:
    copies = Copies()
    for text in ("!!!", "???", "🙂", "!!!"):
        copies.add(text)
    assert (copies.exact, copies.near) == (1, 0)


def test_a_text_was_seen_if_thirteen_of_its_words_stand_in_a_row_in_training() -> None:
    text = made_up(1, 40)
    overlap = Overlap({"held": [" ".join(text)], "other": [" ".join(made_up(2, 40)), "too few words"]})
    overlap.read(" ".join(["before", *text[5:17], "behind"]))  # twelve
    assert overlap.kinds["held"].seen == 0
    for _ in range(2):
        overlap.read(
            " ".join(["Before,", *text[5:18], "behind"]).upper()
        )  # thirteen, twice read and once counted
    held, other = overlap.kinds["held"], overlap.kinds["other"]
    assert (held.texts, held.short, held.seen, held.example) == (1, 0, 1, " ".join(text))
    assert (held.runs, held.seen_runs) == (40 - 12, 1)
    assert (other.texts, other.short, other.seen, other.example) == (2, 1, 0, "")


def test_a_short_text_was_seen_only_whole() -> None:
    text = made_up(3, 9)
    overlap = Overlap({"asked": [" ".join(text)]})
    overlap.read(" ".join(text[:8]))
    assert overlap.kinds["asked"].seen == 0
    overlap.read(" ".join(["and", *text, "again"]))
    assert overlap.kinds["asked"].seen == 1


def test_runs_are_all_there_are() -> None:
    assert list(runs(words("a b c d"), 3)) == [("a", "b", "c"), ("b", "c", "d")]
    assert list(runs(["a"], 2)) == []
