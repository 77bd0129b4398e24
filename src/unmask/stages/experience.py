"""What a rollout leaves to learn from: the advantage and the return of every action."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask import delta
from unmask.stages import objectives
from unmask.stages.rollouts import Rollout


@dataclass(frozen=True)
class Experience:
    """A rollout with what is learned from it; (B, A) tensors hold 0 where a row has no action."""

    rollout: Rollout
    mask_BA: Tensor
    log_probs_BA: Tensor  # of the policy that acted, computed by the trainer
    values_BA: Tensor  # of the critic at that time
    advantages_BA: Tensor  # whitened over the rollout
    returns_BA: Tensor
    numbers: dict[str, float]  # for metrics.jsonl


def experience(
    rollout: Rollout,
    given_B: Tensor,
    mask_BA: Tensor,
    log_probs_BA: Tensor,
    reference_BA: Tensor,
    values_BA: Tensor,
    *,
    beta: float,
    penalty: float,
    gamma: float,
    lam: float,
) -> Experience:
    """Advantages and returns from what judge, reference and critic said of a rollout.

    `given_B` is the judge's score of each answer, `beta` what a nat of k1 from the reference costs. Where the
    judge gave NaN, as to answers that were cut, the score is the critic's value of the prompt less `penalty`.
    """
    scores_B = given_B.where(~given_B.isnan(), values_BA[:, 0] - penalty)
    log_ratio_BA = log_probs_BA - reference_BA
    rewards_BA = objectives.token_rewards(scores_B, log_ratio_BA, mask_BA, beta)
    advantages_BA, returns_BA = objectives.gae(rewards_BA, values_BA, mask_BA, gamma, lam)
    sampled = [log_prob for answer in rollout.answers for log_prob in answer.log_probs]
    gap_N = (log_probs_BA[mask_BA] - torch.tensor(sampled, device=mask_BA.device)).abs()
    n, finished = len(rollout.answers), sum(answer.finished for answer in rollout.answers)
    numbers = {
        "reward": given_B.nanmean().item(),  # an answer that was cut counts in `truncated` alone
        "kl_child_parent": delta.k1(log_ratio_BA[mask_BA]).mean().item(),
        "entropy": -log_probs_BA[mask_BA].mean().item(),
        "explained_variance": objectives.explained_variance(values_BA, returns_BA, mask_BA).item(),
        "stop_rate": finished / n,
        "truncated": n - finished,
        "answer_tokens": mask_BA.sum(1).float().mean().item(),
        "sampler_gap_mean": gap_N.mean().item(),
        "sampler_gap_max": gap_N.max().item(),
    }
    white_BA = objectives.whiten(advantages_BA, mask_BA)
    return Experience(rollout, mask_BA, log_probs_BA, values_BA, white_BA, returns_BA, numbers)
