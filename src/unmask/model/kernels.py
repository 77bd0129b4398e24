"""The decoder's row-wise parts: by `rowwise.cpp` on a CPU that has it compiled, by plain PyTorch elsewhere.

Plain PyTorch takes many passes over memory for each of them, which is what a small model loses its time in. Both ways
compute in float32 (float64 stays); plain PyTorch rounds once or twice more on the way in bfloat16. The way does not
depend on whether gradients are wanted, so that log-probabilities that are measured and trained on agree bit for bit.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.model import native
from unmask.model.compiled import compiled, compiles
from unmask.model.precision import wide


def apply(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    """`Function.apply`, to which torch gives no types."""
    return cast("Callable[..., Tensor]", function.apply)(*inputs)


def exact_empty(*shape: int) -> Tensor:
    """What compiled kernels write sums and scales into, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def embedding(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the weight, (…, D) for ids (…), whose gradients are added up in float32 (float64 stays)."""
    if weight_VD.dtype is torch.bfloat16 and weight_VD.device.type == "cpu":
        return apply(Embedding, ids, weight_VD)
    return F.embedding(ids, weight_VD)


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight_VD)
        return F.embedding(ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        # PyTorch's own adds up in bfloat16, where a frequent token's sum soon no longer grows. This one rounds once.
        (ids,) = ctx.saved_tensors
        grad_ND = grad.reshape(ids.numel(), -1)
        d_weight_VD = grad_ND.new_zeros(ctx.rows, grad_ND.shape[1])
        return None, d_weight_VD.scatter_add_(0, ids.long().reshape(-1, 1).expand_as(grad_ND), grad_ND)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + ε) · w over the last axis, computed in float32 (float64 stays), in x's dtype."""
    if native.takes(x, weight) and weight.shape == x.shape[-1:]:
        return apply(RMSNorm, x, weight, eps)
    return F.rms_norm(wide(x), weight.shape, wide(weight), eps).to(x.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, scales = torch.empty_like(x), exact_empty(*x.shape[:-1])
        native.call("rms_norm", x.dtype, x, weight, eps, scales.numel(), x.shape[-1], y, scales)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        d_x, d_weights = torch.empty_like(x), exact_empty(native.PARTS, x.shape[-1]).zero_()
        native.call(
            "rms_norm_backward",
            x.dtype,
            grad.contiguous(),
            x,
            weight,
            scales,
            scales.numel(),
            x.shape[-1],
            d_x,
            d_weights,
        )
        return d_x, d_weights.sum(0).to(weight.dtype), None


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as `rotate` takes them, (…, 1, K) for positions (…), in the dtype of the frequencies."""
    angles = positions[..., None, None].to(frequencies.dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn plane i, of coordinates i and i + K/2, by its angle, in float32 (float64 stays); in x's dtype.

    cos and sin, (B or 1, T, 1, K), hold a plane's value at both coordinates, sin with a minus at the first.
    """
    exact = wide(x_BTHK)
    # Whole rows of K: the same on two halves, strided, takes four times as long on a CPU.
    other = exact.roll(x_BTHK.shape[-1] // 2, -1)
    return (exact * cos).addcmul(other, sin).to(x_BTHK.dtype)


def norm_rotate(x_BTHK: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """rms_norm over K, if there is a weight (K), then `rotate`: (B, H, T, K)."""
    batch, tokens, _, size = x_BTHK.shape
    tables = [(1, tokens, 1, size), (batch, tokens, 1, size)]
    fits = cos.shape == sin.shape and tuple(cos.shape) in tables and cos.dtype is torch.float32
    fits = fits and (weight is None or weight.shape == (size,))
    if fits and native.takes(x_BTHK, x_BTHK if weight is None else weight):
        return apply(NormRotate, x_BTHK, weight, eps, cos.contiguous(), sin.contiguous())
    normed = x_BTHK if weight is None else rms_norm(x_BTHK, weight, eps)
    return rotate(normed, cos, sin).transpose(1, 2)


class NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.contiguous()
        batch, tokens, heads, size = x.shape
        y, scales = x.new_empty(batch, heads, tokens, size), exact_empty(batch, tokens, heads)
        native.call("norm_rotate", x.dtype, x, weight, eps, cos, sin, len(cos), *x.shape, y, scales)
        ctx.save_for_backward(None if weight is None else x, weight, cos, sin, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, cos, sin, scales = ctx.saved_tensors
        batch, heads, tokens, size = grad.shape
        d_x = grad.new_empty(batch, tokens, heads, size)
        d_weights = exact_empty(native.PARTS, size).zero_()
        native.call(
            "norm_rotate_backward",
            grad.dtype,
            grad.contiguous(),
            x,
            weight,
            cos,
            sin,
            scales,
            len(cos),
            *d_x.shape,
            d_x,
            d_weights,
        )
        return d_x, None if weight is None else d_weights.sum(0).to(weight.dtype), None, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    if native.takes(gate, up) and gate.shape == up.shape:
        return apply(SwiGLU, gate, up)
    return F.silu(gate) * up


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        native.call("swiglu", gate.dtype, gate, up, gate.numel(), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        native.call("swiglu_backward", gate.dtype, grad.contiguous(), gate, up, gate.numel(), d_gate, d_up)
        return d_gate, d_up


def attention_weights(
    scores: Tensor, rows: int, mask: Tensor | None, first: int | None, scale: float
) -> Tensor:
    """softmax(scale · scores) over keys, in place of the scores (B·H, T, S) of B = `rows`.

    `first`: query i sees keys up to first + i; None: all. `mask`, bool and broadcastable to (B, 1, T, S), as in
    `attention`. Every query has to see a key.
    """
    batch, queries, keys = scores.shape
    heads = batch // max(1, rows)
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise TypeError(f"a mask of {mask.dtype}, where bool is meant")
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = mask.expand(1 if mask.shape[0] == 1 else rows, 1, queries, keys)
    if native.takes(scores) and scores.is_contiguous():
        seen = None if mask is None else mask.contiguous()
        masks = 0 if seen is None else len(seen)
        native.call(
            "attention_weights",
            scores.dtype,
            scores,
            scale,
            seen,
            masks,
            -1 if first is None else first,
            rows,
            heads,
            queries,
            keys,
        )
        return scores
    scores.mul_(scale)
    if first is not None:
        later = torch.full((queries, keys), -torch.inf, dtype=scores.dtype, device=scores.device)
        scores += later.triu_(first + 1)
    if mask is not None:
        scores.view(rows, heads, queries, keys).masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1)


def attention_weights_backward(grad: Tensor, weights: Tensor, first: int | None, scale: float) -> Tensor:
    """The gradient of the scores from the weights' (B·H, T, S), which may be overwritten."""
    batch, queries, keys = weights.shape
    if native.takes(grad, weights) and grad.is_contiguous() and weights.is_contiguous():
        native.call(
            "attention_weights_backward",
            grad.dtype,
            grad,
            weights,
            scale,
            -1 if first is None else first,
            batch * queries,
            queries,
            keys,
        )
        return grad
    d_scores: Tensor = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
    return d_scores.mul_(scale)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """−ln softmax(logits)[target], (N,) in float32 (float64 stays), and if asked its slope by the logits, (N, V).

    The slope has the logits' dtype. They may be overwritten. IndexError for a target that is no column.
    """
    targets_N = targets_N.long().contiguous()
    if len(targets_N) != len(logits_NV):
        raise IndexError(f"{len(targets_N)} targets for {len(logits_NV)} rows of logits")
    # On another device it would wait for the device, which checks itself.
    if logits_NV.device.type == "cpu" and len(targets_N):
        low, high = int(targets_N.min()), int(targets_N.max())
        if not 0 <= low <= high < logits_NV.shape[1]:
            raise IndexError(f"targets from {low} to {high} for {logits_NV.shape[1]} columns of logits")
    if native.takes(logits_NV):
        logits_NV = logits_NV.contiguous()
        losses_N = exact_empty(len(targets_N))
        native.call(
            "cross_entropy",
            logits_NV.dtype,
            logits_NV,
            targets_N,
            slope,
            *logits_NV.shape,
            losses_N,
        )
        return losses_N, logits_NV if slope else None
    plain = compiled(_cross_entropy) if compiles(logits_NV.device) else _cross_entropy
    losses_N, slope_NV = plain(logits_NV, targets_N, slope)
    return losses_N, slope_NV


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    log_probs = wide(logits_NV).log_softmax(-1)
    losses_N = -log_probs.gather(1, targets_N[:, None])[:, 0]
    if not slope:
        return losses_N, None
    # Not scattered into place: a compiler makes this comparison while it writes the slope.
    columns = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    slope_NV = log_probs.exp_().add_(columns == targets_N[:, None], alpha=-1)
    return losses_N, slope_NV.to(logits_NV.dtype)
