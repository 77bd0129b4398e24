"""What RL did: gains at equal length, the KL where the child speaks, and nothing where nothing changed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted_world import nudged

from unmask.errors import UserError
from unmask.generation.engine import Answer
from unmask.lineage import Layer
from unmask.model.scorer import Scorer
from unmask.probes import rl_effect as module
from unmask.probes.forward import Judge, prompt_ids, say
from unmask.probes.probe import change_bounded
from unmask.probes.rl_effect import capitals, controlled_gain, rl_effect


def said(layer, prompts, limit, **settings):
    """What the layer says, every third answer cut before its end."""
    answers = say(layer, prompts, limit, **settings)
    return [Answer(a.ids[:4], a.log_probs[:4], False) if i % 3 == 0 else a for i, a in enumerate(answers)]


@pytest.fixture(scope="module")
def pair(lineage):
    """SFT and a child of it that says other things, and still ends its turns."""
    sft = lineage[1]
    return sft, Layer("rl", nudged(sft.model, 0.02, 3), sft.tokenizer, "h5")


@pytest.fixture(scope="module")
def prompts(tokenizer, facts):
    return [prompt_ids(tokenizer, fact.question) for fact in facts]


@pytest.fixture(scope="module")
def gold(tokenizer, lineage):
    return Judge(
        "gold", Scorer.from_decoder(lineage[0].model, torch.Generator().manual_seed(9)), tokenizer, "h4"
    )


@pytest.fixture(scope="module")
def found(pair, prompts, judge, gold):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "say", said)
        return rl_effect(*pair, prompts, judge, gold, max_new_tokens=16, floor_limit=6)


def pick(findings, metric, child=None):
    [one] = [f for f in findings if f.metric == metric and child in (None, f.child)]
    return one


def test_capitals_are_a_share_of_letters():
    assert capitals("LELE le 12!") == 0.5 + 1 / 6
    assert capitals("") == capitals("12 !") == 0.0


@given(st.integers(0, 50))
def test_the_gain_at_equal_length_is_that_of_least_squares_with_a_common_slope(seed):
    rng = np.random.default_rng(seed)
    n = 12
    lengths = rng.integers(1, 30, (n, 2)).astype(float)
    scores = 0.1 * lengths + rng.normal(size=(n, 2)) + [0.0, 0.7]
    values = np.concatenate([scores, lengths], 1)
    layer = np.repeat([0.0, 1.0], n)
    design = np.stack([np.ones(2 * n), layer, lengths.T.ravel()], 1)
    fitted, *_ = np.linalg.lstsq(design, scores.T.ravel(), rcond=None)
    assert controlled_gain(values, np.ones((1, n)))[0] == pytest.approx(fitted[1])
    weights = rng.integers(0, 3, n)
    if len(set(weights.nonzero()[0].tolist())) > 2:
        again = np.repeat(values, weights, axis=0)
        expected = controlled_gain(again, np.ones((1, len(again))))[0]
        assert controlled_gain(values, weights[None].astype(float))[0] == pytest.approx(expected)


def test_a_judge_that_only_likes_length_gives_no_gain_at_equal_length():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(5, 15, 40), rng.integers(15, 40, 40)], 1).astype(float)
    values = np.concatenate([0.3 * lengths, lengths], 1)
    assert controlled_gain(values, np.ones((1, 40)))[0] == pytest.approx(0.0, abs=1e-9)
    plain = np.concatenate([0.3 * lengths, np.zeros((40, 2))], 1)
    assert controlled_gain(plain, np.ones((1, 40)))[0] > 3


def test_a_layer_and_its_copy_gain_and_differ_by_exactly_nothing(lineage, prompts, judge, gold):
    twin = Layer("twin", lineage[1].model, lineage[1].tokenizer)
    found = rl_effect(lineage[1], twin, prompts[:8], judge, gold, max_new_tokens=16, floor_limit=3)
    for metric in ("proxy_gain", "gold_gain", "kl_child_parent", "capitals_change"):
        one = pick(found, metric)
        assert (one.value, one.ci95) == (0.0, (0.0, 0.0))
        assert one.verdict.startswith("not distinguishable")
    stops = pick(found, "answers_stop_change")  # a share of eight prompts
    assert (stops.value, stops.ci95) == (0.0, change_bounded((0.0, 0.0), 8))


def test_gains_are_paired_differences_of_scores_of_answers_that_end_their_turn(
    pair, prompts, judge, tokenizer, found
):
    old, new = (said(layer, prompts, 16, temperature=1.0) for layer in pair)
    gains = []
    for prompt, a, b in zip(prompts, old, new, strict=True):
        if a.ids[-1] == b.ids[-1] == tokenizer.turn_end:
            with torch.no_grad():
                before, after = (
                    float(
                        judge.model(
                            torch.tensor([[*prompt, *x.ids]]), torch.tensor([len(prompt) + len(x.ids)])
                        )
                    )
                    for x in (a, b)
                )
            gains.append(after - before)
    one = pick(found, "proxy_gain")
    assert 5 < one.n == len(gains) <= len(prompts) - 9
    assert one.value == pytest.approx(np.mean(gains), abs=1e-5)
    assert (one.child, one.parent, one.unit) == ("rl", "sft", "log-odds")


def test_an_answer_that_ends_as_no_conversation_does_is_never_judged(pair, prompts, judge, tokenizer):
    def ended(layer, prompts, limit, **settings):
        by_another = tokenizer.end_of_text
        return [
            Answer([9, by_another if i % 2 else tokenizer.turn_end], [0.0] * 2, True)
            for i in range(len(prompts))
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "say", ended)
        found = rl_effect(*pair, prompts[:9], judge, None, max_new_tokens=4, floor_limit=2)
    assert pick(found, "proxy_gain").n == 5
    assert pick(found, "answers_stop", "rl").value == 1.0


@pytest.mark.parametrize("cut", ["sft", "rl"])
def test_a_prompt_whose_answer_one_layer_did_not_finish_is_never_judged(
    pair, prompts, judge, tokenizer, monkeypatch, cut
):
    def ended(layer, prompts, limit, **settings):
        return [
            Answer([9, 9], [0.0] * 2, False)
            if layer.name == cut and i % 2
            else Answer([9, tokenizer.turn_end], [0.0] * 2, True)
            for i in range(len(prompts))
        ]

    monkeypatch.setattr(module, "say", ended)
    found = rl_effect(*pair, prompts[:9], judge, None, max_new_tokens=4, floor_limit=2)
    assert {pick(found, "proxy_reward", name).n for name in ("sft", "rl")} == {5}
    assert pick(found, "proxy_gain").n == 5


def test_levels_of_both_layers_and_their_change_agree(found, prompts):
    for metric, unit in (("answers_stop", "1"), ("answer_length", "tokens"), ("capitals", "1")):
        before, after = pick(found, metric, "sft"), pick(found, metric, "rl")
        assert before.unit == unit
        assert before.n == len(prompts)
        assert pick(found, f"{metric}_change").value == pytest.approx(after.value - before.value)
    assert pick(found, "answers_stop", "rl").value == pytest.approx(1 - 9 / len(prompts))


def test_the_kl_is_exact_where_the_child_speaks(pair, prompts, found):
    per_answer = []
    for prompt, answer in zip(prompts, said(pair[1], prompts, 16, temperature=1.0), strict=True):
        ids = answer.ids[:-1] if answer.finished else answer.ids
        with torch.no_grad():
            log_p, log_q = (
                pair[k].model(torch.tensor([[*prompt, *ids]]))[0].double().log_softmax(-1) for k in (1, 0)
            )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        per_answer.append(float(kl[len(prompt) - 1 : -1].mean()))
    one = pick(found, "kl_child_parent")
    assert one.value == pytest.approx(np.mean(per_answer), rel=1e-3)
    assert one.floor_numeric > 0
    assert one.unit == "nats/token"


def test_everything_has_n_interval_and_floor_and_no_gold_no_gold_figures(found, pair, prompts, judge):
    for one in found:
        assert one.ci95 is not None
        assert one.floor_numeric is not None
        assert one.n_unit == "prompt"
    without = rl_effect(*pair, prompts[:6], judge, None, max_new_tokens=16, floor_limit=2)
    assert not any(f.metric.startswith("gold") for f in without)
    with pytest.raises(UserError, match="no prompt"):
        rl_effect(*pair, [], judge, None)
