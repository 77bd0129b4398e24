"""Row-wise pieces of the decoder that automatic differentiation would do in many passes over memory.

On a CPU such passes are what a small model loses its time in. Each function's forward is the same with and
without gradients, bit for bit, so that log-probabilities that are measured and trained on agree exactly.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.model.precision import wide


def apply(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    """`Function.apply`, to which torch gives no types."""
    return cast("Callable[..., Tensor]", function.apply)(*inputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + ε) · w over the last axis, computed in float32 (float64 stays), in x's dtype."""
    if x.device.type == "cpu":
        return apply(RMSNormOnCPU, x, weight, eps)
    return F.rms_norm(wide(x), weight.shape, wide(weight), eps).to(x.dtype)


class RMSNormOnCPU(torch.autograd.Function):
    """PyTorch has no fused RMSNorm for a CPU, but a fused backward of LayerNorm that takes mean and scale.

    With mean 0 and scale r = 1/√(mean x² + ε) that kernel gives RMSNorm's gradient and the term of the mean,
    −r · mean(w · dy), which RMSNorm does not have; it is taken out. Several times as fast as the composite.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = wide(x)
        length = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y = exact * scale if exact is x else exact.mul_(scale)  # a copy is free to overwrite
        return y.mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        exact_grad = wide(grad).contiguous()
        exact_weight = weight.to(exact_grad.dtype)
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            exact_grad,
            wide(x).contiguous(),
            weight.shape,
            torch.zeros_like(scale),
            scale,
            exact_weight,
            None,
            [True, True, False],
        )
        mean = (exact_grad @ exact_weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1])
        return d_x.add_(mean).to(x.dtype), d_weight.to(weight.dtype), None


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as `rotate` takes them, (…, 1, K) for positions (…), in the dtype of the frequencies."""
    angles = positions[..., None, None].to(frequencies.dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn plane i, of coordinates i and i + K/2, by its angle, in float32 (float64 stays); in x's dtype.

    cos and sin, (B or 1, T, 1, K), hold a plane's value at both coordinates, sin with a minus at the first.
    """
    if torch.is_grad_enabled() and x_BTHK.requires_grad:
        return apply(Rotation, x_BTHK, cos, sin)
    return turned(x_BTHK, cos, sin, 1.0)


def turned(x: Tensor, cos: Tensor, sin: Tensor, way: float) -> Tensor:
    exact = wide(x)
    # Whole rows of K: the same on two halves, strided, takes four times as long on a CPU.
    other = exact.roll(x.shape[-1] // 2, -1)
    y = exact * cos if exact is x else exact.mul_(cos)  # a copy is free to overwrite
    return y.addcmul_(other, sin, value=way).to(x.dtype)


class Rotation(torch.autograd.Function):
    """The gradient of a rotation is turned back by the same angle; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, sin, -1.0), None, None
