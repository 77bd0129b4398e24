"""Prompts, answers, scores, and which token is an action read where."""

import pytest
import torch
from small_models import CPU, STOP, answer, decoder, rows, scorer

from unmask.errors import UserError
from unmask.stages.reward import centre, scores
from unmask.stages.rollouts import (
    Prompts,
    RewardModel,
    Rollout,
    Source,
    actions,
    answered,
    check,
    fitting,
    log_probs,
)


def test_three_actions_are_read_at_the_positions_before_them() -> None:
    """Prompt 10 11, answer 20 21 stop: 20 was chosen after 11, at position 1, the stop at position 3."""
    acts = actions(Rollout([[10, 11]], [answer([20, 21, STOP])]), [0], CPU)
    assert acts.ids_BT.tolist() == [[10, 11, 20, 21]]
    assert acts.before_N.tolist() == [1, 2, 3]
    assert acts.taken_N.tolist() == [20, 21, STOP]
    assert acts.tokens == 4
    model = decoder(0)
    table = model(torch.tensor([[10, 11, 20, 21]]))[0].log_softmax(-1)
    expected = torch.stack([table[1, 20], table[2, 21], table[3, STOP]])
    torch.testing.assert_close(log_probs(model, acts), expected)


def test_actions_of_unequal_rows_equal_those_of_each_row_alone() -> None:
    model, prompts = decoder(1), rows(0, 6, 12)
    rollout = Rollout(prompts, [answer([*ids, STOP]) for ids in rows(1, 6, 9)])
    together = log_probs(model, actions(rollout, range(6), CPU))
    alone = torch.cat([log_probs(model, actions(rollout, [row], CPU)) for row in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_the_stop_token_is_an_action_and_nothing_of_the_prompt_is() -> None:
    rollout = Rollout([[9, STOP, 9]], [answer([5, STOP])])
    acts = actions(rollout, [0], CPU)
    assert acts.taken_N.tolist() == [5, STOP]


def test_the_sampler_and_the_trainer_agree_on_log_probabilities() -> None:
    model = decoder(2)
    rollout = answered(model, rows(0, 12, 9), answer_tokens=10, stop_ids=[STOP], seed=3, rows=5)
    sampled = torch.tensor([p for found in rollout.answers for p in found.log_probs])
    recomputed = log_probs(model, actions(rollout, range(12), CPU))
    torch.testing.assert_close(recomputed, sampled, atol=1e-4, rtol=1e-4)


def test_answers_come_from_the_whole_distribution_at_temperature_one() -> None:
    """No top-k, no top-p, no temperature: frequencies equal softmax, and rare tokens occur."""
    model, n = decoder(3), 3000
    rollout = answered(model, [[7, 8]] * n, answer_tokens=1, stop_ids=[STOP], seed=0, rows=1000)
    p = model(torch.tensor([[7, 8]]))[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([found.ids[0] for found in rollout.answers]), minlength=len(p))
    assert (counts / n - p).abs().max() < 4 * (0.25 / n) ** 0.5
    assert counts[p < 0.01].sum() > 0


def test_the_reward_model_has_no_opinion_of_an_answer_that_was_cut_and_never_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = scorer(0), list[list[int]]()
    forward = model.forward

    def spy(ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        seen.extend(ids[:n].tolist() for ids, n in zip(ids_BT, lengths_B, strict=True))
        return forward(ids_BT, lengths_B)

    monkeypatch.setattr(model, "forward", spy)
    rollout = Rollout([[5], [6], [7]], [answer([8, STOP]), answer([8, 9]), answer([STOP])])
    result = RewardModel(model, micro_tokens=64)(rollout)
    assert sorted(seen) == [[5, 8, STOP], [7, STOP]]
    assert result[1].isnan()
    torch.testing.assert_close(result[[0, 2]], scores(model, [[5, 8, STOP], [7, STOP]]))


def test_rewards_are_centred_by_the_models_offset() -> None:
    model, prompts = scorer(1), rows(0, 5, 6)
    rollout = Rollout(prompts, [answer([9, STOP])] * 5)
    judge = RewardModel(model, micro_tokens=64)
    before = judge(rollout)
    offset = centre(model, [[*prompt, 9, STOP] for prompt in prompts])
    torch.testing.assert_close(judge(rollout), before - offset)
    assert judge(rollout).mean().item() == pytest.approx(0, abs=1e-6)


def test_a_rollout_of_truncated_answers_only_has_no_opinion_and_is_said_to_be_broken() -> None:
    rollout = Rollout([[5], [6]], [answer([8, 9]), answer([8, 8])])
    result = RewardModel(scorer(0), micro_tokens=64)(rollout)
    assert result.isnan().all()
    assert check(rollout, result).keys() == {"truncated"}


def test_constant_rewards_and_empty_answers_are_said_and_healthy_rollouts_are_not() -> None:
    whole = Rollout([[5], [6]], [answer([8, STOP]), answer([9, STOP])])
    empty = Rollout([[5], [6]], [answer([STOP]), answer([STOP])])
    assert check(whole, torch.tensor([0.1, 0.2])) == {}
    assert check(whole, torch.tensor([0.2, 0.2])).keys() == {"constant"}
    assert check(empty, torch.tensor([0.1, 0.2])).keys() == {"empty"}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_reward_that_is_not_a_number_stops_training_with_a_reason(broken: float) -> None:
    rollout = Rollout([[5], [6]], [answer([8, STOP]), answer([9, STOP])])
    with pytest.raises(UserError, match="1 of 2 answers is not a finite number"):
        check(rollout, torch.tensor([0.1, broken]))


def test_only_nan_says_of_a_cut_answer_that_the_judge_has_no_opinion() -> None:
    rollout = Rollout([[5], [6]], [answer([8, STOP]), answer([9, 9])])
    assert check(rollout, torch.tensor([0.1, torch.nan])) == {}
    with pytest.raises(UserError, match="1 of 2 answers is not a finite number"):
        check(rollout, torch.tensor([0.1, torch.inf]))


def test_prompts_are_drawn_in_shares_as_a_pure_function_of_the_rollout() -> None:
    sources = [Source("a", rows(0, 30, 5), 0.75), Source("b", rows(1, 4, 5), 0.25)]
    prompts = Prompts(sources, room=20, seed=7)
    drawn = prompts.draw(2, 16)
    assert drawn == Prompts(sources, room=20, seed=7).draw(2, 16)
    assert drawn != prompts.draw(3, 16)
    assert sum(prompt in sources[0].prompts for prompt in drawn) >= 12
    assert prompts.fingerprint != Prompts(sources, room=20, seed=8).fingerprint


def test_a_prompt_that_does_not_fit_the_context_is_an_error_that_names_the_source() -> None:
    with pytest.raises(UserError, match=r"'chat'.*prompt of 9 tokens.*leaves 8"):
        Prompts([Source("chat", [[5] * 9], 1.0)], room=8, seed=0)
    with pytest.raises(UserError, match=r"'chat'.*no prompt"):
        Prompts([Source("chat", [], 1.0)], room=8, seed=0)


def test_prompts_that_are_too_long_are_dropped_and_counted() -> None:
    assert fitting([[1] * 3, [1] * 9, [1] * 4], room=4) == ([[1] * 3, [1] * 4], 1)
