"""Blame against the truth: the statistic is right, and layers that were taught known facts are told apart."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.probes.blame_truth import auc, blame_truth, fact_nats, fact_text, shuffled_auc
from unmask.probes.facts import PlantedFact, scored
from unmask.probes.forward import prompt_ids
from unmask.probes.probe import Meter, verdict
from unmask.text.tokenizer import Tokenizer


def auc_by_counting(positive, negative):
    wins = 0.0
    for a in positive:
        for b in negative:
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
    return wins / (len(positive) * len(negative))


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_auc_is_the_share_of_pairs_won_and_a_weight_is_a_repetition(positive, negative, seed):
    scores = np.array([*positive, *negative], dtype=float)
    labels = np.arange(len(scores)) < len(positive)
    one = auc(scores, labels, np.ones((1, len(scores))))[0]
    assert one == pytest.approx(auc_by_counting(positive, negative))
    weights = np.random.default_rng(seed).integers(1, 4, len(scores))
    repeated = np.repeat(scores, weights), np.repeat(labels, weights)
    again = auc_by_counting(repeated[0][repeated[1]], repeated[0][~repeated[1]])
    assert auc(scores, labels, weights[None].astype(float))[0] == pytest.approx(again)


def test_a_resample_without_a_pair_has_no_auc():
    assert np.isnan(auc(np.array([1.0, 2.0]), np.array([True, False]), np.array([[2.0, 0.0]])))[0]


def test_shuffling_deals_groups_to_whole_countries_and_averages_to_a_half():
    """With all of a country's scores equal, only 10 · 10 pairs of countries exist: the spread is that
    of 20 points."""
    scores, countries = np.repeat(np.arange(20.0), 5), np.repeat(np.arange(20), 5).tolist()
    positive = scores >= 10
    chance = shuffled_auc(scores, positive, countries)
    assert chance.mean() == pytest.approx(0.5, abs=0.02)
    # Variance of the Mann-Whitney statistic under the null: (m + n + 1) / (12 m n), here of countries.
    assert chance.std() == pytest.approx(np.sqrt(21 / (12 * 100)), rel=0.1)


def test_the_answer_begins_at_the_token_after_the_prefix(tokenizer, facts):
    for fact in facts[:6]:
        text, before = fact_text(tokenizer, fact)
        context = prompt_ids(tokenizer, fact.question)
        assert list(text.ids[: text.start]) == context
        reply = list(text.ids[text.start :])
        assert tokenizer.decode(reply[:before]) == fact.prefix
        assert tokenizer.decode(reply[before:]) == f" {fact.answer}"


def test_a_token_across_the_border_counts_as_answer():
    """A vocabulary that learned "is Paris" as one piece cannot cut the answer off before it."""
    glued = Tokenizer.train(["."], 300)
    glued.encode = lambda text: [300, 301] if text == "It is Paris" else []
    glued.token_bytes = [*glued.token_bytes[:300], b"It", b" is Paris"]
    fact = PlantedFact("X", "f", "both", False, "?", "?", "It is", "Paris")
    text, before = fact_text(glued, fact)
    assert list(text.ids[text.start :]) == [300, 301]
    assert before == 1


def test_nats_are_sums_of_log_ratios_over_the_answers_own_tokens(lineage, facts, tokenizer):
    base, sft, _ = lineage
    some = scored(facts, 2)
    nats = fact_nats(base, sft, some, Meter())
    for i, fact in enumerate(some):
        context, whole = (
            prompt_ids(tokenizer, fact.question),
            tokenizer.encode(f"{fact.prefix} {fact.answer}"),
        )
        border = len(context) + len(tokenizer.encode(fact.prefix))
        ids = torch.tensor([[*context, *whole]])
        with torch.no_grad():
            both = [layer.model(ids)[0].double().log_softmax(-1) for layer in (base, sft)]
        at = [
            torch.stack([log_p[t - 1, ids[0, t]] for t in range(len(context), ids.shape[1])])
            for log_p in both
        ]
        delta, cut = at[1] - at[0], border - len(context)
        assert nats.answer[i] == pytest.approx(float(delta[cut:].sum()), abs=1e-3)
        assert nats.wrapping[i] == pytest.approx(float(delta[:cut].sum()), abs=1e-3)
        assert nats.parent_answer[i] == pytest.approx(float(at[0][cut:].sum()), abs=1e-3)


@pytest.fixture(scope="module")
def found(lineage, facts):
    return blame_truth(lineage[0], lineage[1], facts, floor_limit=3)


def pick(findings, metric, group):
    [one] = [f for f in findings if (f.metric, f.group) == (metric, group)]
    return one


def test_facts_taught_by_sft_alone_are_blamed_on_it(found, lineage, facts):
    nats = fact_nats(lineage[0], lineage[1], scored(facts, None), Meter()).answer
    groups = np.array([fact.group for fact in scored(facts, None)])
    for other in ("both", "base_only"):
        one = pick(found, "blame_auc", f"sft_only_vs_{other}")
        assert one.value == pytest.approx(auc_by_counting(nats[groups == "sft_only"], nats[groups == other]))
        assert one.value >= 0.8
        assert one.ci95[0] <= one.value <= one.ci95[1]
        assert (one.n, one.n_unit, one.unit) == (12, "country", "1")
        assert one.verdict == verdict(one.ci95, zero=0.5, numeric=one.floor_numeric)
        assert one.null_specific > 0.6
    chance = pick(found, "blame_auc", "shuffled")
    assert chance.value == pytest.approx(0.5, abs=0.03)
    assert chance.ci95[0] < 0.3 < 0.7 < chance.ci95[1]
    assert pick(found, "answer_delta", "sft_only").value > pick(found, "answer_delta", "both").value


def test_with_groups_named_wrongly_blame_is_wrong(lineage, facts):
    """The same layers, and the labels of two groups exchanged: the figure must fall below chance."""
    swap = {"both": "sft_only", "sft_only": "both"}
    wrong = [dataclasses.replace(fact, group=swap.get(fact.group, fact.group)) for fact in facts]
    found = blame_truth(lineage[0], lineage[1], wrong, floor_limit=3)
    assert pick(found, "blame_auc", "sft_only_vs_both").value <= 0.2


def test_every_group_has_nats_of_answer_and_wrapping_with_interval_and_floor(found):
    for metric in ("answer_delta", "wrapping_delta", "answer_log_prob_parent"):
        for group in ("both", "base_only", "sft_only", "none"):
            one = pick(found, metric, group)
            assert one.unit == "nats"
            assert one.ci95 is not None
            assert one.floor_numeric > 0
            assert one.text_source == "6 taught replies, teacher-forced"


def test_a_run_without_a_group_has_no_figure_for_it_and_does_not_fail(lineage, facts):
    some = [fact for fact in facts if fact.group != "base_only"]
    found = blame_truth(lineage[0], lineage[1], some, limit=3, floor_limit=2)
    assert {f.group for f in found if f.metric == "blame_auc"} == {"sft_only_vs_both", "shuffled"}


def test_a_layer_that_changed_nothing_cannot_be_told_from_chance(lineage, facts):
    same = blame_truth(lineage[0], lineage[0], facts, limit=None, floor_limit=4)
    for group in ("sft_only_vs_both", "sft_only_vs_base_only"):
        finding = pick(same, "blame_auc", group)
        assert finding.value == 0.5
        assert finding.verdict.startswith("not distinguishable")
