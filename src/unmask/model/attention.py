"""Scaled dot-product attention with grouped key heads, and the masks that say who may attend to whom."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.model.precision import emulated


def attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / √K) v -> (B, H, T, K). H is a multiple of G: query heads share key heads in order.

    `causal`: position i sees keys up to i, no mask is built. `mask`: bool, true where a query may see a key,
    broadcastable to (B, 1, T, S). Neither: every query sees every key.
    """
    if emulated(q_BHTK):
        return attention(q_BHTK.float(), k_BGSK.float(), v_BGSK.float(), mask, causal).to(q_BHTK.dtype)
    rows, heads, queries, size = q_BHTK.shape
    groups = k_BGSK.shape[1]
    if queries == 1:
        # One query a row, where SDPA costs a millisecond and more a layer: batched matmuls over the cache.
        q = q_BHTK.reshape(rows, groups, heads // groups, size)
        scores = (q * size**-0.5) @ k_BGSK.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        y: Tensor = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v_BGSK
        return y.reshape(rows, heads, 1, size)
    if groups != heads:
        k_BGSK = k_BGSK.repeat_interleave(heads // groups, 1)
        v_BGSK = v_BGSK.repeat_interleave(heads // groups, 1)
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal)


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
