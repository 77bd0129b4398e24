"""One token a row from logits, by inverse CDF: pure functions of the logits and of uniform numbers.

`torch.multinomial` draws V exponentials a row in a serial loop (milliseconds at 64 rows), and what it draws
depends on the rows beside. One uniform number a row, a cumulative sum and a binary search do neither.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unmask.errors import UserError


def uniforms(seed: int, stream: int, n: int) -> npt.NDArray[np.float64]:
    """The first n uniform numbers in [0, 1) of a stream: number i is a pure function of (seed, stream, i).

    Philox (Salmon et al. 2011) with (seed, stream) as its key, both modulo 2^64: streams are independent of
    one another, and numbers do not depend on how many were asked for.
    """
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(n)


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError for settings that describe no distribution."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(
            f"temperature is {temperature}; give 0 (always the likeliest token) or a positive number"
        )
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; give 0 (off) or the number of likeliest tokens to keep")
    if not 0 <= top_p <= 1:
        raise UserError(f"top_p is {top_p}; give the share of probability to keep, from 0 to 1 (off)")


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(ids_B, log_probs_B): one token a row, and its log-probability in nats.

    The log-probabilities are float32 log-softmax of logits / temperature over the full vocabulary, before
    top-k and top-p: where neither is used, the distribution that was sampled. Temperature 0 takes the
    likeliest token (the lowest id of equals) whatever the uniform number, and records its log-probability
    at temperature 1.
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        log_probs_BV = logits_BV.log_softmax(-1)
        ids_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        scaled_BV = logits_BV if temperature == 1 else logits_BV / temperature
        log_probs_BV = scaled_BV.log_softmax(-1)
        kept_BV = restrict(log_probs_BV, top_k, top_p)
        # In float64, or tokens rarer than 6e-8 would be drawn with a probability that rounding chose.
        wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
        cdf_BV = kept_BV.exp().cumsum(-1, dtype=wide)
        total_B1 = cdf_BV[:, -1:]
        # Strictly below the total, so that the search ends at a token of positive probability.
        point_B1 = torch.minimum(
            uniforms_B[:, None].to(wide) * total_B1, total_B1.nextafter(torch.zeros_like(total_B1))
        )
        ids_B1 = torch.searchsorted(cdf_BV, point_B1, right=True)
        ids_B1 = ids_B1.clamp(max=logits_BV.shape[-1] - 1)  # past the end only where logits are NaN
    return ids_B1[:, 0], log_probs_BV.gather(-1, ids_B1)[:, 0]


def restrict(log_probs_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for tokens outside top-k, then for those outside top-p of what is left; not renormalised.

    top-k keeps the k likeliest tokens (0 or ≥ V: all). top-p keeps the smallest set of likeliest tokens
    with at least this share of the probability, one at least (Holtzman et al. 2020). Tokens as likely as
    the last one kept are kept too, so that the set does not depend on the order of a sort; transformers
    does so for top-k only.
    """
    if 0 < top_k < log_probs_BV.shape[-1]:
        last_B1 = log_probs_BV.topk(top_k).values[:, -1:]
        log_probs_BV = log_probs_BV.masked_fill(log_probs_BV < last_B1, -math.inf)
    if top_p < 1:
        sorted_BV = log_probs_BV.sort(-1, descending=True).values
        mass_BV = sorted_BV.softmax(-1).cumsum(-1)
        kept_B1 = (mass_BV < top_p).sum(-1, keepdim=True).clamp(max=log_probs_BV.shape[-1] - 1)
        log_probs_BV = log_probs_BV.masked_fill(log_probs_BV < sorted_BV.gather(-1, kept_B1), -math.inf)
    return log_probs_BV
