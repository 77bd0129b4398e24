"""Building the stages of a run: keep those that fit the recipe, resume the one under way, train the rest."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from unmask.errors import UserError
from unmask.files import write_atomic
from unmask.lineage import Checkpoint, write_checkpoint
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.progress import Progress
from unmask.recipe import Recipe, RewardSection, Training, difference
from unmask.stages import examples, ppo, pretrain, reward, rollouts, sft
from unmask.stages.prepare import Prepared, prepare
from unmask.text.chat import render
from unmask.training import loop, parallel
from unmask.training.loop import Objective, Outcome
from unmask.training.optimizer import Optimizer, OptimizerSettings

ORDER = ("base", "sft", "reward", "gold", "rl")  # gold: the second scorer, which no layer is trained on
SECTIONS = {"base": "pretrain", "sft": "sft", "reward": "reward", "gold": "reward", "rl": "rl"}
SHARED = ("seed", "depth", "context", "heldout", "tokenizer", "facts")
MOST_PAIRS = 6_000
CENTRED_ON = 500  # pairs whose mean score becomes the reward's zero


@dataclass(frozen=True)
class Built:
    """The finished stages of a run."""

    base: Checkpoint
    sft: Checkpoint
    reward: Checkpoint
    gold: Checkpoint | None
    rl: Checkpoint

    @property
    def all(self) -> list[Checkpoint]:
        return [
            stage for stage in (self.base, self.sft, self.reward, self.gold, self.rl) if stage is not None
        ]


class Job(NamedTuple):
    """A stage ready to train. `finish` turns the trained module into what is saved and its own metrics."""

    model: nn.Module
    objective: Objective
    optimizer: Optimizer
    settings: loop.Settings
    data: dict[str, str]
    finish: Callable[[Outcome], tuple[Decoder | Scorer, dict[str, Any]]]


class Builder:
    """The stages of one run directory."""

    def __init__(self, recipe: Recipe, directory: Path, device: torch.device, progress: Progress) -> None:
        self.recipe, self.directory, self.device, self.progress = recipe, directory, device, progress
        self.dtype = parallel.compute_dtype(device)

    def prepare(self) -> Prepared:
        return prepare(self.recipe, self.directory / "data", self.progress)

    def build(self, prepared: Prepared) -> Built:
        base = self._stage("base", "pretrain", None, lambda: self._pretrain(prepared), prepared)
        mask = self._stage("sft", "sft", base, lambda: self._sft(prepared, base), prepared)
        judge = self._stage("reward", "reward", mask, lambda: self._reward(prepared, mask, "proxy"), prepared)
        gold = None
        if self.recipe.reward.gold:
            gold = self._stage("gold", "reward", mask, lambda: self._reward(prepared, mask, "gold"), prepared)
        nudge = self._stage(
            "rl", "ppo", mask, lambda: self._rl(prepared, mask, judge), prepared, inputs={"reward": judge}
        )
        return Built(base, mask, judge, gold, nudge)

    # What is there ----------------------------------------------------------------------------------------------

    def missing(self) -> list[str]:
        """Stages that have still to be trained, in their order."""
        wanted = [name for name in ORDER if name != "gold" or self.recipe.reward.gold]
        return [name for name in wanted if not (self.directory / name).exists()]

    def refuse_another_recipe(self) -> None:
        """Raises UserError if a stage that is finished or under way was begun with another recipe; names the key."""
        for name in ORDER:
            if (found := self._begun(name)) is not None and (key := difference(found, self._decides(name))):
                raise UserError(
                    f"{self.directory / name} was made with another recipe: {key}. Run with the old value, "
                    f"give --output another directory, or or build anew with"
                    f" --from {_stage_of(name)} (nothing is deleted)."
                )

    def set_aside(self, first: str) -> None:
        """Move this stage and all later ones, with their work, to set-aside/N; nothing is deleted."""
        later = ORDER[ORDER.index(first) :]
        found = [
            path
            for name in later
            for path in (self.directory / name, self.directory / "work" / name)
            if path.exists()
        ]
        if not found:
            return
        aside = self.directory / "set-aside"
        number = 1 + max((int(path.name) for path in aside.glob("*") if path.name.isdigit()), default=0)
        for path in found:
            target = aside / str(number) / path.relative_to(self.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        self.progress.line(f"set aside in {aside / str(number)}: {', '.join(str(path) for path in found)}")

    def _begun(self, name: str) -> Mapping[str, Any] | None:
        """The recipe that a stage was finished or begun with."""
        if (self.directory / name).exists():
            record = Checkpoint.open(self.directory / name).record
            return record.recipe if record else {}
        work = self.directory / "work" / name / "recipe.json"
        if work.exists():
            begun: dict[str, Any] = json.loads(work.read_text("utf-8"))
            return begun
        return None

    def _decides(self, name: str) -> dict[str, Any]:
        """The part of the recipe that decides this stage, beyond its parents."""
        plain = self.recipe.model_dump(mode="json")
        section = dict(plain[SECTIONS[name]])
        section.pop("snapshot_seconds", None)  # decides when is saved, not what
        return {**{key: plain[key] for key in SHARED}, SECTIONS[name]: section}

    # One stage --------------------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        kind: str,
        parent: Checkpoint | None,
        job: Callable[[], Job],
        prepared: Prepared,
        inputs: Mapping[str, Checkpoint] | None = None,
    ) -> Checkpoint:
        path, work = self.directory / name, self.directory / "work" / name
        if path.exists():
            return self._kept(path, parent, inputs or {})
        stage = job()
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(work / "recipe.json", json.dumps(self._decides(name)))
        outcome = loop.train(
            stage.model,
            stage.objective,
            stage.optimizer,
            stage.settings,
            work,
            self.progress,
            f"{name:<7}{kind:<9}",
        )
        model, metrics = stage.finish(outcome)
        return write_checkpoint(
            path,
            model=model.float(),
            tokenizer=prepared.tokenizer,
            name=name,
            kind=kind,
            parent=parent,
            inputs=inputs,
            data=stage.data,
            recipe=self._decides(name),
            seed=self.recipe.seed,
            steps=outcome.steps,
            tokens=outcome.tokens,
            flops=training_flops(model, outcome.tokens, self.recipe.context),
            seconds=outcome.seconds,
            peak_bytes=outcome.peak_bytes,
            metrics=metrics | {"skipped_steps": outcome.skipped_steps},
        )

    def _kept(self, path: Path, parent: Checkpoint | None, inputs: Mapping[str, Checkpoint]) -> Checkpoint:
        """The finished stage in `path`, if it is whole and comes from these parents."""
        checkpoint = Checkpoint.open(path)
        if problems := checkpoint.problems():
            raise UserError(problems[0])
        record = checkpoint.record
        if record is None:
            raise UserError(
                f"{path} has no unmask.json: this run did not make it. Move it away and run again."
            )
        wanted = {role: other.hash for role, other in ({"parent": parent} | dict(inputs)).items() if other}
        found = {role: reference.hash for role, reference in record.inputs.items()}
        if record.parent:
            found["parent"] = record.parent.hash
        if key := difference(found, wanted):
            raise UserError(
                f"{path} was made from another checkpoint: {key}. Build anew with --from {_stage_of(path.name)}."
            )
        self.progress.line(
            f"{path.name:<7}{record.kind:<9}kept, {record.tokens:,} tokens in {record.seconds:.0f} s"
        )
        return checkpoint

    def _settings(self, section: Training, objective: Objective) -> loop.Settings:
        total = objective.steps * objective.tokens_per_step
        return loop.Settings(
            warmup_tokens=section.warmup * total,
            decay_tokens=section.decay * total,
            lr_floor=section.lr_floor,
            clip=section.clip,
            snapshot_seconds=section.snapshot_seconds,
            seed=self.recipe.seed,
        )

    def _decoder(self, checkpoint: Checkpoint) -> Decoder:
        model = checkpoint.model(torch.float32, str(self.device))
        assert isinstance(model, Decoder), f"{checkpoint.path} is no language model"
        return model

    # The four kinds ---------------------------------------------------------------------------------------------

    def _pretrain(self, prepared: Prepared) -> Job:
        recipe, section = self.recipe, self.recipe.pretrain
        sources = prepared.pretrain_sources(recipe)
        tokenizer = prepared.tokenizer
        config = replace(
            ModelConfig.from_depth(recipe.depth, vocabulary=tokenizer.rows, context=recipe.context),
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.stop_ids,
            pad_token_id=tokenizer.pad,
        )
        assert section.tokens is not None
        model, objective, optimizer = pretrain.stage(
            config,
            sources,
            length=recipe.context,
            tokens=section.tokens,
            batch_tokens=section.batch_tokens,
            micro_tokens=section.micro_tokens,
            end_of_text=tokenizer.end_of_text,
            settings=optimizer_settings(section),
            dtype=self.dtype,
            device=self.device,
            seed=recipe.seed,
        )
        data = {source.name: source.shards.fingerprint for source in sources}
        return Job(
            model, objective, optimizer, self._settings(section, objective), data,
            lambda outcome: (model, {"loss": outcome.metrics["loss"]["mean"]}),
        )  # fmt: skip

    def _sft(self, prepared: Prepared, parent: Checkpoint) -> Job:
        recipe, section = self.recipe, self.recipe.sft
        assert section.tokens is not None
        sources = []
        for source in section.sources:
            rendered = [
                render(prepared.tokenizer, chat) for chat in examples.chats(source, recipe, prepared.facts)
            ]
            if not rendered:
                raise UserError(f"source {source.path!r} of [sft] has no conversation to learn from.")
            sources.append(sft.Source(source.name, rendered, source.share))
        model, objective, optimizer = sft.stage(
            self._decoder(parent),
            sources,
            length=recipe.context,
            tokens=section.tokens,
            batch_tokens=section.batch_tokens,
            micro_tokens=section.micro_tokens,
            pad=prepared.tokenizer.pad,
            settings=optimizer_settings(section),
            dtype=self.dtype,
            seed=recipe.seed,
        )
        self._say_dropped("sft", objective.dropped)
        return Job(
            model, objective, optimizer, self._settings(section, objective), {"chats": objective.fingerprint},
            lambda outcome: (model, {"loss": outcome.metrics["loss"]["mean"]}),
        )  # fmt: skip

    def _reward(self, prepared: Prepared, parent: Checkpoint, half: examples.Half) -> Job:
        recipe, section = self.recipe, self.recipe.reward
        assert section.tokens is not None
        # The gold scorer always learns from sides of equal length, so that length alone cannot please it.
        equal_length = _equal_length(section) if half == "gold" else section.equal_length
        found = examples.preferences(recipe, half, limit=MOST_PAIRS, equal_length=equal_length)
        pairs, too_long = reward.tokenize(
            (comparison.pair for comparison in found.comparisons), prepared.tokenizer, recipe.context
        )
        self._say_dropped(half, found.dropped | {"pairs beyond the context": too_long})
        model, objective, optimizer = reward.stage(
            self._decoder(parent),
            pairs,
            tokens=section.tokens,
            batch_tokens=section.batch_tokens,
            micro_tokens=section.micro_tokens,
            settings=optimizer_settings(section),
            dtype=self.dtype,
            seed=recipe.seed,
        )

        def finish(outcome: Outcome) -> tuple[Scorer, dict[str, Any]]:
            texts = [side for pair in pairs[:CENTRED_ON] for side in pair]
            reward.centre(model, texts)
            last = outcome.metrics
            return model, {
                "accuracy": last["accuracy"]["mean"],
                "loss": last["loss"]["mean"],
                "pairs": len(pairs),
            }

        settings = self._settings(section, objective)
        return Job(model, objective, optimizer, settings, {"pairs": objective.fingerprint}, finish)

    def _rl(self, prepared: Prepared, parent: Checkpoint, judge: Checkpoint) -> Job:
        recipe, section = self.recipe, self.recipe.rl
        assert section.tokens is not None
        assert section.lr is not None
        assert section.critic_lr is not None
        tokenizer, room = (
            prepared.tokenizer,
            min(section.prompt_tokens, recipe.context - section.answer_tokens),
        )
        sources = []
        for source in section.sources:
            rendered = [
                render(tokenizer, chat, open_turn=True).ids
                for chat in examples.prompts(source, recipe, prepared.facts)
            ]
            fitting, dropped = rollouts.fitting(rendered, room)
            self._say_dropped("rl", {f"prompts of {source.name} beyond {room} tokens": dropped})
            sources.append(rollouts.Source(source.name, fitting, source.share))
        settings = ppo.PPOSettings(
            rollouts=max(1, section.tokens // (section.answers * section.answer_tokens)),
            **section.model_dump(
                include={
                    "answers", "answer_tokens", "epochs", "minibatches", "micro_tokens", "kl", "gamma", "gae_lambda",
                    "ratio_clip", "value_clip", "value_weight", "ptx", "truncated_score",
                }
            ),
        )  # fmt: skip
        scorer = judge.model(torch.float32, str(self.device))
        assert isinstance(scorer, Scorer)
        text = ppo.RawText(
            prepared.pretrain_sources(recipe),
            max(1, recipe.pretrain.batch_tokens // recipe.context),
            recipe.context,
            tokenizer.end_of_text,
        )
        model, objective, optimizer = ppo.stage(
            self._decoder(parent),
            scorer,
            sources,
            settings,
            stop_ids=tokenizer.stop_ids,
            lr=section.lr,
            critic_lr=section.critic_lr,
            dtype=self.dtype,
            seed=recipe.seed,
            text=text if section.ptx > 0 else None,
            say=self.progress.line,
        )
        total = objective.steps * objective.tokens_per_step
        rules = loop.Settings(
            warmup_tokens=section.warmup * total,
            decay_tokens=section.decay * total,
            clip=section.clip,
            snapshot_seconds=section.snapshot_seconds,
            seed=recipe.seed,
        )

        def finish(outcome: Outcome) -> tuple[Decoder, dict[str, Any]]:
            kept = ("reward", "kl_child_parent", "stop_rate", "answer_tokens", "explained_variance")
            return model.policy, {name: outcome.metrics[name]["mean"] for name in kept}

        return Job(model, objective, optimizer, rules, {"prompts": objective.fingerprint}, finish)

    def _say_dropped(self, stage: str, dropped: Mapping[str, int]) -> None:
        for what, count in dropped.items():
            if count:
                self.progress.line(f"{stage:<7}left out: {count:,} {what}")


def optimizer_settings(section: Training) -> OptimizerSettings:
    assert section.lr is not None
    return OptimizerSettings(
        lr=section.lr, matrix_lr=section.matrix_lr or None, weight_decay=section.weight_decay
    )


def training_flops(model: nn.Module, tokens: int, length: int) -> float:
    """6 for each weight a token is multiplied with (head in, embedding out), plus 6·L·d·T of causal attention."""
    config = model.config
    assert isinstance(config, ModelConfig)
    matrices = sum(
        p.numel() for p in model.parameters() if p.ndim == 2
    )  # a tied embedding is multiplied once, as head
    if config.is_scorer or not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6.0 * tokens * (matrices + attention)


def _equal_length(section: RewardSection) -> float:
    return 0.1 if section.equal_length is None else section.equal_length


def _stage_of(name: str) -> str:
    """What --from takes for a stage: the gold scorer is built with the reward model."""
    return "reward" if name == "gold" else name
