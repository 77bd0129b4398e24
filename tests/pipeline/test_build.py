"""The seams of the pipeline: what is counted, what is claimed, what is set aside."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unmask import recipe as recipes
from unmask.errors import UserError
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.pipeline.build import Builder, training_flops
from unmask.progress import Progress
from unmask.stages.ppo import ActorCritic


def decoder() -> Decoder:
    model = Decoder(ModelConfig.from_depth(2, vocabulary=128, context=32))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_recipe_and_model_agree_on_the_width_that_a_depth_gives() -> None:
    for depth in range(1, 40):
        config = ModelConfig.from_depth(depth, vocabulary=128, context=32)
        assert config.hidden_size == recipes.width_of(depth)


def test_flops_are_six_a_multiplied_weight_and_token_plus_attention() -> None:
    # width 64, hidden 160 (8/3 of 64 to a multiple of 32), 2 layers, head of 128 rows
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 160) + 128 * 64
    assert training_flops(decoder(), 10, 32) == 6 * 10 * (weights + 2 * 64 * 32)


def test_a_scorers_embedding_multiplies_nothing_and_ppo_trains_two_networks() -> None:
    policy = decoder()
    critic = Scorer.from_decoder(policy, torch.Generator().manual_seed(0))
    one, other = training_flops(policy, 10, 32), training_flops(critic, 10, 32)
    assert one - other == 6 * 10 * (128 * 64 - 64)  # the head of 128 rows against the one of a score
    both: nn.Module = ActorCritic(policy, critic)
    assert training_flops(both, 10, 32) == one + other


def test_setting_aside_moves_a_stage_with_all_later_ones_and_what_speaks_of_them(tmp_path: Path) -> None:
    recipe = recipes.resolve(recipes.load("tiny"))

    def set_aside(first: str) -> None:
        Builder(recipe, tmp_path, torch.device("cpu"), Progress(quiet=True), first).set_aside()

    for name in ("base", "sft", "reward", "gold", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / "work" / name).mkdir(parents=True)
    for name in ("summary.json", "report.html", "recipe.toml"):
        (tmp_path / name).write_text("x", "utf-8")
    set_aside("reward")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["base", "recipe.toml", "set-aside", "sft", "work"]
    aside = sorted(path.name for path in (tmp_path / "set-aside" / "1").iterdir())
    assert aside == ["gold", "report.html", "reward", "rl", "summary.json", "work"]
    (tmp_path / "sft" / "kept").write_text("x", "utf-8")
    set_aside("sft")  # a second time, beside the first
    assert (tmp_path / "set-aside" / "2" / "sft" / "kept").exists()


def test_a_stage_begun_with_other_text_is_refused_by_name(tmp_path: Path) -> None:
    text = tmp_path / "raw.txt"
    text.write_text("one text", "utf-8")
    source = {"path": str(text)}
    data = {
        "name": "made",
        "pretrain": {"sources": [source]},
        "sft": {"sources": [source]},
        "reward": {"source": source},
        "rl": {"sources": [source]},
    }
    recipe = recipes.resolve(recipes.validate(data, "here"))

    def builder() -> Builder:
        return Builder(recipe, tmp_path / "run", torch.device("cpu"), Progress(quiet=True))

    builder().begin("base")
    builder().refuse_another_recipe()
    text.write_text("another text", "utf-8")
    with pytest.raises(UserError, match=r"raw\.txt .*--from base"):
        builder().refuse_another_recipe()
