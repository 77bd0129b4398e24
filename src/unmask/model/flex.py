"""Attention inside documents and windows on a GPU: FlexAttention, which passes over blocks that nobody sees.

`torch.nn.attention.varlen` would do it too, but takes documents one behind the other without rows, needs their
number on the host, and runs on no CPU, where this is tested.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's own default


def attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: BlockMask) -> Tensor:
    """As `unmask.model.attention.attention`: (B, H, T, K). Outside of torch.compile it would make all scores."""
    y = flex_attention(q_BHTK, k_BGTK, v_BGTK, block_mask=mask, enable_gqa=q_BHTK.shape[1] != k_BGTK.shape[1])
    assert isinstance(y, Tensor)
    return y


def block_mask(
    tokens: int, window: int | None, documents_BT: Tensor | None, device: torch.device
) -> BlockMask | None:
    """What `packed_mask` says, by blocks of 128 × 128, without a mask of T × T; None where causal is all.

    A block is left out if no query of it can see a key, by the least and greatest document of both; it is whole if
    all see all; else each query and key are looked at.
    """
    if documents_BT is None and (window is None or window >= tokens):
        return None

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents_BT is not None:
            seen = seen & (documents_BT[row, query] == documents_BT[row, key])
        return seen

    blocks = -(-tokens // BLOCK)
    at = torch.arange(blocks, device=device)
    ahead = (at[:, None] - at[None, :])[None]  # blocks between query and key: (1, blocks, blocks)
    # A last block that is not filled is never whole: nothing is known of what lies beyond.
    some, every = ahead >= 0, (ahead > 0) & (at < tokens // BLOCK)[:, None]
    if window is not None:
        some = some & ((ahead - 1) * BLOCK + 1 < window)  # first query of the one, last key of the other
        every = every & ((ahead + 1) * BLOCK - 1 < window)
    if documents_BT is not None:
        padded = functional.pad(documents_BT, (0, blocks * BLOCK - tokens), value=-1)
        least, greatest = padded.reshape(-1, blocks, BLOCK).aminmax(dim=2)
        meet = (least[:, :, None] <= greatest[:, None, :]) & (least[:, None, :] <= greatest[:, :, None])
        one = (least[:, :, None] == greatest[:, None, :]) & (greatest[:, :, None] == least[:, None, :])
        some, every = some & meet, every & one
    return BlockMask.from_kv_blocks(
        *_ordered((some & ~every)[:, None]),
        *_ordered(every[:, None]),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks of each query block there are, and which: those first, in order."""
    counts = blocks.sum(-1, dtype=torch.int32)
    places = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts.contiguous(), places.contiguous()
