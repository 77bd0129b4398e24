"""Attention by blocks against masks of every query and key, on the CPU, where FlexAttention makes all scores."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from unmask.model.attention import attention, packed_mask
from unmask.model.flex import BLOCK, block_mask

CPU = torch.device("cpu")


def documents(rows: int, tokens: int, seed: int, padding: int = 0) -> Tensor:
    """Runs of random lengths, numbered; the last `padding` tokens of the first row are −1, as packing has it."""
    generator = torch.Generator().manual_seed(seed)
    documents_BT = (torch.rand(rows, tokens, generator=generator) < 0.01).cumsum(1)
    if padding:
        documents_BT[0, -padding:] = -1
    return documents_BT


@pytest.mark.parametrize("tokens", [40, 256, 600])
@pytest.mark.parametrize("window", [None, 7, 128, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_the_blocks_hide_what_the_whole_mask_hides(tokens: int, window: int | None, packed: bool) -> None:
    documents_BT = documents(3, tokens, tokens, padding=tokens // 4) if packed else None
    dense = packed_mask(tokens, window, documents_BT, CPU)
    blocks = block_mask(tokens, window, documents_BT, CPU)
    if dense is None:
        assert blocks is None
        return
    assert blocks is not None
    # PyTorch's own way, through the whole mask, knows which blocks nobody sees, and which all see.
    theirs = flex_attention.create_block_mask(blocks.mask_mod, len(dense), None, tokens, tokens, CPU)
    assert whole(blocks) == whole(theirs)
    assert all(map(set.issuperset, looked_at(blocks), looked_at(theirs)))
    q, k, v, _ = tensors(3, tokens)
    torch.testing.assert_close(attention(q, k, v, blocks), attention(q, k, v, dense))


def whole(mask: BlockMask) -> list[set[int]]:
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    return listed(mask.full_kv_num_blocks, mask.full_kv_indices)


def looked_at(mask: BlockMask) -> list[set[int]]:
    return listed(mask.kv_num_blocks, mask.kv_indices)


def listed(counts: Tensor, order: Tensor) -> list[set[int]]:
    rows = order.flatten(0, -2).tolist()
    return [set(places[:n]) for n, places in zip(counts.flatten().tolist(), rows, strict=True)]


def tensors(rows: int, tokens: int) -> list[Tensor]:
    """q, k, v and a gradient: four query heads share two key heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, tokens, 8) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("window", [None, 20, 150])
def test_gradients_by_blocks_are_those_of_the_whole_mask(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch refuses gradients on a CPU, for which it has no compiled kernel; what it does uncompiled has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    documents_BT = documents(3, 300, 1, padding=30)
    *inputs, out = tensors(3, 300)
    found = []
    for make in (block_mask, packed_mask):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = attention(*leaves, make(300, window, documents_BT, CPU))
        found.append([y.detach(), *torch.autograd.grad(y, leaves, out)])
    torch.testing.assert_close(*found)


def test_blocks_of_other_documents_are_left_out() -> None:
    documents_BT = (torch.arange(8 * BLOCK) // (2 * BLOCK))[None]  # four documents of two blocks
    blocks = block_mask(8 * BLOCK, None, documents_BT, CPU)
    assert blocks is not None
    assert blocks.kv_num_blocks.sum() == 8  # the diagonal
    assert blocks.full_kv_num_blocks.sum() == 4  # below it, in the same document
