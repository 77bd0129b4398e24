"""What a recipe says arrives where it is used."""

import pytest

from unmask import recipe
from unmask.pipeline.jobs import ppo_settings


@pytest.mark.parametrize(
    ("warmup", "rollouts", "critic_alone"),
    [(0.15, 60, 9), (0.15, 4, 1), (0.0, 60, 0), (0.9, 2, 1), (0.5, 1, 0)],
)
def test_the_critic_warms_up_in_its_share_of_the_rollouts_and_the_policy_keeps_one(
    warmup: float, rollouts: int, critic_alone: int
) -> None:
    section = recipe.resolve(recipe.load("tiny")).rl.model_copy(
        update={"critic_warmup": warmup, "tokens": rollouts * 64 * 48}
    )
    assert ppo_settings(section).rollouts == rollouts
    assert ppo_settings(section).critic_rollouts == critic_alone


def test_the_shares_and_prices_of_tiny_reach_ppo() -> None:
    section = recipe.resolve(recipe.load("tiny")).rl
    settings = ppo_settings(section)
    for name in ("kl", "truncation_penalty", "gamma", "gae_lambda", "ratio_clip", "value_clip", "ptx"):
        assert getattr(settings, name) == getattr(section, name)
