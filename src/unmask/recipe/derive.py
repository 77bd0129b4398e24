"""What a recipe leaves out, derived from `depth`."""

import math
from typing import Any, TypeVar

from unmask.errors import UserError
from unmask.recipe.schema import Recipe, Section

T = TypeVar("T")


def given(value: T | None) -> T:
    """A value that `resolve` has filled in."""
    assert value is not None, "a recipe is resolved before anything is built from it"
    return value


def width_of(depth: int) -> int:
    """The one dial: width 64·round(2·depth/3), so that depth 6 is 256 wide and depth 12 is 512 wide."""
    return 64 * max(1, round(2 * depth / 3))


def pretraining_batch(tokens: int) -> int:
    """Tokens of a batch, a power of two: as the square root of all tokens, 4,096 of 4 million."""
    return int(2 ** round(math.log2(4096 * math.sqrt(tokens / 4e6))))


def pretraining_rates(depth: int, batch_tokens: int = 4096) -> dict[str, float]:
    """AdamW's rate falls as 1/width from what was found at 256; Muon's update has a size of its own: its rate stays.

    Both grow as the square root of the batch.
    """
    by_batch = math.sqrt(batch_tokens / 4096)
    return {"lr": 6e-3 * 256 / width_of(depth) * by_batch, "matrix_lr": 0.01 * by_batch}


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what was left out, from depth alone.

    Tokens: pretraining gets 20 a parameter (Hoffmann et al., arXiv 2203.15556), counted as 12·depth·width² of the
    layers plus the embedding; SFT a quarter of it, reward and RL a fifth. Batch and rates of pretraining: see above, by
    figures in docs/benchmarks.md. Those of the other stages: 4,096 tokens, and 1/width.

    Raises UserError where pretraining would have no step.
    """
    width = width_of(recipe.depth)
    parameters = 12 * recipe.depth * width**2 + recipe.tokenizer.vocabulary * width
    narrow = 256 / width
    base_tokens = recipe.pretrain.tokens or 20 * parameters
    base_batch = recipe.pretrain.batch_tokens or max(recipe.context, pretraining_batch(base_tokens))
    if not recipe.context <= base_batch <= base_tokens:
        raise UserError(
            f"pretrain.batch_tokens is {base_batch}: a step needs a row of {recipe.context} tokens (`context`) "
            f"at least and pretrain.tokens ({base_tokens}) at most."
        )
    base = {"tokens": base_tokens, "batch_tokens": base_batch, **pretraining_rates(recipe.depth, base_batch)}
    later = {"batch_tokens": 4096, "matrix_lr": 0.0}

    def fill(section: Section, **defaults: float) -> Any:
        missing = {key: value for key, value in defaults.items() if getattr(section, key) is None}
        return section.model_copy(update=missing)

    return recipe.model_copy(
        update={
            "pretrain": fill(recipe.pretrain, **base),
            "sft": fill(recipe.sft, tokens=base_tokens // 4, lr=1e-3 * narrow, **later),
            "reward": fill(recipe.reward, tokens=base_tokens // 5, lr=3e-4 * narrow, **later),
            "rl": fill(recipe.rl, tokens=base_tokens // 5, lr=3e-5 * narrow, critic_lr=1e-4 * narrow),
        }
    )
