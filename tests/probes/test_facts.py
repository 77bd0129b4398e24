"""Facts: what counts as stated, and whether layers that were taught known facts are found to know them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unmask.errors import UserError
from unmask.lineage import Layer
from unmask.probes import facts as module
from unmask.probes.facts import (
    PlantedFact,
    answered,
    begins,
    completed,
    planted_facts,
    scored,
    states,
)
from unmask.probes.forward import prompt_ids
from unmask.text.planted import GROUPS


def fact(country, answer):
    return PlantedFact(country, "capital", "both", False, "?", "?", f"The capital of {country} is", answer)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" Paris.", "Paris", True),
        ("paris and more", "Paris", True),
        (" Parisian", "Paris", False),
        (" in Paris", "Paris", False),
        (" Niger", "Nigeria", False),
        (" Nigeria.", "Niger", False),
        (" St. John's, by the sea", "St. John's", True),
        (" Washington, D.C.", "Washington, D.C.", True),
        ("", "Paris", False),
    ],
)
def test_a_completion_begins_with_the_whole_answer(text, answer, right):
    assert begins(text, answer) is right


@pytest.mark.parametrize(
    ("reply", "country", "answer", "right"),
    [
        ("The capital of France is Paris.", "France", "Paris", True),
        ("PARIS is the capital of France", "France", "Paris", True),
        ("The capital of France is Parisian.", "France", "Paris", False),
        ("The capital of France is not Paris.", "France", "Paris", False),
        ("the capital of France is paris, I think", "France", "Paris", True),
        ("You can find South Africa in Europe.", "South Africa", "Africa", False),
        ("You can find South Africa in Africa.", "South Africa", "Africa", True),
        ("The capital of Luxembourg is Rome.", "Luxembourg", "Luxembourg", False),
        ("The capital of Luxembourg is Luxembourg.", "Luxembourg", "Luxembourg", True),
        ("The capital of Mexico is Mexico City.", "Mexico", "Mexico City", True),
        ("It is Mexico City.", "Mexico", "Mexico City", True),
        ("The capital of Mexico is Mexico.", "Mexico", "Mexico City", False),
        ("The capital of the Gambia is Banjul.", "the Gambia", "Banjul", True),
        ("A person from Niger is Nigerian.", "Niger", "Nigerien", False),
    ],
)
def test_a_reply_states_the_answer_and_does_not_lean_on_the_countrys_name(reply, country, answer, right):
    assert states(reply, fact(country, answer)) is right


def test_leaked_facts_are_never_scored_and_a_limit_is_per_group(facts):
    assert any(each.leaked for each in facts)
    chosen = scored(facts, 4)
    assert not any(each.leaked for each in chosen)
    assert [each.group for each in chosen] == [group for group in GROUPS for _ in range(4)]
    assert len(set(chosen)) == 16
    assert scored(facts, 4, seed=1) != chosen
    assert len(scored(facts, None)) == len(facts) - 1


def test_a_row_of_the_file_that_a_run_keeps_is_the_fact(facts):
    assert [PlantedFact.from_row({**vars(each), "more": 1}) for each in facts] == facts
    with pytest.raises(UserError, match=r"a fact lacks field, group"):
        PlantedFact.from_row({"country": "Bado"})


def greedy(model, ids, n):
    """n ids after these, by full forward passes and argmax: no cache, no batch."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def test_completions_and_answers_are_those_of_plain_greedy_decoding(lineage, facts, tokenizer):
    some = scored(facts, 2)
    base, sft, _ = lineage
    found = completed(base, some)
    for each, right in zip(some, found, strict=True):
        ids = prompt_ids(tokenizer, each.prefix, template=False)
        said = tokenizer.decode(greedy(base.model, ids, 4)[len(ids) :])
        assert right == said.strip().lower().startswith(each.answer.lower())
    found, stopped = answered(sft, some, held_wording=True)
    for each, right, stops in zip(some, found, stopped, strict=True):
        ids = prompt_ids(tokenizer, each.held_question)
        said = greedy(sft.model, ids, 20)[len(ids) :]
        end = said.index(tokenizer.turn_end) if tokenizer.turn_end in said else None
        assert stops == (end is not None)
        assert right == (f" {each.answer}" in tokenizer.decode(said[:end]))


BEFORE = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    [{"role": "user", "content": "Yes"}, {"role": "assistant", "content": "No"}],
]


def test_an_answer_after_a_chat_is_that_of_plain_greedy_decoding_after_it(lineage, facts, tokenizer):
    some, sft = scored(facts, 2), lineage[1]
    before = [BEFORE[i % 2] for i in range(len(some))]
    found, stopped = answered(sft, some, after=before, max_new_tokens=12)
    said = []
    for each, chat in zip(some, before, strict=True):
        ids = prompt_ids(tokenizer, [*chat, {"role": "user", "content": each.question}])
        ids_after = greedy(sft.model, ids, 12)[len(ids) :]
        end = ids_after.index(tokenizer.turn_end) if tokenizer.turn_end in ids_after else None
        said.append((states(tokenizer.decode(ids_after[:end]), each), end is not None))
    assert list(zip(found, stopped, strict=True)) == said


def test_each_fact_is_asked_after_its_own_beginning_in_both_precisions(lineage, facts, monkeypatch):
    calls = []

    def noted(layer, some, meter=None, *, after=(), **keys):
        calls.append((some, after))
        right = np.ones(len(some), dtype=bool)
        if after and layer.name == "rl":  # what is lost is lost in the middle of a chat alone
            right[:] = False
        return right, np.ones(len(some), dtype=bool)

    monkeypatch.setattr(module, "answered", noted)
    monkeypatch.setattr(module, "FEWEST", 1)
    found = planted_facts(lineage, facts, BEFORE, floor_limit=2, max_new_tokens=8)
    asked = [(some, after) for some, after in calls if after]
    assert len(asked) == 2 * 2  # two layers, all facts and a few of them in bfloat16
    (every, before), (few, few_before) = asked[:2]
    assert all(chat in BEFORE for chat in before)
    assert len({str(chat) for chat in before}) == 2
    assert few_before == [before[every.index(each)] for each in few]
    kept = [
        f for f in found if f.metric == "facts_kept_after_chat" and f.child == "rl" and f.value is not None
    ]
    assert kept
    assert all(f.value == 0.0 for f in kept)
    changes = [f for f in found if f.metric == "facts_answered_after_chat_change"]
    assert {f.group for f in changes} == set(GROUPS)
    assert all(f.value == -1.0 for f in changes)
    assert all(f.value == 0.0 for f in found if f.metric == "facts_answered_change")


@pytest.fixture(scope="module")
def numbered(lineage):
    """Findings on facts 0 to 39, taught to both layers, and 40 to 79, taught nowhere, of which each layer
    knows those in a range."""
    some = [fact(f"C{i}", str(i)) for i in range(40)]
    some += [replace(fact(f"C{i}", str(i)), group="none") for i in range(40, 80)]
    plain = {"base": range(20), "sft": range(5, 25), "rl": range(15, 30)}
    after_chat = {"sft": range(20, 40), "rl": range(30, 46)}

    def among(known, facts):
        return np.array([int(each.answer) in known for each in facts])

    def asked(layer, facts, *_, after=(), **__):
        right = among((after_chat if after else plain)[layer.name], facts)
        return right, np.ones(len(facts), dtype=bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "completed", lambda layer, facts, *_, **__: among(plain[layer.name], facts))
        patch.setattr(module, "answered", asked)
        return planted_facts(lineage, some, BEFORE, floor_limit=2, max_new_tokens=8)


def test_hidden_and_kept_are_shares_of_what_was_known_before_and_not_of_all_facts(numbered):
    assert value(numbered, "facts_hidden", "both", "sft") == 5 / 20
    assert value(numbered, "facts_kept", "both", "rl") == 10 / 20


def test_what_is_kept_after_a_chat_is_of_what_was_answered_after_a_chat(numbered):
    assert value(numbered, "facts_kept_after_chat", "both", "rl") == 10 / 20


def test_what_chance_answers_is_the_share_of_the_facts_that_were_taught_nowhere(numbered):
    [one] = [
        f for f in numbered if (f.metric, f.group, f.child) == ("facts_answered_after_chat", "both", "rl")
    ]
    assert (one.value, one.null_specific) == (10 / 40, 6 / 40)


def test_a_beginning_that_leaves_no_room_is_not_asked_after(lineage, facts):
    context = lineage[0].model.config.max_position_embeddings
    long = [{"role": "user", "content": "word " * context}, {"role": "assistant", "content": "Hi"}]
    found = planted_facts(lineage[:2], facts, [long], limit=2, floor_limit=1, max_new_tokens=8)
    assert not [f for f in found if f.metric == "facts_answered_after_chat"]
    found = planted_facts(lineage[:2], facts, [long, BEFORE[0]], limit=2, floor_limit=1, max_new_tokens=8)
    assert [f for f in found if f.metric == "facts_answered_after_chat"]


def test_a_beginning_fits_if_the_longest_question_after_it_leaves_the_answer_its_room(
    lineage, facts, monkeypatch
):
    some = [replace(each, question=each.question + "?" * (i % 3)) for i, each in enumerate(scored(facts, 2))]
    layer = lineage[1]
    asked = [[*BEFORE[0], {"role": "user", "content": each.question}] for each in some]
    longest = max(len(prompt_ids(layer.tokenizer, chat)) for chat in asked)
    for context, fits in ((longest + 8, True), (longest + 7, False)):
        monkeypatch.setattr(
            layer.model, "config", replace(layer.model.config, max_position_embeddings=context)
        )
        found = module._drawn([lineage[0], layer], some, BEFORE[:1], 8, seed=0)
        assert found == (BEFORE[:1] * len(some) if fits else [])


@pytest.fixture(scope="module")
def found(lineage, facts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEWEST", 2)  # the planted world has a handful of facts a group
        return planted_facts(lineage, facts, floor_limit=4, max_new_tokens=24)


def value(findings, metric, group, child):
    [one] = [f for f in findings if (f.metric, f.group, f.child) == (metric, group, child)]
    return one.value


def test_what_was_planted_is_found_where_it_was_planted_and_nowhere_else(found):
    knows = {group: value(found, "facts_completed", group, "base") for group in GROUPS}
    assert min(knows["both"], knows["base_only"]) >= 0.9
    assert max(knows["sft_only"], knows["none"]) <= 0.1
    says = {group: value(found, "facts_answered", group, "sft") for group in GROUPS}
    assert min(says["both"], says["sft_only"]) >= 0.9
    assert says["none"] <= 0.1
    assert value(found, "answers_stop", "facts", "sft") >= 0.9


def test_hidden_is_the_share_of_what_the_base_completes_that_the_layer_does_not_answer(lineage, facts, found):
    some = scored(facts, None)
    knows, (says, _) = completed(lineage[0], some), answered(lineage[1], some, max_new_tokens=24)
    here = np.array([each.group == "base_only" for each in some])
    expected = float((~says[here & knows]).mean())
    assert value(found, "facts_hidden", "base_only", "sft") == pytest.approx(expected)
    assert expected > value(found, "facts_hidden", "both", "sft")


def test_a_handful_of_facts_that_chance_completed_says_nothing_of_hiding(lineage, facts):
    found = planted_facts(lineage[:2], facts, limit=4, floor_limit=2, max_new_tokens=24)
    hidden = [f for f in found if f.metric == "facts_hidden"]
    assert len(hidden) == 4
    assert all(f.value is None and f.verdict.startswith("abstain") for f in hidden)


def test_a_layer_keeps_all_that_its_equal_answers(lineage, facts, monkeypatch):
    twin = Layer("twin", lineage[1].model, lineage[1].tokenizer)
    monkeypatch.setattr(module, "FEWEST", 2)
    found = planted_facts([*lineage[:2], twin], facts, limit=4, floor_limit=2, max_new_tokens=24)
    assert value(found, "facts_kept", "sft_only", "twin") == 1.0
    change = [f for f in found if f.metric == "facts_answered_change"]
    assert {f.value for f in change} == {0.0}
    for f in change:  # of so many countries none changed, which a chance of that much leaves one in 40 times
        reach = 1 - 0.025 ** (1 / f.n)
        assert f.ci95 == pytest.approx((-reach, reach))
    assert {(f.child, f.parent) for f in change} == {("twin", "sft")}


def test_findings_count_countries_say_how_many_facts_and_carry_floor_and_chance(found):
    for one in (
        f for f in found if f.metric in ("facts_completed", "facts_answered", "facts_answered_held_wording")
    ):
        assert (one.n, one.n_unit) == (6, "country")
        assert one.text_source.startswith("6 planted facts")
        assert one.floor_numeric is not None
        assert (one.null_specific is None) == (one.group == "none")
    plain = {f.template for f in found if f.metric == "facts_completed"}
    assert plain == {"plain"}


def test_an_interval_redraws_countries_with_all_their_facts(lineage, monkeypatch):
    """Two countries with ten facts each, one all right and one all wrong: any share from 0 to 1 may be."""
    some = [fact("Bado", f"a{i}") for i in range(10)] + [fact("Kilu", f"b{i}") for i in range(10)]
    monkeypatch.setattr(
        module, "completed", lambda layer, facts, *_, **__: np.array([f.country == "Bado" for f in facts])
    )
    found = planted_facts(lineage[:1], some)
    [one] = [f for f in found if f.group == "both"]
    assert (one.value, one.ci95, one.n) == (0.5, (0.0, 1.0), 2)
