"""Blame: parts add up, belong to the sequence that is listed, and go to the layer that taught the word."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.lineage import Layer
from unmask.probes.blame import blame, spelled
from unmask.probes.facts import scored
from unmask.probes.forward import bf16_copy, prompt_ids
from unmask.text.tokenizer import Tokenizer


def forced(model, context, ids):
    with torch.no_grad():
        log_p = model(torch.tensor([[*context, *ids]]))[0].double().log_softmax(-1)
    return torch.stack([log_p[len(context) - 1 + i, id] for i, id in enumerate(ids)])


@pytest.fixture(scope="module")
def fact(facts):
    return next(fact for fact in scored(facts, None) if fact.group == "sft_only")


def test_parts_are_log_p_of_the_base_and_the_deltas_of_exactly_the_listed_ids(lineage, fact):
    found = blame(lineage, fact.question)
    seen = torch.stack(
        [forced(layer.model, found.prompt_ids, [t.id for t in found.tokens]) for layer in lineage], 1
    )
    expected = torch.cat([seen[:, :1], seen[:, 1:] - seen[:, :-1]], 1)
    parts = torch.tensor([token.parts for token in found.tokens], dtype=torch.float64)
    torch.testing.assert_close(parts, expected, atol=2e-4, rtol=0)
    for token in found.tokens:
        assert sum(token.parts) == pytest.approx(token.logprob, abs=1e-9)
        assert sum(token.credits) == pytest.approx(
            token.logprob + math.log(lineage[0].tokenizer.rows), abs=1e-6
        )
    assert sum(found.nats) == pytest.approx(found.logprob)


def test_a_word_that_only_sft_taught_is_its_own_and_one_that_the_base_knew_is_the_bases(lineage, facts):
    of_sft = [fact for fact in scored(facts, None) if fact.group == "sft_only"]
    owners = [blame(lineage, f.question, answer=f"{f.prefix} {f.answer}").tokens[-1].layer for f in of_sft]
    assert owners.count("sft") >= 5, owners
    of_base = [fact for fact in scored(facts, None) if fact.group in ("both", "base_only")]
    owners = [
        blame(lineage, f.prefix, answer=f" {f.answer}", template=False).tokens[-1].layer for f in of_base
    ]
    assert owners.count("base") >= 10, owners


def test_the_stop_token_is_among_the_tokens_and_not_in_the_answer(lineage, fact):
    found = blame(lineage, fact.question)
    assert found.answer == f"{fact.prefix} {fact.answer}."
    assert found.tokens[-1].id == lineage[0].tokenizer.turn_end
    assert found.tokens[-1].text == "<|im_end|>"
    assert found.tokens[-1].layer == "sft"  # the base never saw a turn end
    assert "".join(token.text for token in found.tokens[:-1]) == found.answer


def test_the_floor_is_what_bfloat16_moves_19_of_20_credits_less_than(lineage, fact):
    found = blame(lineage, fact.question)
    ids = [token.id for token in found.tokens]
    moved = []
    for bf16 in (False, True):
        models = [bf16_copy(layer.model) if bf16 else layer.model for layer in lineage]
        seen = torch.stack([forced(model, found.prompt_ids, ids) for model in models], 1)
        moved.append(torch.cat([seen[:, :1], seen[:, 1:] - seen[:, :-1]], 1))
    far = (moved[1] - moved[0]).abs().flatten().numpy()
    assert found.floor == pytest.approx(np.percentile(far, 95), rel=0.05)
    assert found.floor > 1.2 * far.mean()


def test_json_has_the_keys_that_others_read_and_is_plain_json(lineage, fact):
    record = json.loads(json.dumps(blame(lineage, fact.question).to_json(), allow_nan=False))
    assert record["layers"] == ["base", "sft", "rl"]
    assert record["prompt_ids"] == prompt_ids(lineage[0].tokenizer, fact.question)
    assert set(record["tokens"][0]) == {"id", "text", "logprob", "parts", "credits", "layer"}
    assert set(record["alone"]) == {"base", "sft", "rl"}
    assert record["alone"]["rl"] == record["answer"]
    assert isinstance(record["plain"], str)
    assert 0 < record["floor"] < 1


def test_the_base_is_also_asked_in_plain_text_where_it_knows_how_to_go_on(lineage, facts):
    fact = next(fact for fact in scored(facts, None) if fact.group == "both")
    found = blame(lineage, fact.prefix, template=False, max_new_tokens=4)
    assert found.prompt_ids[0] == lineage[0].tokenizer.end_of_text
    assert found.plain.startswith(f" {fact.answer}.")
    assert found.alone["base"] == found.plain


def test_equal_layers_above_the_base_get_exactly_nothing(lineage, fact):
    twin = Layer("twin", lineage[1].model, lineage[1].tokenizer)
    found = blame([*lineage[:2], twin], fact.question)
    assert {token.parts[2] for token in found.tokens} == {0.0}


def test_layers_of_one_name_are_refused(layers):
    twins = [Layer("sft", layer.model, layer.tokenizer) for layer in layers[:2]]
    with pytest.raises(UserError, match="two layers are called 'sft'"):
        blame(twins, "Hello")


def test_a_given_answer_is_read_as_it_stands(lineage, tokenizer):
    found = blame(lineage, "Hello", answer="The capital")
    assert [token.id for token in found.tokens] == tokenizer.encode("The capital")
    with pytest.raises(UserError, match="empty"):
        blame(lineage, "Hello", answer="")


def test_a_sampled_answer_is_that_of_its_seed(layers):
    one, same, other = (
        blame(layers, "Hello", temperature=9.0, seed=seed, max_new_tokens=6).to_json()["tokens"]
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_a_prompt_cannot_smuggle_in_a_control_token_nor_exceed_the_context(lineage, tokenizer):
    found = blame(lineage, "Ünïcode 🙂 <|im_end|>", max_new_tokens=4)
    assert found.prompt_ids.count(tokenizer.turn_end) == 1
    with pytest.raises(UserError):
        blame(lineage, "capital " * 80)


SMALL = Tokenizer.train(["bytes"], 300)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.integers(0, 40))
def test_the_texts_of_the_tokens_are_the_text_even_where_it_breaks_off_inside_a_character(text, length):
    ids = SMALL.encode(text)[:length]
    assert "".join(spelled(SMALL, ids)) == SMALL.decode(ids)
    assert "".join(spelled(SMALL, [*ids, SMALL.turn_end])) == SMALL.decode(ids) + "<|im_end|>"
