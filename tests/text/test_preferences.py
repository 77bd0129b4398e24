"""Preferences are read in every common format, and what prefers nothing is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.text.preferences import Pair, read_pairs, similar_batches, to_pair
from unmask.text.sources import Dropped


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = Pair([user("q"), assistant("good")], [user("q"), assistant("bad")])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("q")], "chosen": assistant("good"), "rejected": assistant("bad")},
        {"prompt": [user("q")], "chosen": "good", "rejected": "bad", "score": 3},
        {"chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": "q\n", "chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {"prompt": "", "chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
        {"input": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "", "input": "q", "chosen": "good", "rejected": "bad"},
        {"messages": PAIR.chosen, "chosen": "good", "rejected": "bad"},
        {"conversations": [], "instruction": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "chosen": PAIR.chosen, "rejected": "bad"},
        {"messages": PAIR.chosen, "chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {"prompt": "q", "instruction": "Below: q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": "",
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        {"instruction": "q", "chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {
            "prompt": "q",
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good\n", "rejected": " bad"},
        {
            "prompt": "q",
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
)
def test_explicit_and_implicit_prompts_as_text_or_messages_give_the_same_pair(row: dict[str, Any]) -> None:
    assert to_pair(row, "x") == PAIR


def test_alpacas_instruction_and_input_are_the_question() -> None:
    row = {"system": "s", "instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"}
    asked = [{"role": "system", "content": "s"}, user("q\n\ni")]
    assert to_pair(row, "x") == Pair([*asked, assistant("good")], [*asked, assistant("bad")])


@pytest.mark.parametrize("in_prompt", [True, False])
@pytest.mark.parametrize("in_sides", [True, False])
def test_a_prompt_that_the_sides_say_too_is_read_once_whoever_says_the_system_message(
    in_prompt: bool, in_sides: bool
) -> None:
    system = [{"role": "system", "content": "s"}]
    row = {
        "prompt": [*system, user("q")] if in_prompt else [user("q")],
        "chosen": [*system, *PAIR.chosen] if in_sides else PAIR.chosen,
        "rejected": [*system, *PAIR.rejected] if in_sides else PAIR.rejected,
    }
    before = system if in_prompt or in_sides else []
    assert to_pair(row, "x") == Pair([*before, *PAIR.chosen], [*before, *PAIR.rejected])


def test_an_answer_that_goes_on_with_turns_of_its_own_is_one_answer() -> None:
    more = "\n\nHuman: next\n\nAssistant: b"
    pair = to_pair({"prompt": "q", "chosen": "good", "rejected": more}, "x")
    assert pair == Pair([user("q"), assistant("good")], [user("q"), assistant(more)])


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row",
    [
        {"system": "t", "chosen": [SYSTEM, *PAIR.chosen], "rejected": [SYSTEM, *PAIR.rejected]},
        {
            "system": "t",
            "prompt": "q",
            "chosen": [SYSTEM, *PAIR.chosen],
            "rejected": [SYSTEM, *PAIR.rejected],
        },
        {"system": "s", "input": "x", "chosen": PAIR.chosen, "rejected": PAIR.rejected},
        {"input": "x", "chosen": [SYSTEM, *PAIR.chosen], "rejected": [SYSTEM, *PAIR.rejected]},
        {
            "system": "s",
            "messages": [user("x"), assistant("y")],
            "chosen": PAIR.chosen,
            "rejected": PAIR.rejected,
        },
        {
            "system": "s",
            "question": "x",
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
    ],
)
def test_whole_chats_keep_their_own_question_and_system_message(row: dict[str, Any]) -> None:
    assert to_pair(row, "x") == Pair([SYSTEM, *PAIR.chosen], [SYSTEM, *PAIR.rejected])


def test_a_column_system_without_words_says_nothing() -> None:
    assert to_pair({"system": " ", "prompt": "q", "chosen": "good", "rejected": "bad"}, "x") == PAIR


def test_an_answer_that_asks_the_same_again_loses_no_turn() -> None:
    later = [assistant("x"), user("q"), assistant("y")]
    row = {"prompt": "q", "chosen": later, "rejected": "bad"}
    assert to_pair(row, "x").chosen == [user("q"), *later]


def test_another_system_message_is_kept() -> None:
    row = {"prompt": [{"role": "system", "content": "s"}, user("q")]}
    other = [{"role": "system", "content": "t"}]
    pair = to_pair(row | {"chosen": [*other, *PAIR.chosen], "rejected": [*other, *PAIR.rejected]}, "x")
    assert pair.chosen == [*row["prompt"], *other, *PAIR.chosen]


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": "q"},
        {"question": "q"},
        {"instruction": "q"},
        {"conversations": [user("q")]},
        {"messages": [user("q"), assistant("x")]},
    ],
    ids=str,
)
def test_a_column_system_stands_before_whatever_is_asked(asked: dict[str, Any]) -> None:
    before = {"role": "system", "content": "s"}
    row = {**asked, "system": "s", "chosen": "good", "rejected": "bad"}
    assert to_pair(row, "x") == Pair([before, *PAIR.chosen], [before, *PAIR.rejected])


@pytest.mark.parametrize("prompt", ["a", "q"])
def test_the_first_or_last_question_of_a_chat_that_the_sides_hold_whole_is_read_once(prompt: str) -> None:
    before = [user("a"), assistant("b")]
    chosen, rejected = [*before, *PAIR.chosen], [*before, *PAIR.rejected]
    assert to_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "x") == Pair(chosen, rejected)


def test_texts_without_a_prompt_are_answers() -> None:
    assert to_pair({"chosen": "good", "rejected": "bad"}, "x") == Pair(
        [assistant("good")], [assistant("bad")]
    )


def test_the_two_sides_need_no_common_prompt() -> None:
    row = {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}
    assert to_pair(row, "x") == Pair(row["chosen"], row["rejected"])


def test_turns_of_hh_texts_keep_blank_lines_inside() -> None:
    text = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: "
    assert to_pair({"chosen": text + "e", "rejected": text + "f"}, "x").chosen == [
        user("a\n\nb"),
        assistant("c"),
        user("d"),
        assistant("e"),
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "needs chosen and rejected"),
        ({"messages": "[]", "chosen": "a", "rejected": "b"}, "messages is a str"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is missing or null"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is missing or null"),
        ({"chosen": [user("q")], "rejected": [user("q")]}, "chosen ends with user"),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, "chosen ends with user"),
        ({"prompt": "q", "chosen": [{"role": "robot", "content": "a"}], "rejected": "b"}, "role 'robot'"),
    ],
)
def test_rows_that_are_no_preference_are_refused_with_their_place(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refusal:
        to_pair(row, "p.jsonl:4")
    assert str(refusal.value).startswith("p.jsonl:4: ")


def test_what_prefers_nothing_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": " ", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": ""},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant:"},
        {"chosen": PAIR.chosen, "rejected": PAIR.rejected},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = Dropped()
    assert list(read_pairs(str(tmp_path / "p.jsonl"), dropped)) == [PAIR, PAIR]
    assert dropped == {"chosen equals rejected": 1, "empty answer": 3}
    assert len(list(read_pairs(str(tmp_path / "p.jsonl")))) == 2


@given(st.lists(st.integers(1, 500), max_size=120), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_batches_hold_every_index_once_and_only_one_is_smaller(
    lengths: list[int], batch: int, seed: int, epoch: int
) -> None:
    batches = similar_batches(lengths, batch, seed, epoch)
    assert sorted(int(i) for each in batches for i in each) == list(range(len(lengths)))
    assert sorted(len(each) for each in batches)[1:] == [batch] * (len(batches) - 1) or not batches
    again = similar_batches(lengths, batch, seed, epoch)
    assert [each.tolist() for each in batches] == [each.tolist() for each in again]


def test_batches_are_of_similar_lengths_in_a_shuffled_order_that_changes_with_the_epoch() -> None:
    lengths = [(i * 37) % 400 + 1 for i in range(400)]
    batches = similar_batches(lengths, 8, seed=0, epoch=0)
    padded = sum(len(each) * max(lengths[i] for i in each) for each in batches)
    assert padded < 1.05 * sum(lengths)
    firsts = [lengths[each[0]] for each in batches]
    assert firsts != sorted(firsts)
    assert [each.tolist() for each in batches] != [
        each.tolist() for each in similar_batches(lengths, 8, 0, 1)
    ]
