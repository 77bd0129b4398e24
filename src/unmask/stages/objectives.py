"""Losses, rewards and advantages as pure functions: tensors in, tensors out, no model and no state.

Shapes: B rows (answers or pairs), A answer positions. A mask is True where an action was taken, that is, at
the tokens the policy chose, its stop token included. What stands elsewhere is never read: it may be NaN.
Losses come back elementwise: the caller masks, sums, and divides by the count of the whole optimizer step.
"""

import torch
from torch import Tensor
from torch.nn import functional

from unmask import delta

# Ratios beyond e^20 stay there: far outside every clip range, and still finite in float32 when multiplied.
MAX_LOG_RATIO = 20.0


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """−ln σ(r_chosen − r_rejected) of each pair, in nats; ln 2 where both have the same score.

    Bradley and Terry (1952), as the reward loss of Ouyang et al. (arXiv 2203.02155), eq. 1. Only the
    difference counts, so that scores are known up to one constant: the stage measures and saves it.
    """
    return -functional.logsigmoid(chosen_B.float() - rejected_B.float())


def token_rewards(scores_B: Tensor, log_ratio_BA: Tensor, mask_BA: Tensor, beta: float) -> Tensor:
    """r_t = −β·k1_t at each action, plus the answer's score at its last action; (B, A), 0 elsewhere.

    `log_ratio_BA` = ln π(a_t) − ln π_ref(a_t) for the actions taken, in nats. k1 is that log-ratio itself,
    whose mean over the policy's samples is kl_child_parent; so an action that the policy likes better than
    the reference does costs, and one that it likes less pays. (k3 in its place would never pay, and has
    another gradient.) Ouyang et al. (arXiv 2203.02155), eq. 2, spread over the tokens as in Ziegler et al.
    (arXiv 1909.08593).
    """
    assert bool(mask_BA.any(dim=1).all()), "an answer without an action has no place for its score"
    rewards_BA = torch.where(mask_BA, -beta * delta.k1(log_ratio_BA.float()), 0.0)
    last_B = mask_BA.shape[1] - 1 - mask_BA.flip(1).int().argmax(dim=1)
    return rewards_BA.scatter_add(1, last_B[:, None], scores_B.float()[:, None])


def gae(
    rewards_BA: Tensor, values_BA: Tensor, mask_BA: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (B, A) float32 and 0 where no action was.

        δ_i = r_i + γ·V_{i+1} − V_i        A_i = Σ_{j ≥ i} (γλ)^{j−i}·δ_j        R_i = A_i + V_i

    i runs over the actions of a row; positions between them (a tool's output) are passed over and neither
    discount nor reset. V_i is the value read *before* action i. After the last action V is 0: the answer
    has ended there, also where it was cut (its score is then the penalty, and nothing is left to expect).
    Schulman et al. (arXiv 1506.02438), eq. 16.
    """
    rewards_BA, values_BA = rewards_BA.float(), values_BA.float()
    advantages_BA = torch.zeros_like(rewards_BA)
    advantage_B = next_value_B = torch.zeros_like(rewards_BA[:, 0])
    for t in reversed(range(rewards_BA.shape[1])):
        action_B = mask_BA[:, t]
        error_B = rewards_BA[:, t] + gamma * next_value_B - values_BA[:, t]
        advantage_B = torch.where(action_B, error_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(action_B, values_BA[:, t], next_value_B)
        advantages_BA[:, t] = torch.where(action_B, advantage_B, 0.0)
    returns_BA = torch.where(mask_BA, advantages_BA + values_BA, 0.0)
    return advantages_BA, returns_BA


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean)/√(var + eps) over the masked elements (at least one), 0 elsewhere; equal ones give zeros.

    The caller hands over a whole rollout, never a micro-batch, so that the result does not depend on how
    the batch is split. Deviation from OpenAI's and TRL's: the variance divides by n, not n − 1.
    """
    x = x.float()
    chosen = x[mask]
    mean, variance = chosen.mean(), chosen.var(unbiased=False)
    return torch.where(mask, (x - mean) / (variance + eps).sqrt(), 0.0)


def clipped_policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(ρ·A, clip(ρ, 1 − c, 1 + c)·A) of each action, ρ = π(a)/π_old(a).

    Schulman et al. (arXiv 1707.06347), eq. 7. At ρ = 1 it is −A with the gradient of −A·ln π. For A > 0 it
    never falls below −(1 + c)·A, and for A < 0 never below (1 − c)·|A|: nothing is won by leaving the
    range. On the other side it grows with ρ: a step too far is pulled back. Deviation: ln ρ is kept within
    ±20.
    """
    ratio = (log_probs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½·max((V − R)², (V_clipped − R)²) of each action, V_clipped = V kept within ± clip of V_old.

    From OpenAI's `baselines` (PPO2); not in the PPO paper. The maximum takes the more pessimistic of the
    two: never below ½·(V − R)², and without gradient where V has moved further than `clip` towards R.
    """
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R) over the masked elements.

    1 for a perfect critic, 0 for a constant one, below 0 for one that is worse than a constant; 0 where the
    returns do not vary, since there is nothing to explain.
    """
    left, whole = (returns - values)[mask].var(unbiased=False), returns[mask].var(unbiased=False)
    return torch.where(whole > 0, 1 - left / whole, 0.0)


def at_length(scores_B: Tensor, lengths_B: Tensor, length: float) -> float:
    """The score at `length` on the least-squares line of scores over lengths; the mean where lengths do not vary.

    NaN for no score at all.
    """
    x, y = lengths_B.double(), scores_B.double()
    centred = x - x.mean()
    spread = centred.square().sum()
    slope = (centred * y).sum() / spread if spread > 0 else spread
    return float(y.mean() + slope * (length - x.mean()))
