"""The stage delta: how one layer of training changed a model's next-token distribution, in nats.

For checkpoints 0 … n of one lineage and tokenizer, in the same context:

    delta_k(t) = log p_k(t) − log p_{k−1}(t)            log p_n(t) = log p_0(t) + Σ_k delta_k(t)

Pure functions on logits: a log-softmax over the full vocabulary in float32 (float64 stays), a chunk of rows
at a time. Everything in this package that compares two models' log-probabilities reads this file. Rows of
logits must be finite.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.errors import UserError

# Numbers in a chunk: 1 MB of float32, so that the few temporaries of one chunk stay in a processor's cache.
CHUNK = 2**18


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis, float32 whatever the logits are (float64 stays)."""
    return wide(logits).log_softmax(-1)


def chunks(logits_TV: Tensor) -> Iterator[slice]:
    rows, vocabulary = logits_TV.shape
    step = max(1, CHUNK // vocabulary)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def log_probs(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """log p(target) of every row, (T,) in nats."""
    out_T = torch.empty_like(targets_T, dtype=wide(logits_TV[:0]).dtype)
    for rows in chunks(logits_TV):
        out_T[rows] = log_softmax(logits_TV[rows]).gather(1, targets_T[rows, None])[:, 0]
    return out_T


def deltas(log_probs: Sequence[Tensor]) -> list[Tensor]:
    """[log p_0, delta_1, …, delta_n] from each checkpoint's log-probabilities of the same tokens.

    In float64 and on the CPU: there a difference of two float32 numbers of this size is exact, and so is the
    sum of the parts, which is log p_n.
    """
    exact = [values.to("cpu", torch.float64) for values in log_probs]
    return [exact[0], *(child - parent for parent, child in pairwise(exact))]


def credits(parts: Sequence[Tensor], vocabulary: int) -> list[Tensor]:
    """What each layer gave each token, in nats: the base log p_0 + ln V (beyond chance), the others their
    delta.

    They sum to log p_n + ln V.
    """
    return [parts[0] + math.log(vocabulary), *parts[1:]]


def winner(credits: Sequence[Tensor], floor: float) -> Tensor:
    """Index of the layer with a token's largest credit (the lower on a tie), −1 where it is below `floor`."""
    best, layer = torch.stack(list(credits)).max(0)
    return torch.where(best < floor, -1, layer)


@dataclass(frozen=True)
class Divergence:
    """How far a child's next-token distributions are from its parent's, exact over the full vocabulary;
    (T,), nats.

    `kl_child_parent_T` = Σ p_child ln(p_child / p_parent), `kl_parent_child_T` the other way, `js_T` the
    Jensen-Shannon divergence (at most ln 2), and both entropies.
    """

    kl_child_parent_T: Tensor
    kl_parent_child_T: Tensor
    js_T: Tensor
    entropy_child_T: Tensor
    entropy_parent_T: Tensor


def divergences(logits_child_TV: Tensor, logits_parent_TV: Tensor) -> Divergence:
    """Exact divergences of every row; exactly 0 for identical rows, never negative.

    KL(p‖q) is summed as Σ (p ln(p/q) − p + q). The added terms sum to 0, and with them an error of either
    log-softmax's normaliser, the largest error in float32, cancels to first order.
    """
    assert logits_child_TV.shape == logits_parent_TV.shape
    rows = [_divergences(logits_child_TV[part], logits_parent_TV[part]) for part in chunks(logits_child_TV)]
    if not rows:
        rows = [torch.zeros(5, 0, device=logits_child_TV.device)]
    return Divergence(*torch.cat(rows, 1))


def _divergences(logits_child_TV: Tensor, logits_parent_TV: Tensor) -> Tensor:
    child, parent = log_softmax(logits_child_TV), log_softmax(logits_parent_TV)
    p, q = child.exp(), parent.exp()
    entropies = [-(p * child).sum(-1), -(q * parent).sum(-1)]
    ratio = parent.sub_(child)
    excess = q - p
    up, down = p * ratio, q * ratio
    kl_child_parent = (excess - up).sum(-1)
    kl_parent_child = (down - excess).sum(-1)
    # With m the mean of p and q: ln(m/p) = max(ratio, 0) + middle, ln(m/q) = max(−ratio, 0) + middle, and
    # middle = ln((1 + exp(−|ratio|)) / 2), in a form that is exactly 0 at ratio 0 and overflows nowhere.
    middle = ratio.abs().neg_().expm1_().mul_(0.5).log1p_()
    js = -0.5 * (p * (ratio.clamp(min=0) + middle) + q * (middle - ratio.clamp(max=0))).sum(-1)
    return torch.stack([*(x.clamp(min=0) for x in (kl_child_parent, kl_parent_child, js)), *entropies])


class Rank(NamedTuple):
    """`rank_T`: 1 + how many tokens score strictly higher; `tied_T`: how many others score the same."""

    rank_T: Tensor
    tied_T: Tensor


def token_rank(logits_TV: Tensor, tokens_T: Tensor) -> Rank:
    """Where a token stands among all in each row."""
    own = logits_TV.gather(1, tokens_T[:, None])
    return Rank(1 + (logits_TV > own).sum(-1), (logits_TV == own).sum(-1) - 1)


def shift(logits_child_TV: Tensor, logits_parent_TV: Tensor) -> Rank:
    """Rank under the parent of the child's most likely token: 1 unshifted, 2 or 3 marginal, else shifted."""
    return token_rank(logits_parent_TV, logits_child_TV.argmax(-1))


def k1(log_ratio: Tensor) -> Tensor:
    """δ = log p_child − log p_parent of a token sampled from the child: unbiased for kl_child_parent, any
    sign.

    The estimator for rewards. As a loss its gradient is zero in expectation.
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """δ²/2: a biased value, but as a loss on tokens from the child it has kl_child_parent's gradient."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(−δ) − 1 + δ (Schulman, "Approximating KL Divergence"): unbiased for kl_child_parent, never
    negative.

    Of low variance where the two are close. As a loss its gradient is kl_parent_child's.
    """
    return torch.expm1(-log_ratio) + log_ratio


def mix(logits_0: Tensor, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Log-probabilities of the dial: log p ∝ log p_0 + Σ_k a_k · delta_k, one weight for each layer above
    the base.

    Weights (1, …, 1) are the finished model and (0, …, 0) the base, bit for bit: gathered by checkpoint the
    exponent is Σ_k (a_k − a_{k+1}) · log p_k with a_0 = 1 and a_{n+1} = 0, and checkpoints of weight 0 drop
    out.
    """
    if len(weights) != len(logits):
        raise UserError(f"{len(logits)} layers above the base take as many weights, not {len(weights)}")
    shares = [a - b for a, b in pairwise([1.0, *weights, 0.0])]
    terms = [share * wide(z) for share, z in zip(shares, (logits_0, *logits), strict=True) if share]
    return log_softmax(torch.stack(terms).sum(0))
