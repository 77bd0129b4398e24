"""What a recipe leaves out, derived from `depth`."""

from typing import Any, TypeVar

from unmask.recipe.schema import Recipe, Section

T = TypeVar("T")


def given(value: T | None) -> T:
    """A value that `resolve` has filled in."""
    assert value is not None, "a recipe is resolved before anything is built from it"
    return value


def width_of(depth: int) -> int:
    """The one dial: width 64·round(2·depth/3), so that depth 6 is 256 wide and depth 12 is 512 wide."""
    return 64 * max(1, round(2 * depth / 3))


def pretraining_rates(depth: int) -> dict[str, float]:
    """AdamW's rate falls as 1/width from what was found at 256; Muon's update has a size of its own: its rate stays."""
    return {"lr": 6e-3 * 256 / width_of(depth), "matrix_lr": 0.01}


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what was left out, from depth alone.

    Tokens: pretraining gets 20 a parameter (Hoffmann et al., arXiv 2203.15556), counted as 12·depth·width² of the
    layers plus the embedding; SFT a quarter of it, reward and RL a fifth. Rates: see `pretraining_rates`; those of the
    other stages fall as 1/width too.
    """
    width = width_of(recipe.depth)
    parameters = 12 * recipe.depth * width**2 + recipe.tokenizer.vocabulary * width
    narrow = 256 / width
    base_tokens = recipe.pretrain.tokens or 20 * parameters

    def fill(section: Section, **defaults: float) -> Any:
        missing = {key: value for key, value in defaults.items() if getattr(section, key) is None}
        return section.model_copy(update=missing)

    return recipe.model_copy(
        update={
            "pretrain": fill(recipe.pretrain, tokens=base_tokens, **pretraining_rates(recipe.depth)),
            "sft": fill(recipe.sft, tokens=base_tokens // 4, lr=1e-3 * narrow, matrix_lr=0.0),
            "reward": fill(recipe.reward, tokens=base_tokens // 5, lr=3e-4 * narrow, matrix_lr=0.0),
            "rl": fill(recipe.rl, tokens=base_tokens // 5, lr=3e-5 * narrow, critic_lr=1e-4 * narrow),
        }
    )
