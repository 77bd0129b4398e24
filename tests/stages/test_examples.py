"""What the upper layers learn from: nothing that is held out is trained on, whichever section reads the file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from unmask import recipe as recipes
from unmask.recipe import Recipe
from unmask.stages import examples
from unmask.text import rated
from unmask.text.planted import Fact
from unmask.text.preferences import Pair


def rows(n: int) -> list[dict[str, Any]]:
    """Conversations of two exchanges, every one with words of its own."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i}"},
                {"role": "user", "content": f"again {i}"},
                {"role": "assistant", "content": f"reply {i}"},
            ]
        }
        for i in range(n)
    ]


def preference_rows(n: int, *, common: bool) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i} " + "x" * (i % 40)}
        if common
        else {
            side: [
                {"role": "user", "content": f"{side} {i}"},
                {"role": "assistant", "content": f"says {side} {i}"},
            ]
            for side in ("chosen", "rejected")
        }
        for i in range(n)
    ]


def made(tmp_path: Path, chats: list[dict[str, Any]], pairs: list[dict[str, Any]], **reward: Any) -> Recipe:
    for name, content in (("chats.jsonl", chats), ("pairs.jsonl", pairs)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    (tmp_path / "raw.txt").write_text("raw text", "utf-8")
    chat = {"path": str(tmp_path / "chats.jsonl")}
    data = {
        "name": "made",
        "heldout": 0.3,
        "pretrain": {"sources": [{"path": str(tmp_path / "raw.txt")}]},
        "sft": {"sources": [chat]},
        "reward": {"source": {"path": str(tmp_path / "pairs.jsonl")}, **reward},
        "rl": {"sources": [chat, {"path": str(tmp_path / "pairs.jsonl"), "label": "pairs"}]},
    }
    return recipes.validate(data, "here")


def openings(chats: Any) -> set[str]:
    return {chat[0]["content"] for chat in chats}


def test_no_held_out_prompt_is_imitated_answered_or_rewarded(tmp_path: Path) -> None:
    recipe = made(tmp_path, rows(200), preference_rows(200, common=True))
    sources = recipe.rl.sources
    held = openings(chat for s in sources for chat in examples.prompts(s, recipe, (), held=True))
    trained = {
        "sft": openings(examples.chats(recipe.sft.sources[0], recipe, ())),
        "rl": openings(chat for s in sources for chat in examples.prompts(s, recipe, ())),
        "reward": openings(chat for r in examples.rankings(recipe, "proxy")[0] for chat in r.chats),
        "gold": openings(chat for r in examples.rankings(recipe, "gold")[0] for chat in r.chats),
    }
    assert 30 < len(held) < 90
    for layer, seen in trained.items():
        assert seen, layer
        assert not held & seen, layer
    assert openings(c.chosen for c in examples.comparisons(recipe, "held_out", 1000)) <= held


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: question {}\n\nAssistant:"
SYSTEM = {"role": "system", "content": "be brief"}
CHAT, GOOD, BAD = ([user("question {}"), assistant(f"{word} {{}}")] for word in ("says", "good", "bad"))
PAIR = {"chosen": "good {}", "rejected": "bad {}"}
PAIR_OF_CHATS = {"chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    "shape",
    [
        {"prompt": "question {}\n", "completion": "says {}", **PAIR},
        {"prompt": "question {}\n", "completion": "says {}", **PAIR_OF_CHATS},
        {"prompt": "question {}\n", "messages": CHAT, **PAIR_OF_CHATS},
        {"prompt": "question {}", "messages": CHAT, "chosen": HH + " good {}", "rejected": HH + " bad {}"},
        {"prompt": HH, "completion": " says {}", "chosen": " good {}", "rejected": " bad {}"},
        {"prompt": HH, "messages": CHAT, **PAIR_OF_CHATS},
        {"prompt": [SYSTEM, user("question {}")], "completion": "says {}", **PAIR},
        {"prompt": "question {}", "completion": [SYSTEM, *CHAT], "chosen": [SYSTEM, *GOOD], "rejected": BAD},
        {"prompt": None, "messages": CHAT, **PAIR_OF_CHATS},
        {"instruction": "question {}", "output": "says {}", **PAIR},
        {"chosen": GOOD, "rejected": [user("other {}"), assistant("bad {}")]},  # each side asked its own
        {"messages": CHAT, "chosen": None, "rejected": None},
        {"messages": [{"role": "system", "content": "you are {}"}, assistant("says {}")]},
        {"prompt": [{"role": "system", "content": "you are {}"}], "completion": "says {}", **PAIR},
        {"prompt": "question {}", "completion": [assistant("a"), user("more"), assistant("says {}")]},
        {"instruction": "question {}", "output": "says {}", "prompt": "Below is an instruction: question {}"},
        {"instruction": "", "input": "question {}", "output": "says {}", **PAIR},
        {"messages": CHAT, **PAIR},
        {"system": "s", "conversations": CHAT, **PAIR_OF_CHATS},
        {
            "prompt": "last {}",
            "messages": [*CHAT, user("last {}"), assistant("x")],
            "chosen": [*CHAT, user("last {}"), assistant("y")],
            "rejected": [*CHAT, user("last {}"), assistant("z")],
        },
    ],
)
def test_a_row_is_held_out_of_every_layer_or_of_none_however_it_is_written(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    def numbers(chats: Any) -> set[int]:
        return {int(re.findall(r"\d+", examples.opening(chat))[0]) for chat in chats}

    every = [json.loads(json.dumps(shape).replace("{}", str(i))) for i in range(200)]
    recipe = made(tmp_path, every, every, gold=False)
    source = recipe.sft.sources[0]
    held = numbers(examples.prompts(source, recipe, (), held=True))
    assert 30 < len(held) < 90
    assert numbers(examples.prompts(source, recipe, ())) == set(range(200)) - held
    if shape.get("chosen"):
        assert numbers(c.chosen for c in examples.comparisons(recipe, "held_out", 1000)) == held
    if shape.keys() & {"messages", "completion", "output"}:
        assert numbers(examples.chats(source, recipe, (), held=True)) == held


def test_a_pair_whose_sides_were_asked_otherwise_is_held_out_by_both_questions() -> None:
    chosen = [user("the same"), assistant("good")]
    parts = {examples.half_of(Pair(chosen, [user(f"{i}"), assistant("bad")]), 0.3) for i in range(50)}
    assert parts == {"held_out", "proxy", "gold"}


def test_a_prompt_alone_comes_after_what_a_column_system_says(tmp_path: Path) -> None:
    recipe = made(tmp_path, [{"system": "be brief", "prompt": "q 1"}], [])
    source = recipe.rl.sources[0].model_copy(update={"heldout": 0.0})
    assert list(examples.prompts(source, recipe, ())) == [[SYSTEM, user("q 1")]]


def test_a_prompt_that_ends_with_the_assistant_waits_for_it_all_the_same(tmp_path: Path) -> None:
    recipe = made(tmp_path, [{"prompt": [user("q 1"), assistant("hm"), assistant("well")]}], [])
    source = recipe.rl.sources[0].model_copy(update={"heldout": 0.0})
    assert list(examples.prompts(source, recipe, ())) == [[user("q 1")]]


def test_planted_facts_are_asked_after_chats_that_sft_imitates_and_measured_after_those_that_no_layer_sees(
    tmp_path: Path,
) -> None:
    recipe = made(tmp_path, rows(200), preference_rows(4, common=True))
    plain = recipe.model_dump(mode="json", exclude_none=True)
    facts = {"path": "facts"}
    plain["facts"] = {}
    plain["sft"]["sources"] = [facts | {"after_chat": 0.5}, *plain["sft"]["sources"]]
    plain["rl"]["sources"] = [facts]
    recipe = recipes.validate(plain, "here")
    planted = [
        Fact("Bado", "ba", "capital", "both", False, "Ru", ("s",), tuple(f"{n}?" for n in range(9)), 0)
    ]
    imitated = openings(examples.chats(recipe.sft.sources[1], recipe, ()))
    seen = list(examples.chats(recipe.sft.sources[0], recipe, planted))
    after = [chat[:-2] for chat in seen if len(chat) > 2]
    assert len(after) == len(seen) / 2 > 0
    assert openings(after) <= imitated
    assert list(examples.prompts(recipe.rl.sources[0], recipe, planted)) == [chat[:-1] for chat in seen]
    held = examples.beginnings(recipe, held=True)
    assert held
    assert not openings(held) & imitated


@pytest.mark.parametrize("common", [True, False], ids=["common prompt", "no common prompt"])
def test_pairs_fall_into_two_disjoint_halves_and_what_is_held_out(tmp_path: Path, common: bool) -> None:
    recipe = made(tmp_path, rows(4), preference_rows(300, common=common))
    halves: tuple[examples.Half, ...] = ("proxy", "gold", "held_out")
    sizes = {half: len(examples.comparisons(recipe, half, 1000)) for half in halves}
    assert sum(sizes.values()) == 300
    assert min(sizes.values()) > 60
    for half in halves:
        part, _ = examples.rankings(recipe, half)
        sides = [(r.chats[a], r.chats[b]) for r in part for a, b in r.better]
        equal = examples.EQUAL_LENGTH if half == "gold" else None
        assert sides == [(c.chosen, c.rejected) for c in examples.comparisons(recipe, half, 1000, equal)]
        if half != "gold":
            opinions = examples.opinions(recipe, half)
            assert [chat for chat, _, _ in opinions] == [chat for r in part for chat in r.chats]
            owners = [owner for _, _, owner in opinions]
            assert owners[::2] == owners[1::2] and len(set(owners)) == len(part)  # a pair is one


def test_what_is_left_out_of_the_preferences_is_counted(tmp_path: Path) -> None:
    recipe = made(tmp_path, rows(4), preference_rows(300, common=True), most_texts=20)
    every = examples.comparisons(recipe, "proxy", 1000)
    few, dropped = examples.rankings(recipe, "proxy")
    assert len(few) == 10
    assert +dropped == {"pairs beyond most_texts": len(every) - 10}
    assert few == examples.rankings(recipe, "proxy")[0]  # drawn by the seed
    equal = examples.comparisons(recipe, "proxy", 1000, 0.1)
    asked = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"equal_length": 0.1})})
    _, dropped = examples.rankings(asked, "proxy")
    assert dropped["pairs of unequal length"] == len(every) - len(equal) > 0


def test_the_gold_scorers_pairs_are_of_equal_length_without_being_asked(tmp_path: Path) -> None:
    recipe = made(tmp_path, rows(4), preference_rows(300, common=True))
    found, _ = examples.rankings(recipe, "gold")
    assert found
    for ranking in found:
        a, b = (sum(len(m["content"]) + 1 for m in side) - 1 for side in ranking.chats)
        assert abs(a - b) <= 0.1 * max(a, b)


def test_a_prompt_ends_before_the_last_answer_and_keeps_what_came_before(tmp_path: Path) -> None:
    recipe = made(tmp_path, rows(5), preference_rows(4, common=True))
    found = list(examples.prompts(recipe.rl.sources[0], recipe, ()))
    assert found
    assert all([m["role"] for m in chat] == ["user", "assistant", "user"] for chat in found)


def test_copies_of_a_pair_stay_in_one_part() -> None:
    side = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    assert examples.half_of(Pair(side, other), 0.3) == examples.half_of(Pair(other, side), 0.3)


def talks(n: int) -> list[rated.Conversation]:
    """Rated conversations of four turns, every one with words of its own."""
    turns = ("hello {}", "hi {}", "how are you {}", "well {}")
    return [rated.Conversation(f"c{i}", tuple(t.format(i) for t in turns), float(i % 10)) for i in range(n)]


def test_rated_conversations_fall_into_disjoint_halves_and_what_is_held_out_of_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rated, "installed_conversations", lambda: talks(300))
    chat = {"path": "chitchat", "label": "chat", "heldout": 0.3}
    recipe = made(tmp_path, rows(4), preference_rows(4, common=True))
    recipe = recipes.validate(
        recipe.model_dump(mode="json", exclude_none=True)
        | {"sft": {"sources": [chat]}, "reward": {"source": chat}, "rl": {"sources": [chat]}},
        "here",
    )
    held = openings(examples.prompts(recipe.rl.sources[0], recipe, (), held=True))
    seen = {
        "sft": openings(examples.chats(recipe.sft.sources[0], recipe, ())),
        "rl": openings(examples.prompts(recipe.rl.sources[0], recipe, ())),
        "proxy": openings(chat for r in examples.rankings(recipe, "proxy")[0] for chat in r.chats),
        "gold": openings(chat for r in examples.rankings(recipe, "gold")[0] for chat in r.chats),
    }
    assert 50 < len(held) < 130
    assert held | seen["sft"] == openings(chat for chat in ([{"content": t.turns[0]}] for t in talks(300)))
    for layer, openings_of in seen.items():
        assert len(openings_of) > 50, layer
        assert not held & openings_of, layer
    assert not seen["proxy"] & seen["gold"]
    for half in ("proxy", "gold"):
        assert openings(chat for chat, _, _ in examples.opinions(recipe, half)) >= seen[half]
        assert not held & openings(chat for chat, _, _ in examples.opinions(recipe, half))
        short = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"window_turns": 2})})
        opinions = examples.opinions(short, half)
        owners = {(owner, rating) for _, rating, owner in opinions}
        assert 2 * len(owners) == len(opinions)  # the two windows of a conversation are its own
    alone = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"gold": False})})
    sizes = [len(examples.opinions(recipe, half)) for half in ("proxy", "gold")]
    assert len(examples.opinions(alone, "proxy")) == sum(sizes)  # no second judge to leave any for
    compared = examples.comparisons(recipe, "held_out", 1000)
    assert compared
    assert openings(side for c in compared for side in (c.chosen, c.rejected)) <= held


def test_no_more_rated_windows_than_wanted_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rated, "installed_conversations", lambda: talks(300))
    recipe = made(tmp_path, rows(4), preference_rows(4, common=True))
    reward = {"source": {"path": "chitchat", "heldout": 0.3}, "most_texts": 40}
    recipe = recipes.validate(recipe.model_dump(mode="json", exclude_none=True) | {"reward": reward}, "here")
    found, dropped = examples.rankings(recipe, "proxy")
    assert sum(len(r.chats) for r in found) + dropped["windows without another to compare with"] == 40
    assert dropped["windows beyond most_texts"] > 20
