"""The judge's figures against second ways of getting them, and baselines that find what was put there."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.errors import UserError
from unmask.probes import reward_quality as module
from unmask.probes.forward import judged
from unmask.probes.probe import change_bounded, percentiles
from unmask.probes.reward_quality import (
    Compared,
    Opinion,
    Redraw,
    calibration_error,
    calibration_floor,
    correlation,
    reward_quality,
    wins,
    words_baseline,
)
from unmask.stages.reward import through_stop
from unmask.text.chat import render


def talk(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def pair(good, bad, a="a", b="b"):
    return Compared(talk("Hi", good), talk("Hi", bad), a, b)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    words = ("Bado", "Kilu", "capital", "Meno", "What", "is")
    return [
        pair(
            *(" ".join(rng.choice(words, rng.integers(1, 9))) for _ in "ab"),
            *rng.choice(30, 2, replace=False).tolist(),
        )
        for _ in range(40)
    ]


@pytest.fixture(scope="module")
def found(judge, pairs):
    train = [Opinion(f"{'lovely' if i % 2 else 'dull'} word{i % 7}", float(i % 2), i) for i in range(60)]
    return reward_quality(judge, {"all": pairs, "equal_length": pairs[:20]}, train, floor_limit=10)


def pick(findings, metric, group="all"):
    [one] = [f for f in findings if (f.metric, f.group) == (metric, group)]
    return one


def test_accuracy_and_margin_are_those_of_scoring_each_side_alone(judge, pairs, found):
    margins = []
    for each in pairs:
        scores = []
        for side in (each.chosen, each.rejected):
            ids = through_stop(render(judge.tokenizer, side))
            assert ids[-1] == judge.tokenizer.turn_end
            with torch.no_grad():
                scores.append(float(judge.model(torch.tensor([ids]), torch.tensor([len(ids)]))))
        margins.append(scores[0] - scores[1])
    assert pick(found, "reward_margin").value == pytest.approx(np.mean(margins), abs=1e-5)
    assert pick(found, "reward_accuracy").value == pytest.approx(
        np.mean([1.0 if m > 1e-6 else 0.0 if m < -1e-6 else 0.5 for m in margins])
    )
    lengths = [len(each.chosen[1]["content"]) - len(each.rejected[1]["content"]) for each in pairs]
    by_length = np.mean([1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in lengths])
    assert pick(found, "reward_accuracy_length").value == pytest.approx(by_length)


def test_every_group_has_the_judge_beside_its_baselines_with_conversations_as_n(found, pairs):
    for group, some in (("all", pairs), ("equal_length", pairs[:20])):
        for metric in ("reward_accuracy", "reward_accuracy_words", "reward_accuracy_length", "reward_margin"):
            one = pick(found, metric, group)
            assert one.n == len({end for each in some for end in (each.chosen_from, each.rejected_from)})
            assert one.n_unit == "conversation"
            assert one.ci95[0] <= one.value <= one.ci95[1]
        ahead = pick(found, "reward_accuracy_over_words", group).value
        levels = [pick(found, m, group).value for m in ("reward_accuracy", "reward_accuracy_words")]
        assert ahead == pytest.approx(levels[0] - levels[1])
        assert pick(found, "reward_calibration_error", group).null_specific > 0


def test_a_pair_counts_as_often_as_both_its_conversations_were_drawn():
    some = [pair("x", "y", "a", "b"), pair("x", "y", "c", "a"), pair("x", "y", "d", "d")]
    redraw = Redraw(some, seed=0)
    assert redraw.units == 4
    order = {"a": 0, "c": 1, "d": 2, "b": 3}
    drawn = np.zeros((1, 4))
    for name, times in (("a", 2), ("b", 1), ("c", 0), ("d", 3)):
        drawn[0, order[name]] = times
    assert redraw.weights(drawn).tolist() == [[2.0, 0.0, 3.0]]


def test_one_conversation_in_every_pair_widens_the_interval():
    """Fifty pairs that share their chosen conversation are not fifty comparisons."""
    values = np.random.default_rng(0).normal(size=50)
    apart = Redraw([pair("x", "y", f"a{i}", f"b{i}") for i in range(50)], 0).estimate(values)
    shared = Redraw([pair("x", "y", f"a{i // 10}", f"b{i}") for i in range(50)], 0).estimate(values)
    assert apart.n == 100
    assert shared.n == 55
    assert apart.value == shared.value


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=9))
def test_a_tie_is_half_a_win(sides):
    a, b = np.array(sides).T
    assert np.allclose(wins(a, b) + wins(b, a), 1.0)
    assert wins(a, a).tolist() == [0.5] * len(a)


def test_calibration_error_is_bin_by_bin_the_gap_of_confidence_and_being_right():
    margins = np.linspace(-1, 3, 40)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    order = np.argsort(confidence, kind="stable")
    by_hand = 0.0
    for part in np.array_split(order, 10):
        by_hand += len(part) / 40 * abs(np.mean(margins[part] > 0) - confidence[part].mean())
    assert calibration_error(margins, np.ones((1, 40)))[0] == pytest.approx(by_hand)


def test_a_calibrated_judge_is_within_its_floor_nine_times_in_ten_and_an_overconfident_one_is_not():
    rng = np.random.default_rng(3)
    within = 0
    for seed in range(40):
        size = rng.exponential(1.0, 200)
        right = rng.random(200) < 1 / (1 + np.exp(-size))
        margins = np.where(right, size, -size)
        error = calibration_error(margins, np.ones((1, 200)))[0]
        within += error <= calibration_floor(margins, seed) if seed < 20 else 1
    assert within >= 36
    assert calibration_error(6 * margins, np.ones((1, 200)))[0] > calibration_floor(6 * margins)


def test_a_calibrated_four_way_toss_has_the_floor_that_simulation_gave_others():
    """Equal confidences: the floor is that of ten bins of 50 fair-ish coins, E|mean − p| =
    √(2p(1−p)/(50π))."""
    margins = np.full(500, np.log(3.0))
    p = 0.75
    expected = np.sqrt(2 * p * (1 - p) / (50 * np.pi))
    assert expected < calibration_floor(margins) < 1.7 * expected


def test_correlation_is_pearsons_and_a_weight_is_a_repetition():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(30, 2)) @ np.array([[1.0, 0.6], [0.0, 1.0]])
    weights = rng.integers(1, 4, 30)
    expected = np.corrcoef(np.repeat(values, weights, axis=0).T)[0, 1]
    assert correlation(values, weights[None].astype(float))[0] == pytest.approx(expected)


def test_a_change_that_all_units_share_is_not_known_exactly():
    reach = 1 - 0.025 ** (1 / 20)
    assert change_bounded((0.0, 0.0), 20) == pytest.approx((-reach, reach))
    assert change_bounded((1.0, 1.0), 20) == pytest.approx((1 - reach, 1.0))
    rounded = (0.9999999999999999, 1.0000000000000009)  # what resampling makes of 60 that all changed by 1
    assert change_bounded(rounded, 20) == pytest.approx((1 - reach, 1.0))
    assert change_bounded((-0.1, 0.2), 20) == (-0.1, 0.2)
    assert change_bounded(None, 20) is None


def test_the_baseline_on_words_learns_words_and_word_pairs():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    fill = [" ".join(rng.choice(["a", "b", "c", "d", "e"], 6)) for _ in range(300)]
    train = [
        Opinion(f"{text} {'very good' if i % 2 else 'good very'}", float(i % 2), i)
        for i, text in enumerate(fill)
    ]
    score = words_baseline(train)
    assert score(["a b very good"])[0] > score(["a b good very"])[0] + 0.3


def test_the_penalty_is_chosen_where_no_text_of_an_owner_is_known():
    """Each owner has a name that stands in all its texts, and an opinion by chance; one word tells a little. Who sees
    the name in other texts of the owner takes it for the cause, and the least penalty for the best."""
    rng = np.random.default_rng(0)
    train = []
    for owner in range(60):
        liked = bool(rng.random() < 0.5)
        for _ in range(8):
            hint = "fine" if rng.random() < (0.65 if liked else 0.35) else "poor"
            train.append(Opinion(f"name{owner} {hint} w{rng.integers(9)}", float(liked), owner))
    alone = [each._replace(owner=i) for i, each in enumerate(train)]

    def weight_of_names(score):
        return np.std(score([f"name{owner}" for owner in range(60)]))

    assert weight_of_names(words_baseline(train)) < 0.5 * weight_of_names(words_baseline(alone))


def test_the_baseline_on_words_says_on_how_many_texts_it_was_fitted(judge, pairs):
    train = [Opinion("a good day", 1.0, "a"), Opinion("a bad day", -1.0, "b")] * 6
    found = reward_quality(judge, {"all": pairs}, train, floor_limit=4)
    assert pick(found, "reward_accuracy_words").text_source.endswith("; fitted on 12 texts")


def test_without_training_texts_there_is_no_baseline_on_words(judge, pairs):
    found = reward_quality(judge, {"all": pairs}, None, floor_limit=4)
    assert not any("words" in f.metric for f in found)


def test_pairs_beyond_the_context_are_dropped_and_counted(judge, pairs):
    found = reward_quality(judge, {"all": [*pairs[:5], pair("capital " * 90, "x")]}, None, floor_limit=2)
    assert (
        pick(found, "reward_accuracy").text_source == "5 held-out pairs (1 beyond the context were dropped)"
    )


def test_the_interval_of_the_calibration_error_reaches_as_far_down_as_redrawing_reaches_up(
    judge, pairs, found
):
    one = pick(found, "reward_calibration_error")
    sides = [
        through_stop(render(judge.tokenizer, side)) for each in pairs for side in (each.chosen, each.rejected)
    ]
    scores = judged(judge, sides)
    high = percentiles(Redraw(pairs, 0).samples(scores[0::2] - scores[1::2], calibration_error))[1]
    assert one.ci95 == pytest.approx((max(0.0, 2 * one.value - high), high), abs=1e-6)
    assert one.ci95[1] > one.value


def test_a_group_without_pairs_abstains(judge, pairs):
    found = reward_quality(judge, {"all": pairs[:5], "equal_length": pairs[:1]}, None, floor_limit=2)
    [nothing] = [f for f in found if f.group == "equal_length"]
    assert nothing.metric == "reward_accuracy"
    assert nothing.value is None
    assert nothing.verdict.startswith("abstain: n = 1")


def test_texts_that_are_all_of_one_length_have_no_correlation_with_it_and_stop_nobody(judge, recwarn):
    same = "capital " * 5  # 49 characters with what is around it, whose mean over many texts is rounded
    alike = [pair(f"{same}capital", f"{same}meaning", f"a{i}", f"b{i}") for i in range(100)]
    found = reward_quality(judge, {"all": alike}, None, floor_limit=2)
    one = pick(found, "reward_length_correlation")
    assert one.value is None and one.floor_numeric is None
    assert one.verdict.startswith("abstain")
    assert not recwarn.list


def test_where_no_word_stands_in_two_texts_there_is_no_baseline_on_words(judge, pairs):
    apart = [Opinion("abc", 1.0, "a"), Opinion("abd", -1.0, "b")]
    assert words_baseline(apart) is None
    assert (
        words_baseline([Opinion("abc abc", 1.0, "a"), Opinion("abc", -1.0, "a")]) is None
    )  # none to set aside
    found = reward_quality(judge, {"all": pairs}, apart, floor_limit=2)
    assert not [f for f in found if f.metric == "reward_accuracy_words"]


def test_missing_scikit_learn_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"unmask\[demo\]"):
        module.words_baseline([Opinion("a", 1.0, "a")])


def test_a_pair_weighs_the_product_of_how_often_its_conversations_were_drawn():
    pairs = [module.Compared([], [], *ends) for ends in (("a", "b"), ("a", "c"), ("d", "d"))]
    # Conversations are numbered as they come: a, d, b, c. One that is both sides of a pair counts once.
    drawn = np.array([[2.0, 3.0, 5.0, 7.0]])
    assert module.Redraw(pairs, seed=0).weights(drawn).tolist() == [[10.0, 14.0, 3.0]]


def test_a_judge_that_is_always_right_gets_the_binomial_bound_of_so_many_pairs() -> None:
    pairs = [Compared([], [], f"a{i}", f"b{i}") for i in range(20)]
    found = Redraw(pairs, 0).estimate(np.ones(20), share=True)
    assert found.ci95 == pytest.approx((0.025 ** (1 / 20), 1.0))


def test_each_text_is_read_once_though_many_pairs_and_groups_hold_it(judge, pairs, found, monkeypatch):
    read = []
    monkeypatch.setattr(
        module, "judged", lambda judge, texts, **keys: read.extend(texts) or judged(judge, texts, **keys)
    )
    again = reward_quality(judge, {"all": [*pairs, *pairs], "same": pairs}, None, floor_limit=1)
    distinct = {tuple(through_stop(render(judge.tokenizer, side))) for p in pairs for side in p[:2]}
    assert len(read) == len(distinct) + 2  # the floor reads one pair again, in bfloat16
    assert pick(again, "reward_margin").value == pytest.approx(pick(found, "reward_margin").value)
