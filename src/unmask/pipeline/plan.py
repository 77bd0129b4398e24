"""How long a run will take, from steps that are timed on this machine before it starts."""

import math
import time
from typing import NamedTuple

import torch

from unmask.generation.engine import generate
from unmask.model import native
from unmask.model.compiled import compiles
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.pipeline.build import Builder
from unmask.pipeline.estimate import estimate, shape
from unmask.pipeline.jobs import optimizer_settings, ppo_settings, prompt_room
from unmask.pipeline.measure import KL_PROMPTS
from unmask.recipe import Recipe, RlSection, Training, given
from unmask.training import machine
from unmask.training.cost import parameters
from unmask.training.optimizer import Optimizer


class Plan(NamedTuple):
    """Expected seconds by stage, and of measuring (`measure`); or why there are none."""

    parameters: int
    seconds: dict[str, float]
    untimed: str | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def plan(builder: Builder) -> Plan:
    """Of what is still to be done."""
    whole = whole_plan(builder.recipe, builder.device, builder.ranks.size)
    wanted = builder.missing()
    if wanted or not (builder.directory / "summary.json").exists():
        wanted = [*wanted, "measure"]
    return whole._replace(
        seconds={name: seconds for name, seconds in whole.seconds.items() if name in wanted},
        untimed=whole.untimed if wanted else None,
    )


def whole_plan(recipe: Recipe, device: torch.device, processes: int = 1) -> Plan:
    """Times three training steps and a few generated tokens with random weights at the recipe's size: a few seconds,
    for a few million weights. Nothing is timed that the device has too little memory for.

    Of several processes this one speaks for all: they train as if each had its share to itself.
    """
    config, dtype = shape(recipe), machine.compute_dtype(device)
    weights, pre = parameters(config), recipe.pretrain
    needed = max(cost.bytes for cost in estimate(recipe, dtype, device.type == "cpu"))
    if needed > (there := machine.memory(device)):
        short = f"it takes {needed / 1e9:,.0f} GB in one process, of {there / 1e9:,.0f} that there are"
        return Plan(weights, {}, short)
    native.built()  # compiled now, and not while the first pass is timed
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    rows = max(1, min(pre.micro_tokens, given(pre.batch_tokens)) // recipe.context)
    batch = torch.randint(config.vocab_size, (rows, recipe.context + 1), device=device)
    with torch.inference_mode():
        for _ in range(2):  # the first one also allocates
            start = _now(device)
            model.hidden(batch[:, :-1])
            a_reading = (_now(device) - start) / (rows * recipe.context)  # in float32, as all is measured

    optimizer = Optimizer(model, optimizer_settings(pre), dtype)
    model.model.compiled, model.model.recompute = compiles(device), pre.recompute

    passed = stepped = math.inf
    for turn in range(3):  # the first one also allocates, and compiles
        start = _now(device)
        hidden = model.hidden(batch[:, :-1]).flatten(0, 1)
        torch.autograd.backward(
            cross_entropy_sum(hidden, model.head, batch[:, 1:].flatten()) / hidden.shape[0]
        )
        between = _now(device)
        optimizer.step(0.0)
        if turn > 0:
            passed, stepped = min(passed, between - start), min(stepped, _now(device) - between)
        optimizer.zero_grad()
    model.model.compiled = False

    def a_token(section: Training | RlSection) -> float:
        """Forward and backward. Recomputing is one more forward pass, to three that there are."""
        more = (4 / 3 if section.recompute else 1) / (4 / 3 if pre.recompute else 1)
        return passed / (rows * recipe.context) * more / processes

    def a_decode_step(rows: int) -> float:
        start = _now(device)
        generate(model, [[1] * 32] * rows, max_new_tokens=8, stop_ids=(), temperature=1.0, rows=rows)
        return (_now(device) - start) / 8

    rl, rules = recipe.rl, ppo_settings(recipe.rl)
    # Prompts and answers fill half of their room. A rollout is read once by policy, reference, critic and both judges
    # without gradients (a forward pass is a third of a training pass), then learned from by two networks in each epoch.
    read = rules.rollouts * rl.answers * (prompt_room(recipe) + rl.answer_tokens) / 2
    # Networks that learn, of which one waits while the critic warms up.
    learning = 2 - rules.critic_rollouts / rules.rollouts
    rewarded = given(recipe.reward.tokens) * a_token(recipe.reward)
    seconds = {
        "base": given(pre.tokens) * (a_token(pre) + stepped / given(pre.batch_tokens)),
        "sft": given(recipe.sft.tokens) * a_token(recipe.sft),
        "reward": rewarded,
        "gold": rewarded,
        "rl": rules.rollouts * rl.answer_tokens * a_decode_step(-(-rl.answers // processes))
        + read * a_token(rl) * (5 / 3 + learning * rl.epochs),
    }
    if not recipe.reward.gold:
        del seconds["gold"]
    seconds["measure"] = _measuring(recipe, a_reading, a_decode_step(rl.answers))
    return Plan(weights, seconds)


def _now(device: torch.device) -> float:
    """The clock, when all that was begun on the device is done."""
    machine.synchronize(device)
    return time.monotonic()


def _measuring(recipe: Recipe, a_reading: float, a_decode_step: float) -> float:
    """Planted facts are said nine times (by three layers as sentences, by two in three ways); prompts are answered
    twice to be judged and six times to be compared; held-out text and answers are read by three layers, and pairs of
    people's texts, which fill about half of the context, by two judges in two groups that share half of them."""
    amount, rows = recipe.measure, recipe.rl.answers
    facts = 4 * amount.facts_per_group if recipe.facts else 0
    answers = 2 * amount.prompts + 6 * min(amount.prompts, KL_PROMPTS)
    steps = (9 * facts * 16 + answers * amount.answer_tokens) / rows
    read = 3 * (amount.heldout_bytes * len(recipe.pretrain.sources) / 3 + answers * amount.answer_tokens)
    read += 6 * amount.pairs * recipe.context / 2
    return steps * a_decode_step + read * a_reading
