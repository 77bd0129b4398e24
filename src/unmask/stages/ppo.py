"""PPO as InstructGPT used it: a policy started from SFT learns from its own answers by a reward model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unmask import delta
from unmask.errors import UserError
from unmask.files import hash_json
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.stages import objectives, pretrain
from unmask.stages.batches import Drawn, by_length
from unmask.stages.experience import Experience, experience
from unmask.stages.rollouts import (
    Actions,
    Prompts,
    Reward,
    RewardModel,
    Rollout,
    Source,
    actions,
    answered,
    check,
    judged,
    log_probs,
    score_spread,
)
from unmask.text import order
from unmask.training.optimizer import Optimizer, OptimizerSettings
from unmask.training.parallel import ALONE, Ranks

ADAM_EPS = (
    1e-5  # Huang et al. (arXiv 2403.17031): what InstructGPT's ancestors used, and stabler here than 1e-8
)
SAMPLER_GAP = 0.05  # nats a token in the mean: rounding to bfloat16 gives 0.006 to 0.008 in `tiny`


@dataclass(frozen=True)
class PPOSettings:
    """How answers are collected and learned from. A rollout is learned from in epochs × minibatches steps."""

    rollouts: int
    answers: int  # a rollout
    answer_tokens: int  # at most
    critic_rollouts: int = 0  # the first ones: only the critic learns from them
    epochs: int = 1
    minibatches: int = 1
    micro_tokens: int = 8192  # of a forward pass, padding included
    rows: int = 64  # answers that are generated side by side
    kl: float = 0.75  # reward lost for each nat of kl_child_parent, in standard deviations: see PPO
    gamma: float = 1.0
    gae_lambda: float = 0.95
    ratio_clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.5
    ptx: float = 0.0  # weight of the pretraining loss
    truncation_penalty: float = 2.0  # reward lost by an answer that is cut, in the same unit as `kl`


class ActorCritic(nn.Module):
    """The two networks that PPO trains; only the policy becomes a checkpoint."""

    def __init__(self, policy: Decoder, critic: Scorer) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic


class Batch(NamedTuple):
    """A micro-batch of an experience; `numbers` stand in the first one of each step only."""

    actions: Actions
    log_probs_N: Tensor
    values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor
    numbers: dict[str, float]
    policy_learns: bool


class PPO:
    """The PPO objective of the training loop.

    Each rollout: prompts → answers at temperature 1 → the reward model's score, less its offset, at the
    last action, less β·k1 to the SFT model at each action → generalised advantages, whitened over the
    rollout → epochs × minibatches steps on clipped policy and value losses, both divided by the actions of
    the whole step, plus the loss on raw text where `ptx` is given (PPO-ptx).

    β is `kl` times `spread`, the standard deviation of the score between the SFT model's answers to one
    prompt (`score_spread`), so that `kl` means the same whatever the reward model's margins are, and however
    much of its score is the prompt's, which no answer can change.

    An answer that was cut at the limit is scored `truncation_penalty` times `spread` below what the critic
    expected of its prompt. A fixed score would be far below every other answer to one prompt and above every
    answer to another; then not to be cut, or to be, is most of what PPO learns.

    In the first `critic_rollouts` the policy stands still. The critic knows what a whole answer is worth, not
    what a prompt promises; until it does, an advantage is mostly the prompt's own score, which pushes every
    answer to it up or down whatever it says, and what SFT taught about such prompts is lost by chance.

    Ouyang et al. (arXiv 2203.02155), section 3.5 and appendix C.4. Deviations: rewards are not whitened;
    policy and critic share one clipped gradient norm; the critic's values are less the reward model's
    offset, as the rewards are; an answer that reaches the limit gets a penalised score (Huang et al., arXiv
    2403.17031, give a fixed one) and nothing is bootstrapped after it.

    The log-probabilities that ratios start from are computed here, with the code, dtype and padding of the
    first epoch's micro-batches, so that the first step has ratio 1 exactly; how far the sampler's own lie
    from them is logged. A rollout is a pure function of weights, index and seed, and snapshots fall between
    rollouts (`pause_every`): a resumed run collects the very same ones, and none is ever stored.

    Of several ranks each answers, judges and reads its share, and all learn from the same rollout. A rank reads in
    `collect` the very micro-batches that it learns from in the first epoch.
    """

    def __init__(
        self,
        model: ActorCritic,
        reference: Decoder,
        reward: Reward,
        prompts: Prompts,
        settings: PPOSettings,
        *,
        stop_ids: Sequence[int],
        seed: int,
        spread: float = 1.0,
        text: pretrain.Pretraining | None = None,
        gold: Reward | None = None,
        say: Callable[[str], None] = print,
        ranks: Ranks = ALONE,
    ) -> None:
        if settings.minibatches > settings.answers:
            raise UserError(
                f"rl.minibatches is {settings.minibatches}, for only {settings.answers} rl.answers."
            )
        self.model, self.reference, self.reward, self.prompts = model, reference, reward, prompts
        self.settings, self.stop_ids, self.seed, self.spread = settings, stop_ids, seed, spread
        self.text, self.gold, self.say, self.ranks = text, gold, say, ranks
        self.pause_every = settings.epochs * settings.minibatches
        self.steps = settings.rollouts * self.pause_every
        read = settings.answers * (prompts.mean_length + settings.answer_tokens) / settings.minibatches
        self.tokens_per_step = round(read) + (text.tokens_per_step if text else 0)
        self.fingerprint = hash_json(
            {
                "prompts": prompts.fingerprint,
                "text": text.fingerprint if text else None,
                "settings": {key: value for key, value in asdict(settings).items() if key != "micro_tokens"},
                "reward_offset": model.critic.config.reward_offset,
                "stop_ids": list(stop_ids),
                "seed": seed,
            }
        )
        self._experience: tuple[int, Experience] | None = None  # with its rollout's index
        self._troubles: dict[str, str] = {}

    def micro_batches(self, step: int) -> list[Batch | list[Drawn]]:
        """The step's part of its rollout (which is collected where one begins), then rows of raw text."""
        index, inner = divmod(step, self.pause_every)
        if inner == 0:
            self._experience = None  # let go of the last one before the next is made
            self._experience = index, self.collect(index)
        assert self._experience is not None, f"step {step} comes without its rollout"
        collected, learned_from = self._experience
        assert collected == index, f"step {step} comes with rollout {collected}"
        epoch, part = divmod(inner, self.settings.minibatches)
        batches: list[Batch | list[Drawn]] = []
        for rows in self._parts(index, epoch, learned_from.rollout)[part]:
            mask = learned_from.mask_BA[rows]
            batches.append(
                Batch(
                    actions(learned_from.rollout, rows, mask.device),
                    learned_from.log_probs_BA[rows][mask],
                    learned_from.values_BA[rows][mask],
                    learned_from.advantages_BA[rows][mask],
                    learned_from.returns_BA[rows][mask],
                    {} if batches else learned_from.numbers,
                    self._policy_learns(index),
                )
            )
        if self.text is None or not self._policy_learns(index):
            return batches
        return [*batches, *self.text.micro_batches(step)]

    def counts(self, batch: Batch | list[Drawn]) -> dict[str, int]:
        if isinstance(batch, list):
            return {"text_tokens": self._text().tokens(batch)}
        return {"actions": len(batch.actions.taken_N)}

    def tokens(self, batch: Batch | list[Drawn]) -> int:
        return self._text().tokens(batch) if isinstance(batch, list) else batch.actions.tokens

    def loss(
        self, batch: Batch | list[Drawn], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Share of policy loss + value_weight · value loss, or of ptx · loss on raw text."""
        settings = self.settings
        if isinstance(batch, list):
            text_loss, _ = self._text().loss(batch, {"tokens": totals["text_tokens"]})
            loss = settings.ptx * text_loss
            return loss, {"text_loss": text_loss.detach()}
        n = totals["actions"]
        value_N = objectives.clipped_value_loss(
            self._values(batch.actions), batch.values_N, batch.returns_N, settings.value_clip
        )
        value_loss = value_N.sum() / n
        metrics: dict[str, Tensor | float] = {"value_loss": value_loss.detach(), **batch.numbers}
        if not batch.policy_learns:
            # Zero gradients and not none: Adam's averages then grow from zero, which makes the policy's first steps
            # short ones.
            nothing = sum(weight.sum() * 0 for weight in self.model.policy.parameters())
            return settings.value_weight * value_loss + nothing, metrics
        log_probs_N = log_probs(self.model.policy, batch.actions)
        policy_N = objectives.clipped_policy_loss(
            log_probs_N, batch.log_probs_N, batch.advantages_N, settings.ratio_clip
        )
        policy_loss = policy_N.sum() / n
        log_ratio_N = log_probs_N.detach() - batch.log_probs_N
        moved_N = (log_ratio_N.exp() - 1).abs()
        return policy_loss + settings.value_weight * value_loss, {
            "policy_loss": policy_loss.detach(),
            "ratio_distance": moved_N.sum() / n,
            "clip_fraction": (moved_N > settings.ratio_clip).sum() / n,
            "kl_old_new": delta.k3(-log_ratio_N).sum() / n,
            **metrics,
        }

    @torch.no_grad()
    def collect(self, index: int) -> Experience:
        """Answers of the policy as it is, rewards, advantages: a pure function of weights and index."""
        settings = self.settings
        rollout = answered(
            self.model.policy,
            self.prompts.draw(index, settings.answers),
            answer_tokens=settings.answer_tokens,
            stop_ids=self.stop_ids,
            seed=int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0]),
            rows=settings.rows,
            ranks=self.ranks,
        )
        given_B = judged(self.reward, rollout, self.ranks)
        troubles = check(rollout, given_B)

        device = self.model.policy.head.device
        lengths_B = torch.tensor([len(answer.ids) for answer in rollout.answers], device=device)
        mask_BA = torch.arange(int(lengths_B.max()), device=device) < lengths_B[:, None]
        blank_BA = torch.zeros_like(mask_BA, dtype=torch.float32)
        log_probs_BA, reference_BA, values_BA = blank_BA.clone(), blank_BA.clone(), blank_BA.clone()
        for rows in (rows for part in self._parts(index, 0, rollout) for rows in self.ranks.share(part)):
            acts, mask, blank = actions(rollout, rows, device), mask_BA[rows], blank_BA[rows]
            log_probs_BA[rows] = blank.masked_scatter(mask, log_probs(self.model.policy, acts))
            reference_BA[rows] = blank.masked_scatter(mask, log_probs(self.reference, acts))
            values_BA[rows] = blank.masked_scatter(mask, self._values(acts))
        self.ranks.add([log_probs_BA, reference_BA, values_BA])  # a row is one rank's, and 0 on the others

        found = experience(
            rollout,
            given_B.to(device),
            mask_BA,
            log_probs_BA,
            reference_BA,
            values_BA,
            beta=settings.kl * self.spread,
            penalty=settings.truncation_penalty * self.spread,
            gamma=settings.gamma,
            lam=settings.gae_lambda,
        )
        if (gap := found.numbers["sampler_gap_mean"]) > SAMPLER_GAP:
            troubles["sampler"] = (
                f"answers are drawn with log-probabilities that lie {gap:.2g} nats from those trained on, in the mean"
            )
        self._report(index, troubles)
        if self.gold is not None:
            found.numbers["gold"] = self._gold(self.gold, rollout)
        return found

    def _gold(self, judge: Reward, rollout: Rollout) -> float:
        """The second judge's score of an answer of half the longest length, on the line through this rollout's
        whole answers, so that length alone does not raise it. Never learned from. NaN without a whole answer."""
        whole_B = torch.tensor([answer.finished for answer in rollout.answers])
        lengths_B = torch.tensor([len(answer.ids) for answer in rollout.answers])
        scores_B = judged(judge, rollout, self.ranks)
        return objectives.at_length(scores_B[whole_B], lengths_B[whole_B], self.settings.answer_tokens / 2)

    def _parts(self, index: int, epoch: int, rollout: Rollout) -> list[list[list[int]]]:
        """Rows of each micro-batch of each minibatch: shuffled anew each epoch, similar lengths together."""
        shuffled = order.permutation(self.seed, index * self.settings.epochs + epoch, len(rollout.answers))
        parts = []
        for minibatch in np.array_split(shuffled, self.settings.minibatches):
            rows = [int(row) for row in minibatch]
            lengths = [len(rollout.prompts[row]) + len(rollout.answers[row].ids) for row in rows]
            most = self.settings.micro_tokens
            if self.ranks.size > 1:  # a group for each, if there are so many rows
                most = min(most, -(-sum(lengths) // self.ranks.size))
            parts.append([[rows[i] for i in group] for group in by_length(lengths, most)])
        return parts

    def _values(self, acts: Actions) -> Tensor:
        """V of the state before each action (N,) float32, less the reward model's offset, as rewards are."""
        values_N = self.model.critic.values(acts.ids_BT, acts.before_N)
        return values_N.float() - self.model.critic.config.reward_offset

    def _policy_learns(self, index: int) -> bool:
        return index >= self.settings.critic_rollouts

    def _text(self) -> pretrain.Pretraining:
        assert self.text is not None, "rows of raw text come from self.text alone"
        return self.text

    def _report(self, index: int, troubles: dict[str, str]) -> None:
        """Say what is wrong with the rollouts, once for as long as it stays so."""
        for kind in troubles.keys() - self._troubles.keys():
            self.say(f"rollout {index + 1} of {self.settings.rollouts}: {troubles[kind]}.")
        self._troubles = troubles


class RawText(NamedTuple):
    """What PPO-ptx reads besides: rows of raw text, so many a step."""

    sources: Sequence[pretrain.Source]
    rows: int
    length: int
    end_of_text: int
    cross_documents: bool


def stage(
    sft: Decoder,
    reward: Scorer,
    prompts: Sequence[Source],
    settings: PPOSettings,
    *,
    stop_ids: Sequence[int],
    lr: float,
    critic_lr: float,
    dtype: torch.dtype,
    seed: int,
    text: RawText | None = None,
    gold: Scorer | None = None,
    say: Callable[[str], None] = print,
    ranks: Ranks = ALONE,
) -> tuple[ActorCritic, PPO, Optimizer]:
    """Policy and critic with their objective and optimizer, ready for the loop.

    The policy starts as a copy of `sft`, the critic as a copy of `reward`; the two themselves, in `dtype`,
    become the reference and the judge. `gold` is a second judge whose opinion is logged and never learned from.
    Room for prompts is the context less the longest answer.
    """
    if lr <= 0:
        raise UserError("rl.lr must be above 0: the critic's rate is a multiple of it.")
    if settings.ptx > 0 and text is None:
        raise UserError("rl.ptx is above 0, but there is no raw text to read.")
    model = ActorCritic(copy.deepcopy(sft), copy.deepcopy(reward))
    for frozen in (sft, reward, *([gold] if gold else [])):
        frozen.requires_grad_(False).to(dtype)
    room = sft.config.max_position_embeddings - settings.answer_tokens
    asked = Prompts(prompts, room=room, seed=seed)
    judge = RewardModel(reward, settings.micro_tokens)
    spread = score_spread(
        sft,
        judge,
        asked.draw(0, 2 * settings.answers),
        answer_tokens=settings.answer_tokens,
        stop_ids=stop_ids,
        seed=seed,
        rows=settings.rows,
        ranks=ranks,
    )
    if not spread > 0:
        say("the reward model tells no two answers to one prompt apart; kl is taken in its log-odds")
        spread = 1.0
    optimizer = Optimizer(
        model,
        OptimizerSettings(lr=lr, eps=ADAM_EPS),
        dtype,
        lambda name: critic_lr / lr if name.startswith("critic.") else 1.0,
    )
    objective = PPO(
        model,
        sft,
        judge,
        asked,
        settings,
        stop_ids=stop_ids,
        seed=seed,
        spread=spread,
        text=None
        if text is None or settings.ptx == 0
        else pretrain.Pretraining(
            model.policy,
            text.sources,
            length=text.length,
            steps=settings.rollouts * settings.epochs * settings.minibatches,
            batch_rows=text.rows,
            micro_rows=max(1, settings.micro_tokens // text.length),
            end_of_text=text.end_of_text,
            seed=seed,
            cross_documents=text.cross_documents,
        ),
        gold=RewardModel(gold, settings.micro_tokens) if gold else None,
        say=say,
        ranks=ranks,
    )
    return model, objective, optimizer
