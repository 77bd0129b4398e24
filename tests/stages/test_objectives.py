"""The losses and advantages: examples computed by hand, definitions, and what projects get wrong."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.stages import objectives

CLIP = 0.2


def example() -> dict[str, Tensor]:
    """An answer of three tokens, the third its stop token; the numbers below come from it by hand."""
    return {
        "log_probs": torch.tensor([[-1.0, -2.0, -0.5]]),
        "reference": torch.tensor([[-1.5, -1.0, -0.5]]),
        "values": torch.tensor([[0.5, 1.0, 1.5]]),
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "score": torch.tensor([2.0]),
    }


def test_three_tokens_of_ppo_equal_the_numbers_computed_by_hand() -> None:
    e = example()
    rewards = objectives.token_rewards(e["score"], e["log_probs"] - e["reference"], e["mask"], beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 2.0]]))
    advantages, returns = objectives.gae(rewards, e["values"], e["mask"], gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.65375, 0.675, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[1.15375, 1.675, 2.0]]))
    white = objectives.whiten(advantages, e["mask"])
    torch.testing.assert_close(white, torch.tensor([[0.56645, 0.83899, -1.40544]]), atol=1e-4, rtol=0)

    new = torch.tensor([[-0.8, -2.3, -0.5]])  # ratios 1.2214 (clipped to 1.2), 0.7408 and 1
    policy = objectives.clipped_policy_loss(new, e["log_probs"], white, CLIP)
    torch.testing.assert_close(policy, torch.tensor([[-0.67974, -0.62154, 1.40544]]), atol=1e-4, rtol=0)

    value = objectives.clipped_value_loss(torch.tensor([[0.9, 1.0, 2.1]]), e["values"], returns, CLIP)
    torch.testing.assert_close(value, torch.tensor([[0.102945, 0.2278125, 0.045]]), atol=1e-5, rtol=0)


def test_score_lands_on_the_last_action_of_each_row_and_nowhere_else() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, True, True]])
    rewards = objectives.token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 3), mask, beta=0.5)
    assert rewards.tolist() == [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


def test_what_stands_at_masked_positions_is_never_read() -> None:
    mask = torch.tensor([[True, False, True]])
    dirty = torch.tensor([[0.3, float("nan"), -0.2]])
    rewards = objectives.token_rewards(torch.tensor([1.0]), dirty, mask, beta=0.1)
    advantages, returns = objectives.gae(rewards, dirty, mask, gamma=1.0, lam=0.95)
    for result in (rewards, advantages, returns, objectives.whiten(dirty, mask)):
        assert result.isfinite().all()
        assert result[0, 1] == 0


def test_kl_in_the_reward_is_k1_and_costs_what_drifts_from_the_reference() -> None:
    """Over samples from π the mean penalty is β·KL(π ‖ ref); a log-ratio below 0 pays, as k3 never does."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    log_ratio = (policy / reference).log().float()
    rewards = objectives.token_rewards(
        torch.zeros(3), log_ratio[:, None], torch.ones(3, 1, dtype=torch.bool), beta=0.5
    )[:, 0]
    exact = (policy * (policy / reference).log()).sum()
    assert (policy * rewards).sum() == pytest.approx(-0.5 * exact.item(), rel=1e-5)
    assert rewards[0] < 0 < rewards[2]


masked_rows = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 9).flatmap(
        lambda columns: st.lists(
            st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


@settings(deadline=None, max_examples=150)
@given(masked_rows, st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_gae_equals_its_quadratic_definition_on_random_masks(
    rows: list[list[bool]], gamma: float, lam: float, seed: int
) -> None:
    mask = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(mask.shape, generator=generator)
    values = torch.randn(mask.shape, generator=generator)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        actions = [t for t, taken in enumerate(row) if taken]
        v = [values[b, t].item() for t in actions] + [0.0]
        errors = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(actions)]
        for i, t in enumerate(actions):
            expected[b, t] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(actions)))
    advantages, returns = objectives.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0.0))


def test_gae_with_lambda_one_is_the_sum_of_rewards_ahead() -> None:
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    _, returns = objectives.gae(rewards, values, torch.ones(2, 5, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


@settings(deadline=None)
@given(masked_rows, st.integers(0, 2**31))
def test_whitening_gives_mean_zero_and_variance_one_over_the_masked_batch_only(
    rows: list[list[bool]], seed: int
) -> None:
    mask = torch.tensor(rows)
    assume(bool(mask.any()))
    x = 3 + 5 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    white = objectives.whiten(x, mask)
    assert (white[~mask] == 0).all()
    if mask.sum() > 1 and x[mask].var() > 1e-3:  # far above eps
        assert white[mask].mean().item() == pytest.approx(0, abs=1e-4)
        assert white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def test_whitening_keeps_rows_comparable_because_it_sees_the_whole_batch() -> None:
    x = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    white = objectives.whiten(x, torch.ones(2, 2, dtype=torch.bool))  # row by row it would be all 0
    torch.testing.assert_close(white, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


def test_whitening_equal_advantages_gives_zeros_and_no_nan() -> None:
    assert objectives.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).eq(0).all()


def test_bradley_terry_is_ln_2_at_equal_scores_and_ignores_a_common_constant() -> None:
    scores = torch.tensor([-3.0, 0.0, 40.0])
    torch.testing.assert_close(objectives.bradley_terry(scores, scores), torch.full((3,), math.log(2)))
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0])
    losses = objectives.bradley_terry(chosen, rejected)
    torch.testing.assert_close(losses, torch.log1p(torch.exp(rejected - chosen)))
    torch.testing.assert_close(objectives.bradley_terry(chosen + 9, rejected + 9), losses)
    assert losses[0] < math.log(2) < losses[1]


def test_bradley_terry_stays_finite_at_extreme_scores() -> None:
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = objectives.bradley_terry(chosen, torch.tensor([1e4]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-1)


def test_policy_loss_at_ratio_one_has_the_policy_gradient() -> None:
    old = torch.tensor([-1.0, -2.0, -3.0])
    log_probs, advantages = old.clone().requires_grad_(), torch.tensor([0.5, -1.5, 0.0])
    loss = objectives.clipped_policy_loss(log_probs, old, advantages, CLIP)
    assert torch.equal(loss, -advantages)
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)


@given(st.floats(-60, 60, width=32), st.floats(-5, 5, width=32))
def test_policy_loss_is_bounded_where_leaving_the_range_would_pay(log_ratio: float, advantage: float) -> None:
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    loss = objectives.clipped_policy_loss(log_probs, torch.zeros(1), torch.tensor([advantage]), CLIP)
    bound = -(1 + CLIP) * advantage if advantage > 0 else (1 - CLIP) * -advantage
    assert loss.isfinite().all()
    assert loss.item() >= bound - 1e-4 * abs(bound) - 1e-30
    loss.sum().backward()
    assert log_probs.grad is not None
    past = log_ratio > math.log(1 + CLIP) + 1e-3 if advantage > 0 else log_ratio < math.log(1 - CLIP) - 1e-3
    if past:  # what has left the range on the paying side gets no further push
        assert log_probs.grad.item() == 0
    elif advantage < 0 and math.log(1 + CLIP) < log_ratio < 19:  # the other side is pulled back
        assert log_probs.grad.item() > 0


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10))
def test_value_loss_is_the_pessimistic_one_and_at_most_the_larger_error(
    value: float, old: float, target: float
) -> None:
    v = torch.tensor([value], requires_grad=True)
    loss = objectives.clipped_value_loss(v, torch.tensor([old]), torch.tensor([target]), CLIP)
    plain = 0.5 * (value - target) ** 2
    assert loss.item() >= plain * (1 - 1e-4) - 1e-6
    assert loss.item() <= max(plain, 0.5 * (abs(old - target) + CLIP) ** 2) * (1 + 1e-4) + 1e-6
    loss.sum().backward()
    assert v.grad is not None
    if old + CLIP + 1e-3 < value < target or target < value < old - CLIP - 1e-3:
        assert v.grad.item() == 0  # already moved far enough towards the target


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0, float("nan")])
    mask = torch.tensor([True, True, True, False])
    constant = torch.full((4,), 3.0)
    assert objectives.explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert objectives.explained_variance(constant, returns, mask).item() == pytest.approx(0, abs=1e-6)
    assert objectives.explained_variance(-returns, returns, mask) < 0
    assert objectives.explained_variance(returns, torch.ones(4), mask) == 0


def test_a_score_at_a_length_is_read_off_the_line_through_all_scores() -> None:
    lengths = torch.tensor([2.0, 4.0, 9.0])
    assert objectives.at_length(3 * lengths - 1, lengths, 10.0) == pytest.approx(29.0)


def test_longer_answers_alone_do_not_raise_the_score_at_a_length() -> None:
    lengths = torch.tensor([2.0, 4.0, 9.0])
    short, long = lengths, lengths + 20
    assert objectives.at_length(0.1 * long, long, 5.0) == pytest.approx(
        objectives.at_length(0.1 * short, short, 5.0)
    )


def test_without_a_spread_of_lengths_the_mean_is_taken_and_without_answers_nothing() -> None:
    same = torch.full((3,), 4.0)
    assert objectives.at_length(torch.tensor([1.0, 2.0, 6.0]), same, 9.0) == 3.0
    assert math.isnan(objectives.at_length(torch.empty(0), torch.empty(0), 9.0))
