"""Scaled dot-product attention with grouped key heads, and the masks that say who may attend to whom."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from unmask.model import flex
from unmask.model.kernels import apply, attention_weights, attention_weights_backward
from unmask.model.precision import emulated

# Scores of one head of one row, up to which they are made at once and kept for backward. Not of a batch: the same row
# must take the same way in batches of every size.
SCORES_TO_KEEP = 2**16
# Scores that are made at once, in bfloat16 twice 64 MB at most unless one head of a batch has more.
SCORES_AT_ONCE = 2**25


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask: Tensor | BlockMask | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q kᵀ / √K) v -> (B, H, T, K). H is a multiple of G: query heads share key heads in order.

    `causal`: position i sees keys up to i; a mask that is given too has to hide the others itself. `mask`: bool,
    true where a query may see a key, broadcastable to (B, 1, T, S), or the same by blocks, for compiled GPU code.
    Neither: every query sees every key.
    """
    if isinstance(mask, BlockMask):
        return flex.attention(q_BHTK, k_BGSK, v_BGSK, mask)
    if emulated(q_BHTK):
        return attention(q_BHTK.float(), k_BGSK.float(), v_BGSK.float(), mask, causal).to(q_BHTK.dtype)
    rows, heads, queries, size = q_BHTK.shape
    groups = k_BGSK.shape[1]
    if queries == 1:
        assert not causal or k_BGSK.shape[2] == 1 or mask is not None, (
            "one query sees every key that there is"
        )
        # One query a row, where SDPA costs a millisecond and more a layer: batched matmuls over the cache.
        q = q_BHTK.reshape(rows, groups, heads // groups, size)
        scores = (q * size**-0.5) @ k_BGSK.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        y: Tensor = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v_BGSK
        return y.reshape(rows, heads, 1, size)
    # The flash kernel of a GPU lets query heads share key heads; where others compute, each has its own.
    shared = q_BHTK.is_cuda and q_BHTK.dtype is torch.bfloat16 and mask is None
    if groups != heads and not shared:
        k_BGSK = k_BGSK.repeat_interleave(heads // groups, 1)
        v_BGSK = v_BGSK.repeat_interleave(heads // groups, 1)
    if q_BHTK.dtype is torch.bfloat16 and q_BHTK.device.type == "cpu":
        if heads > 1 and rows * heads * _block(queries, k_BGSK.shape[2]) * k_BGSK.shape[2] > SCORES_AT_ONCE:
            parts = zip(*(torch.split(x, 1, 1) for x in (q_BHTK, k_BGSK, v_BGSK)), strict=True)
            return torch.cat([apply(AttentionInBlocks, q, k, v, mask, causal) for q, k, v in parts], 1)
        return apply(AttentionInBlocks, q_BHTK, k_BGSK, v_BGSK, mask, causal)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=shared
    )


class AttentionInBlocks(torch.autograd.Function):
    """Attention as batched products, a block of queries at a time: (B, H, T, K), S keys, mask as in `attention`.

    In bfloat16 on a CPU this takes half the time of SDPA's flash kernel. A block ends at the last key that a causal
    mask lets it see. Probabilities are kept for backward where a row is one block (256 tokens); of more blocks they are
    made again, one block's at a time.

    It is less exact than SDPA: scores and probabilities are rounded to bfloat16 before and after a softmax in float32,
    so that a score of size s errs by up to s/512, as in transformers' eager attention. Gradients of keys and values
    are sums over up to eight blocks in bfloat16. Measuring is in float32, which does not come here. Every query has to
    see a key.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        rows, heads, queries, size = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], queries, k.shape[1])
        y, probs = torch.empty_like(q), None
        for block, seen, first in _blocks(queries, k.shape[1], causal):
            scores = torch.bmm(q[:, block].contiguous(), k[:, seen].contiguous().mT)
            probs = attention_weights(scores, rows, _part(mask, block, seen), first, size**-0.5)
            y[:, block] = torch.bmm(probs, v[:, seen].contiguous())
        keep = queries * k.shape[1] <= SCORES_TO_KEEP
        ctx.save_for_backward(q, k, v, mask, probs if keep else None)
        ctx.rows, ctx.causal = rows, causal
        return y.view(rows, heads, *y.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask, kept = ctx.saved_tensors
        rows, heads, queries, size = grad.shape
        grad, scale = grad.flatten(0, 1), size**-0.5
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        for block, seen, first in _blocks(queries, k.shape[1], ctx.causal):
            # Copies: products of strided parts take longer than these and the copying.
            q_here, d_here = q[:, block].contiguous(), grad[:, block].contiguous()
            k_seen, v_seen = k[:, seen].contiguous(), v[:, seen].contiguous()
            if kept is None:
                scores = torch.bmm(q_here, k_seen.mT)
                probs = attention_weights(scores, rows, _part(mask, block, seen), first, scale)
            else:
                probs = kept
            d_v_here = torch.bmm(probs.mT, d_here)
            d_scores = attention_weights_backward(torch.bmm(d_here, v_seen.mT), probs, first, scale)
            d_q[:, block] = torch.bmm(d_scores, k_seen)
            d_k_here = torch.bmm(d_scores.mT, q_here)
            if block.stop == queries:
                d_k, d_v = d_k_here, d_v_here
            else:
                d_k[:, seen] += d_k_here
                d_v[:, seen] += d_v_here
        d_q, d_k, d_v = (d.view(rows, heads, *d.shape[1:]) for d in (d_q, d_k, d_v))
        return d_q, d_k, d_v, None, None


def _block(queries: int, keys: int) -> int:
    """Queries of a block."""
    return queries if queries * keys <= SCORES_TO_KEEP else max(128, math.ceil(queries / 8))


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice, int | None]]:
    """Queries of a block, the keys that they read, and if it is causal the position of the first one among these.

    The last block comes first: it reads all keys.
    """
    size = _block(queries, keys)
    for first in reversed(range(0, queries, size)):
        last = first + size
        seen = last if causal and last < queries else keys
        yield slice(first, min(last, queries)), slice(0, seen), first if causal else None


def _part(mask: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    return None if mask is None else mask[..., queries, keys]


def packed_mask(
    tokens: int, window: int | None, documents_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """Mask (B or 1, 1, T, T) of causal attention inside documents and windows; None where causal is all."""
    if documents_BT is None and (window is None or window >= tokens):
        return None
    at = torch.arange(tokens, device=device)
    distance = at[:, None] - at[None, :]
    mask = (distance >= 0)[None]
    if window is not None:
        mask = mask & (distance < window)
    if documents_BT is not None:
        mask = mask & (documents_BT[:, :, None] == documents_BT[:, None, :])
    return mask[:, None]


def cached_mask(positions_BT: Tensor, reach: int, window: int | None) -> Tensor:
    """Mask (B, 1, T, S) over a cache: a query sees keys at its own position and before, within the window."""
    distance = positions_BT[:, :, None] - torch.arange(reach, device=positions_BT.device)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    return mask[:, None]
