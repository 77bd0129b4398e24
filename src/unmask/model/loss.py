"""Cross-entropy and log-probabilities of tokens from hidden states, with logits made a chunk at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.model.kernels import apply, cross_entropy
from unmask.model.precision import emulated, linear, wide

# Rows of a chunk are cut so that its logits are at most so many numbers, however large the vocabulary: on a CPU 128 MB
# in float32. A GPU would wait for memory with so few: each chunk reads and writes the float32 gradient of the head.
LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_GPU = 2**25, 2**28


def rows_at_once(vocabulary: int, cpu: bool) -> int:
    return max(1, min(1024, LOGITS_AT_ONCE // vocabulary) if cpu else LOGITS_AT_ONCE_ON_GPU // vocabulary)


def chunks(hidden_ND: Tensor, head_VD: Tensor, chunk: int | None) -> Iterator[slice]:
    """Rows of hidden states, `chunk` at a time, or as many as suit the head and the device."""
    step = chunk or rows_at_once(head_VD.shape[0], head_VD.device.type == "cpu")
    for start in range(0, len(hidden_ND), step):
        yield slice(start, min(start + step, len(hidden_ND)))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, through float32 where the processor has no bfloat16 instructions."""
    return (a.float() @ b.float()).to(a.dtype) if emulated(a) else a @ b


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x times one float32 number, in x's dtype. A GPU would round the number to that dtype first: the same error in
    every gradient of a step."""
    return x * by if x.device.type == "cpu" else (wide(x) * by).to(x.dtype)


class CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None) -> Tensor:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        d_head = torch.zeros_like(head_VD, dtype=exact) if need_head else None
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        for rows in chunks(hidden_ND, head_VD, chunk):
            hidden, targets = hidden_ND[rows], targets_N[rows]
            logits = linear(hidden, head_VD)
            losses, slope = cross_entropy(logits, targets, slope=need_hidden or need_head)
            total += losses.sum()
            if slope is None:
                continue
            if d_hidden is not None:
                d_hidden[rows] = product(slope, head_VD)
            if d_head is not None:
                d_head += product(slope.t(), hidden)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else scaled(d_hidden, grad),
            None if d_head is None else scaled(d_head, grad),
            None,
            None,
        )


def cross_entropy_sum(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Σ_n −log softmax(logits_n)[target_n] in nats: a float32 SUM, to be divided by global counts.

    The gradient is made in forward, chunk by chunk, where the logits are at hand. Rows that do not count are
    to be left out before.
    """
    return apply(CrossEntropySum, hidden_ND, head_VD, targets_N, chunk)


class TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None) -> Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, targets_N)
        ctx.chunk = chunk
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        out = torch.empty(hidden_ND.shape[0], dtype=exact, device=hidden_ND.device)
        for rows in chunks(hidden_ND, head_VD, chunk):
            losses, _ = cross_entropy(linear(hidden_ND[rows], head_VD), targets_N[rows], slope=False)
            out[rows] = -losses
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, head_VD, targets_N = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        d_head = torch.zeros_like(head_VD, dtype=grad_N.dtype) if need_head else None
        for rows in chunks(hidden_ND, head_VD, ctx.chunk):
            # A row's slope is multiplied by its gradient after the product with the head, and before the one with the
            # hidden states: a row of those is short, one of the slope as long as the vocabulary.
            hidden, grad = hidden_ND[rows], grad_N[rows, None]
            _, slope = cross_entropy(linear(hidden, head_VD), targets_N[rows], slope=True)
            assert slope is not None
            if d_hidden is not None:
                d_hidden[rows] = product(slope, head_VD) * -grad
            if d_head is not None:
                d_head -= product(slope.t(), (hidden * grad).to(hidden.dtype))
        return d_hidden, None if d_head is None else d_head.to(head_VD.dtype), None, None


def token_log_probs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """log softmax(logits)[target] in nats, float32 (N,); backward makes the logits again."""
    return apply(TokenLogProbs, hidden_ND, head_VD, targets_N, chunk)
