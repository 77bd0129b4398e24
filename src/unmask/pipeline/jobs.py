"""What each kind of stage needs to be trained: its data as tokens, its model, objective and optimizer."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from unmask.lineage import Checkpoint
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.progress import Progress
from unmask.recipe import Recipe, RlSection, Training, given
from unmask.stages import examples, ppo, pretrain, reward, rollouts, sft
from unmask.stages.prepare import Prepared
from unmask.text.chat import Chat, render
from unmask.training import loop, machine
from unmask.training.loop import Objective, Outcome
from unmask.training.optimizer import Optimizer, OptimizerSettings
from unmask.training.parallel import ALONE, Ranks

CENTRED_ON = 256  # answers of the SFT model, whose mean score becomes the reward's zero


@dataclass(frozen=True)
class Place:
    """What every job needs: the recipe, what was made of its text, and where to compute."""

    recipe: Recipe
    prepared: Prepared
    device: torch.device
    progress: Progress
    ranks: Ranks = ALONE

    def micro_tokens(self, section: Training | RlSection, batch_tokens: int) -> int:
        return micro_tokens_of(section, batch_tokens, self.ranks.size)

    def shards(self, section: Training) -> bool:
        """Whether the stage's model is split over the ranks. Alone there is nothing to split."""
        return section.shard and self.ranks.size > 1

    @property
    def dtype(self) -> torch.dtype:
        return machine.compute_dtype(self.device)

    def decoder(self, checkpoint: Checkpoint) -> Decoder:
        model = checkpoint.model(torch.float32, str(self.device))
        assert isinstance(model, Decoder), f"{checkpoint.path} is no language model"
        return model

    def scorer(self, checkpoint: Checkpoint) -> Scorer:
        model = checkpoint.model(torch.float32, str(self.device))
        assert isinstance(model, Scorer), f"{checkpoint.path} does not score"
        return model

    def leave_out(self, stage: str, dropped: Mapping[str, int]) -> dict[str, int]:
        """Say what was left out; the counts go into the stage's record."""
        counted = {what: count for what, count in dropped.items() if count}
        for what, count in counted.items():
            self.progress.line(f"{stage:<7}left out: {count:,} {what}")
        return counted


def micro_tokens_of(section: Training | RlSection, batch_tokens: int, processes: int) -> int:
    """As the recipe says, or less with several processes, so that each has a part of every batch."""
    if processes == 1:
        return section.micro_tokens
    return max(1, min(section.micro_tokens, batch_tokens // processes))


def base_work(run: Path) -> Path:
    """Where a run's base is, or was, in training."""
    return run / "work" / "base"


def prompt_room(recipe: Recipe) -> int:
    """Tokens of RL's prompts, at most."""
    return min(recipe.rl.prompt_tokens, recipe.context - recipe.rl.answer_tokens)


def minibatch_tokens(recipe: Recipe) -> int:
    """Of prompts and answers at their longest."""
    rl = recipe.rl
    return rl.answers * (prompt_room(recipe) + rl.answer_tokens) // rl.minibatches


class Job(NamedTuple):
    """A stage ready to train. `finish` turns the trained module, whole again, into what is saved and what its record
    keeps."""

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    settings: loop.Settings
    data: dict[str, str]  # label -> fingerprint
    left_out: dict[str, int]
    finish: Callable[[Any, Outcome], tuple[Decoder | Scorer, dict[str, Any]]]
    shown: tuple[str, ...] = ()  # metrics beside the progress bar
    idle: tuple[nn.Module, int] | None = None  # a network that the first so many steps do not run


def pretraining(place: Place) -> Job:
    recipe, section, tokenizer = place.recipe, place.recipe.pretrain, place.prepared.tokenizer
    sources = place.prepared.pretrain_sources(recipe)
    config = replace(
        ModelConfig.from_depth(recipe.depth, vocabulary=tokenizer.rows, context=recipe.context),
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.stop_ids,
        pad_token_id=tokenizer.pad,
    )
    model, objective, optimizer = pretrain.stage(
        config,
        sources,
        length=recipe.context,
        tokens=given(section.tokens),
        batch_tokens=given(section.batch_tokens),
        micro_tokens=place.micro_tokens(section, given(section.batch_tokens)),
        end_of_text=tokenizer.end_of_text,
        cross_documents=section.cross_documents,
        settings=optimizer_settings(section),
        dtype=place.dtype,
        device=place.device,
        seed=recipe.seed,
        shard=place.shards(section),
    )
    data = {source.name: source.shards.fingerprint for source in sources}

    def finish(model: Decoder, outcome: Outcome) -> tuple[Decoder, dict[str, Any]]:
        pretrain.give_meaning(model, [tokenizer.turn_start, tokenizer.turn_end], tokenizer.end_of_text)
        return model, means(outcome, "loss")

    settings = replace(
        loop_settings(section, objective, recipe.seed),
        keep_stable=True,
        branch=base_work(Path(section.branch)) if section.branch else None,
    )
    return Job(model, objective, optimizer, settings, data, {}, finish)


def imitation(place: Place, parent: Checkpoint) -> Job:
    recipe, section, tokenizer = place.recipe, place.recipe.sft, place.prepared.tokenizer
    facts = place.prepared.facts
    sources = [
        sft.Source(source.name, examples.rendered(source, recipe, facts, tokenizer), source.share)
        for source in section.sources
    ]
    model, objective, optimizer = sft.stage(
        place.decoder(parent),
        sources,
        length=recipe.context,
        tokens=given(section.tokens),
        batch_tokens=given(section.batch_tokens),
        micro_tokens=place.micro_tokens(section, given(section.batch_tokens)),
        pad=tokenizer.pad,
        settings=optimizer_settings(section),
        dtype=place.dtype,
        seed=recipe.seed,
        shard=place.shards(section),
    )
    left_out = place.leave_out("sft", objective.dropped)
    settings = loop_settings(section, objective, recipe.seed)

    def finish(model: Decoder, outcome: Outcome) -> tuple[Decoder, dict[str, Any]]:
        return model, means(outcome, "loss")

    return Job(model, objective, optimizer, settings, objective.data, left_out, finish)


def preference(place: Place, parent: Checkpoint, half: examples.Half) -> Job:
    recipe, section = place.recipe, place.recipe.reward
    found, dropped = examples.rankings(recipe, half)
    rankings, too_long = reward.tokenize(found, place.prepared.tokenizer, recipe.context)
    left_out = place.leave_out(
        half, dropped | {"texts beyond the context, or with none left to compare": too_long}
    )
    model, objective, optimizer = reward.stage(
        place.decoder(parent),
        rankings,
        tokens=given(section.tokens),
        batch_tokens=given(section.batch_tokens),
        micro_tokens=place.micro_tokens(section, given(section.batch_tokens)),
        settings=optimizer_settings(section),
        dtype=place.dtype,
        seed=recipe.seed,
        shard=place.shards(section),
    )

    def finish(model: Scorer, outcome: Outcome) -> tuple[Scorer, dict[str, Any]]:
        texts = [text for ranking in rankings for text in ranking.texts]
        asked = [chat[:-1] for ranking in found for chat in ranking.chats if len(chat) > 1]
        answers = _answers(place, parent, asked)
        if not answers:
            why = (
                f"no answer of {parent.name} stops by itself"
                if asked
                else "nothing is asked before the texts"
            )
            place.progress.line(f"{half:<7}{why}: the score's zero is the mean of people's texts")
        reward.centre(model, answers or texts[:CENTRED_ON])
        counted = {
            "texts": len(texts),
            "pairs": sum(len(ranking.better) for ranking in rankings),
            "centred_on_answers": len(answers),
        }
        return model, means(outcome, "accuracy", "loss") | counted

    settings = loop_settings(section, objective, recipe.seed)
    return Job(
        model,
        objective,
        optimizer,
        settings,
        {section.source.name: objective.fingerprint},
        left_out,
        finish,
        ("accuracy",),
    )


def _answers(place: Place, parent: Checkpoint, asked: Sequence[Chat]) -> list[list[int]]:
    """Some of these conversations with the parent's answer, if it stops by itself."""
    recipe, tokenizer = place.recipe, place.prepared.tokenizer
    answer_tokens = recipe.context // 4
    drawn = random.Random(f"centre:{recipe.seed}").sample(asked, min(CENTRED_ON, len(asked)))
    prompts, _ = rollouts.fitting(
        [render(tokenizer, chat, open_turn=True).ids for chat in drawn], recipe.context - answer_tokens
    )
    said = rollouts.answered(
        place.decoder(parent),
        prompts,
        answer_tokens=answer_tokens,
        stop_ids=[tokenizer.turn_end],
        seed=recipe.seed,
    )
    return [
        [*prompt, *answer.ids]
        for prompt, answer in zip(said.prompts, said.answers, strict=True)
        if answer.finished
    ]


def reinforcement(place: Place, parent: Checkpoint, judge: Checkpoint, gold: Checkpoint | None) -> Job:
    recipe, section, tokenizer = place.recipe, place.recipe.rl, place.prepared.tokenizer
    room = prompt_room(recipe)
    sources: list[rollouts.Source] = []
    left_out: dict[str, int] = {}
    for source in section.sources:
        chats = examples.prompts(source, recipe, place.prepared.facts)
        fitting, dropped = rollouts.fitting(
            [render(tokenizer, chat, open_turn=True).ids for chat in chats], room
        )
        left_out |= place.leave_out("rl", {f"prompts of {source.name} beyond {room} tokens": dropped})
        sources.append(rollouts.Source(source.name, fitting, source.share))
    text = None
    if section.ptx:  # else its shards need not be looked at
        text = ppo.RawText(
            place.prepared.pretrain_sources(recipe),
            max(1, given(recipe.pretrain.batch_tokens) // recipe.context),
            recipe.context,
            tokenizer.end_of_text,
            recipe.pretrain.cross_documents,
        )
    model, objective, optimizer = ppo.stage(
        place.decoder(parent),
        place.scorer(judge),
        sources,
        replace(
            ppo_settings(section),
            micro_tokens=place.micro_tokens(section, minibatch_tokens(recipe)),
        ),
        stop_ids=[tokenizer.turn_end],  # the only end that the reward model has seen
        lr=given(section.lr),
        critic_lr=given(section.critic_lr),
        dtype=place.dtype,
        seed=recipe.seed,
        text=text if section.ptx > 0 else None,
        gold=place.scorer(gold) if gold else None,
        say=place.progress.line,
        ranks=place.ranks,
    )

    def finish(model: ppo.ActorCritic, outcome: Outcome) -> tuple[Decoder, dict[str, Any]]:
        # The first is the headline: a mean of the reward, over prompts that differ, says little by itself.
        kept = ("kl_child_parent", "reward", "stop_rate", "answer_tokens", "explained_variance")
        return model.policy, means(outcome, *kept) | {"score_spread": objective.spread}

    settings = loop_settings(section, objective, recipe.seed)
    shown = ("reward", "kl_child_parent", "stop_rate")
    idle = model.policy, objective.settings.critic_rollouts * objective.pause_every
    return Job(model, objective, optimizer, settings, objective.prompts.data, left_out, finish, shown, idle)


def means(outcome: Outcome, *names: str) -> dict[str, Any]:
    """Each metric's mean over the last tenth of the steps. What had no finite value there is left out, as the reward is
    where every answer was cut."""
    return {name: outcome.metrics[name]["mean"] for name in names if name in outcome.metrics}


def loop_settings(section: Training | RlSection, objective: Objective, seed: int) -> loop.Settings:
    total = objective.steps * objective.tokens_per_step
    return loop.Settings(
        warmup_tokens=section.warmup * total,
        decay_tokens=section.decay * total,
        lr_floor=section.lr_floor,
        clip=section.clip,
        snapshot_seconds=section.snapshot_seconds,
        seed=seed,
    )


def optimizer_settings(section: Training) -> OptimizerSettings:
    return OptimizerSettings(
        lr=given(section.lr), matrix_lr=section.matrix_lr or None, weight_decay=section.weight_decay
    )


def ppo_settings(section: RlSection) -> ppo.PPOSettings:
    rollouts = max(1, given(section.tokens) // (section.answers * section.answer_tokens))
    return ppo.PPOSettings(
        rollouts=rollouts,
        answers=section.answers,
        answer_tokens=section.answer_tokens,
        critic_rollouts=min(math.ceil(section.critic_warmup * rollouts), rollouts - 1),
        epochs=section.epochs,
        minibatches=section.minibatches,
        micro_tokens=section.micro_tokens,
        kl=section.kl,
        gamma=section.gamma,
        gae_lambda=section.gae_lambda,
        ratio_clip=section.ratio_clip,
        value_clip=section.value_clip,
        value_weight=section.value_weight,
        ptx=section.ptx,
        truncation_penalty=section.truncation_penalty,
    )
