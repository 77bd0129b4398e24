"""The seams of the pipeline: what is counted, what is claimed, what is set aside."""

from pathlib import Path

import pytest
import torch

from unmask import recipe as recipes
from unmask.errors import UserError
from unmask.model.config import ModelConfig
from unmask.pipeline import begun
from unmask.pipeline.build import Builder
from unmask.progress import Progress


def test_recipe_and_model_agree_on_the_width_that_a_depth_gives() -> None:
    for depth in range(1, 40):
        config = ModelConfig.from_depth(depth, vocabulary=128, context=32)
        assert config.hidden_size == recipes.width_of(depth)


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

    begun.write(tmp_path / "run/work/base", builder()._decides("base"))
    text.write_text("another text", "utf-8")
    builder().refuse_another_recipe()  # nothing was trained: it begins anew
    (tmp_path / "run/work/base/snapshots/step_00000001").mkdir(parents=True)
    text.write_text("one text", "utf-8")
    builder().refuse_another_recipe()
    text.write_text("another text", "utf-8")
    with pytest.raises(UserError, match=r"raw\.txt .*--from base"):
        builder().refuse_another_recipe()
