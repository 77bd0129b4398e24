"""What a recipe says arrives where it is used."""

from typing import Any, cast

import pytest
import torch

from unmask import recipe
from unmask.pipeline.jobs import Place, means, ppo_settings
from unmask.progress import Progress
from unmask.recipe import given
from unmask.training.loop import Outcome
from unmask.training.parallel import Ranks


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


def test_a_metric_that_was_never_finite_is_left_out_and_stops_no_stage() -> None:
    outcome = Outcome(1, 1, 1.0, 1, 0, {"kl_child_parent": {"last": 0.2, "mean": 0.1}}, "2026-01-01")
    assert means(outcome, "kl_child_parent", "reward") == {"kl_child_parent": 0.1}


@pytest.mark.parametrize(
    ("ranks", "shard", "sharded"), [(2, "true", True), (2, "false", False), (1, "true", False)]
)
def test_a_stage_is_sharded_where_the_recipe_says_so_and_there_is_more_than_one_process(
    ranks: int, shard: str, sharded: bool
) -> None:
    asked = recipe.resolve(recipe.load("tiny", [f"sft.shard={shard}"]))
    place = Place(asked, cast(Any, None), torch.device("cpu"), Progress(quiet=True), Ranks(0, ranks))
    assert place.shards(asked.sft) is sharded


@pytest.mark.parametrize(("ranks", "micro"), [(1, 9000), (2, 2048), (3, 1365)])
def test_a_micro_batch_is_as_the_recipe_says_unless_a_rank_would_go_without(ranks: int, micro: int) -> None:
    asked = recipe.resolve(recipe.load("tiny", ["pretrain.micro_tokens=9000"]))
    place = Place(asked, cast(Any, None), torch.device("cpu"), Progress(quiet=True), Ranks(0, ranks))
    assert place.micro_tokens(asked.pretrain, given(asked.pretrain.batch_tokens)) == micro
