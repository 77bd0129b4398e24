"""The row-wise functions against their plain definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.model.attention import AttentionByProducts, attention
from unmask.model.config import ModelConfig
from unmask.model.decoder import rotary_frequencies
from unmask.model.kernels import apply, rms_norm, rotate


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 8)])
def test_rms_norm_and_its_gradient_equal_the_plain_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    # A mean far from zero, so that the term that LayerNorm has and RMSNorm has not would show.
    x = (2 + torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    w = torch.randn(shape[-1], dtype=torch.float64, generator=generator).requires_grad_()
    out = torch.randn(shape, dtype=torch.float64, generator=generator)
    plain = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * w
    expected = torch.autograd.grad(plain, (x, w), out)
    y = rms_norm(x, w, 1e-3)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(torch.autograd.grad(y, (x, w), out), expected)
    rounded = rms_norm(x.detach().bfloat16(), w.detach().bfloat16(), 1e-3)
    torch.testing.assert_close(rounded.double(), plain, rtol=0.02, atol=0.02)


def test_rotation_turns_the_plane_of_coordinates_i_and_i_plus_half_and_its_gradient_turns_back() -> None:
    angles = torch.rand(1, 6, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64, requires_grad=True)
    y = rotate(x, *tables)
    complex_x, complex_y = torch.complex(x[..., :4], x[..., 4:]), torch.complex(y[..., :4], y[..., 4:])
    torch.testing.assert_close(complex_y, complex_x * torch.polar(torch.ones_like(angles), angles))
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(gradient, x.detach())


def test_rotary_frequencies_are_powers_of_theta() -> None:
    config = ModelConfig(8, 8, 8, 1, 1, 1, head_dim=4, max_position_embeddings=8, rope_theta=10_000.0)
    torch.testing.assert_close(rotary_frequencies(config), torch.tensor([1.0, 0.01]))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_its_definition_for_grouped_heads(queries: int, groups: int) -> None:
    q, k, v = torch.randn(3, 4, queries, 8), torch.randn(3, groups, 5, 8), torch.randn(3, groups, 5, 8)
    mask = torch.rand(3, 1, queries, 5) < 0.6
    mask[..., 0] = True
    torch.testing.assert_close(attention(q, k, v, mask), plain_attention(q, k, v, mask))
    torch.testing.assert_close(attention(q, k, v), plain_attention(q, k, v, torch.ones_like(mask)))
    if queries == 5:
        triangle = torch.ones(5, 5, dtype=torch.bool).tril()
        torch.testing.assert_close(attention(q, k, v, causal=True), plain_attention(q, k, v, triangle))


def test_one_query_gives_the_same_as_a_row_of_many() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(attention(q[:, :, -1:], k, v), attention(q, k, v, causal=True)[:, :, -1:])


def test_attention_in_bfloat16_is_float32_attention_rounded() -> None:
    q, k, v = (torch.randn(2, 2, 6, 8).bfloat16() for _ in range(3))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True).float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("masked", ["causal", "mask", "neither"])
def test_attention_by_products_has_the_gradient_of_its_definition(masked: str) -> None:
    """Where a processor has no bfloat16 instructions `attention` takes another way, so it is called directly."""
    q, k, v = (torch.randn(3, 4, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    everything = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    drawn = torch.rand(3, 1, 5, 5) < 0.6
    drawn[..., 0] = True
    mask = {"causal": torch.ones(5, 5, dtype=torch.bool).tril(), "mask": drawn, "neither": None}[masked]
    y = apply(AttentionByProducts, q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask)
    expected = plain_attention(q, k, v, everything if mask is None else mask)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((each * weight).sum(), (q, k, v)) for each in (y, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(3, 4, 2, 5, 5), (3, 4, 1, 5, 7), (0, 2, 2, 5, 5), (2, 2, 2, 600, 600)])
def test_attention_in_bfloat16_errs_by_its_rounding_whatever_the_shape(shape: tuple[int, ...]) -> None:
    """Rows none and some, grouped heads, more keys than queries, and beyond what is made whole."""
    rows, heads, groups, queries, keys = shape
    q = 2 * torch.randn(rows, heads, queries, 8)
    k, v = 2 * torch.randn(rows, groups, keys, 8), torch.randn(rows, groups, keys, 8)
    rounded = [x.bfloat16() for x in (q, k, v)]
    exact = attention(*(x.float() for x in rounded), causal=True)
    torch.testing.assert_close(attention(*rounded, causal=True).float(), exact, rtol=0.05, atol=0.15)


def test_a_row_is_attended_to_alike_in_batches_of_every_size() -> None:
    q, k, v = (torch.randn(70, 4, 256, 8).bfloat16() for _ in range(3))
    together = attention(q, k, v, causal=True)
    alone = attention(q[:2], k[:2], v[:2], causal=True)
    assert torch.equal(together[:2], alone)
