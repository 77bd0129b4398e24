"""What the layers of a recipe will cost, before anything is trained: FLOPs and memory from its sizes, time and money
from rates."""

import tomllib
from importlib import resources
from typing import NamedTuple

import torch

from unmask.errors import UserError, nearest
from unmask.model.config import ModelConfig
from unmask.pipeline.jobs import micro_tokens_of, minibatch_tokens, ppo_settings, prompt_room
from unmask.recipe import Recipe, Training, given
from unmask.training.cost import flops_per_token, parameters, training_bytes


class Accelerator(NamedTuple):
    """Dense bfloat16 FLOP/s, bytes of memory, and what an hour was asked for, from … to …, in dollars; by `source`."""

    key: str
    name: str
    flops_per_second: float
    memory: float
    source: str
    dollars: tuple[float, float] | None = None


class Cost(NamedTuple):
    """Of one stage. `networks`: how many of the model's size are trained."""

    stage: str
    tokens: int
    networks: int
    flops: float
    bytes: int


def accelerators() -> dict[str, Accelerator]:
    text = (resources.files("unmask") / "pipeline" / "accelerators.toml").read_text("utf-8")
    return {key: Accelerator(key, **fields) for key, fields in tomllib.loads(text).items()}


def accelerator(key: str) -> Accelerator:
    """Raises UserError for one that is not known."""
    known = accelerators()
    if key not in known:
        raise UserError(f"unknown accelerator {key!r}.{nearest(key, known)} There are: {', '.join(known)}")
    return known[key]


def shape(recipe: Recipe) -> ModelConfig:
    """The decoder of a recipe. Its vocabulary has room to the next multiple of 64, as the tokenizer's rows."""
    rows = -(-recipe.tokenizer.vocabulary // 64) * 64
    return ModelConfig.from_depth(recipe.depth, vocabulary=rows, context=recipe.context)


def estimate(recipe: Recipe, dtype: torch.dtype, cpu: bool = True, processes: int = 1) -> list[Cost]:
    """By stage of a resolved recipe, computed in `dtype`, on a CPU or not: FLOPs of all processes, memory of each.

    PPO's tokens are the most it can read: prompts and answers at their limits."""
    decoder = shape(recipe)
    scorer = decoder.scoring()
    rl, rules = recipe.rl, ppo_settings(recipe.rl)

    def trained(stage: str, config: ModelConfig, section: Training, whole: int = 0) -> Cost:
        """`whole`: tokens that no micro-batch divides."""
        tokens, batch_tokens = given(section.tokens), given(section.batch_tokens)
        micro_tokens = min(micro_tokens_of(section, batch_tokens, processes), batch_tokens)
        return Cost(
            stage,
            tokens,
            1,
            float(tokens * flops_per_token(config, recipe.context)),
            training_bytes(
                config,
                dtype,
                micro_tokens=max(whole, micro_tokens),
                length=recipe.context,
                muon=bool(section.matrix_lr),
                recompute=section.recompute,
                cpu=cpu,
                shards=processes if section.shard else 1,
                accumulates=batch_tokens > micro_tokens * processes,
            ),
        )

    read = rules.rollouts * rl.answers * (prompt_room(recipe) + rl.answer_tokens) * rl.epochs
    learned = [
        training_bytes(
            config,
            dtype,
            micro_tokens=micro_tokens_of(rl, minibatch_tokens(recipe), processes),
            length=recipe.context,
            muon=False,
            recompute=rl.recompute,
            cpu=cpu,
        )
        for config in (decoder, scorer)
    ]
    # Texts that are compared stay together, each as long as the longest.
    compared = recipe.reward.together if recipe.reward.source.path == "chitchat" else 2
    frozen = parameters(decoder) + (2 if recipe.reward.gold else 1) * parameters(scorer)
    costs = [
        trained("base", decoder, recipe.pretrain),
        trained("sft", decoder, recipe.sft),
        trained("reward", scorer, recipe.reward, whole=compared * recipe.context),
    ]
    if recipe.reward.gold:
        costs.append(costs[-1]._replace(stage="gold"))
    learning = 1 - rules.critic_rollouts / rules.rollouts  # the policy, after the critic's warm-up
    flops = read * (
        learning * flops_per_token(decoder, recipe.context) + flops_per_token(scorer, recipe.context)
    )
    return [*costs, Cost("rl", read, 2, float(flops), sum(learned) + frozen * dtype.itemsize)]
