"""The row-wise functions against their plain definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.model import attention as attention_module
from unmask.model import kernels, native
from unmask.model.attention import AttentionInBlocks, attention, packed_mask
from unmask.model.config import ModelConfig
from unmask.model.decoder import rotary_frequencies
from unmask.model.kernels import apply, rms_norm, rotate
from unmask.model.precision import processor_has_bfloat16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


needs_compiler = pytest.mark.skipif(native.built().library is None, reason="no g++ on this machine")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_embeddings_gradient_is_the_sum_over_all_its_tokens_rounded_once(dtype: torch.dtype) -> None:
    """Token 3 has a thousand gradients of about 1: a running sum in bfloat16 would stop at 256."""
    ids = torch.full((4, 300), 3).index_fill_(1, torch.arange(0, 300, 6), 5)
    weight = torch.randn(8, 16).to(dtype).requires_grad_()
    grad = (1 + torch.rand(4, 300, 16)).to(dtype)
    rows = kernels.embedding(ids, weight)
    assert torch.equal(rows, weight[ids])
    (found,) = torch.autograd.grad(rows, weight, grad)
    wanted = torch.zeros(8, 16, dtype=torch.float64)
    wanted.index_add_(0, ids.flatten(), grad.double().flatten(0, 1))
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=0)


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


@needs_compiler
@pytest.mark.parametrize("masked", ["causal", "mask", "both", "neither"])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (300, 300), (130, 140), (260, 300), (1100, 1100)])
def test_attention_in_blocks_has_the_gradient_of_its_definition(masked: str, queries: int, keys: int) -> None:
    """Of one block that is kept, of several, and with a short last one. In bfloat16 it is used; in float32 its
    arithmetic can be told from its rounding."""
    q = torch.randn(2, 2, queries, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, keys, 8, requires_grad=True) for _ in range(2))
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    drawn = torch.rand(2, 1, queries, keys) < 0.6
    drawn[..., 0] = True
    mask = {"causal": None, "mask": drawn, "both": drawn & triangle, "neither": None}[masked]
    causal = masked in ("causal", "both")
    y = apply(AttentionInBlocks, q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask, causal)
    whole = torch.ones_like(triangle) if mask is None else mask
    expected = plain_attention(q, k, v, whole & triangle if causal else whole)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((each * weight).sum(), (q, k, v)) for each in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "kept"), [(256, True), (257, False)])
def test_attention_of_long_rows_keeps_no_probabilities_for_backward(tokens: int, kept: bool) -> None:
    held: list[int] = []
    q, k, v = (torch.randn(1, 1, tokens, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        apply(AttentionInBlocks, q, k, v, None, True)
    assert (max(held) >= tokens**2) is kept


@pytest.mark.parametrize("masked", [False, True])
def test_attention_one_head_after_the_other_is_the_same_bits(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is done where the scores of all heads of a batch would be too many at once."""
    q, k, v = (torch.randn(2, 3, 300, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = packed_mask(300, None, torch.randint(2, (2, 300)), q.device) if masked else None
    grad, found, most = torch.randn_like(q), [], []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: most.append(len(a)) or bmm(a, b))
    for at_once in (2**25, 0):
        monkeypatch.setattr(attention_module, "SCORES_AT_ONCE", at_once)
        most.clear()
        y = attention(q, k, v, mask, causal=True)
        found.append((y, *torch.autograd.grad(y, (q, k, v), grad), max(most)))
    *whole, rows_and_heads = found[0]
    *parts, rows_alone = found[1]
    assert (rows_and_heads, rows_alone) == (6, 2)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("first", [0, 3])
def test_a_blocks_queries_see_the_keys_before_it(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, grad = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    seen = torch.ones(3, 9, dtype=torch.bool).tril(first)
    wanted = (scores * 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "built", lambda: native.Built(None, ""))
        weights = kernels.attention_weights(scores.clone(), 1, None, first, 0.5)
        torch.testing.assert_close(weights, wanted)
        slope = 0.5 * wanted * (grad - (grad * wanted).sum(-1, keepdim=True))
        found = kernels.attention_weights_backward(grad.clone(), weights, first, 0.5)
        torch.testing.assert_close(found, slope)


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


def tables(tokens: int, size: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tokens)[None] + 3 * torch.arange(rows)[:, None]
    return kernels.rotary_tables(positions, 100.0 ** -(torch.arange(0, size, 2) / size))


# Each function with inputs that are differentiated, of shapes that fill no vector and of some that wake all threads.
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-3), [(5, 7, 33), (33,)]),
    "rms_norm, large": (lambda x, w: kernels.rms_norm(x, w, 1e-3), [(700, 96), (96,)]),
    "norm_rotate": (lambda x, w: kernels.norm_rotate(x, w, 1e-3, *tables(7, 10, 2)), [(2, 7, 3, 10), (10,)]),
    "norm_rotate, large": (
        lambda x, w: kernels.norm_rotate(x, w, 1e-3, *tables(40, 64)), [(8, 40, 4, 64), (64,)],
    ),
    "rotate alone": (lambda x: kernels.norm_rotate(x, None, 0.0, *tables(7, 10)), [(2, 7, 3, 10)]),
    "swiglu": (kernels.swiglu, [(3, 11), (3, 11)]),
    "swiglu, large": (kernels.swiglu, [(300, 111), (300, 111)]),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_compiled_kernels_and_their_gradients_equal_plain_pytorch(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, shapes = CASES[case]
    inputs = [torch.randn(shape).mul(3).to(dtype).requires_grad_() for shape in shapes]
    compiled = function(*inputs)
    weight = torch.randn(compiled.shape).to(dtype)
    found = torch.autograd.grad(compiled, inputs, weight)
    monkeypatch.setattr(native, "built", lambda: native.Built(None, ""))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    plain = function(*exact)
    assert compiled.dtype is dtype and compiled.shape == plain.shape
    for ours, wanted in zip(
        (compiled, *found), (plain, *torch.autograd.grad(plain, exact, weight.double())), strict=True
    ):
        error = (ours.double() - wanted).abs() / wanted.abs().clamp(min=wanted.abs().mean())
        assert error.max() < (2e-6 if dtype is torch.float32 else 2**-8)
    plainly = function(*(x.detach() for x in inputs)).double()  # and so does the way without a compiler
    assert ((plainly - plain).abs() / plain.abs().clamp(min=plain.abs().mean())).max() < (
        2e-6 if dtype is torch.float32 else 2**-5
    )


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 17), (40, 1030)])
def test_compiled_cross_entropy_and_its_slope_equal_plain_pytorch(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (20 * torch.randn(shape)).to(dtype)
    logits[0] += 1000  # large logits, whose differences are not
    targets = torch.randint(shape[1], shape[:1])
    losses, slope = kernels.cross_entropy(logits.clone(), targets, slope=True)
    monkeypatch.setattr(native, "built", lambda: native.Built(None, ""))
    wanted, wanted_slope = kernels.cross_entropy(logits.double(), targets, slope=True)
    assert slope is not None and wanted_slope is not None
    assert losses.dtype is torch.float32 and slope.dtype is dtype
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        slope.double(), wanted_slope, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-7
    )


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_every_compiled_kernel(bad: float) -> None:
    """The loop skips a step whose loss is not finite: no kernel may make a number of it."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(4, 40, dtype=dtype)
        x[1, 5] = bad
        assert not rms_norm(x, torch.ones(40, dtype=dtype), 1e-6)[1].isfinite().all()
        assert not kernels.swiglu(x, x)[1].isfinite().all()
        assert not kernels.norm_rotate(x[:, None, None], None, 0.0, *tables(1, 40, 4))[1].isfinite().all()
        losses, _ = kernels.cross_entropy(x.clone(), torch.zeros(4, dtype=torch.int64), slope=False)
        assert losses.isfinite().tolist() == [True, False, True, True]
        q = x[None, None]
        if dtype is torch.bfloat16:
            assert not attention(q, q, q)[0, 0].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("case", [case for case in CASES if "large" in case])
def test_compiled_kernels_give_the_same_bits_whatever_the_number_of_threads(case: str) -> None:
    function, shapes = CASES[case]
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            y = function(*inputs)
            found.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    for dtype in (torch.float32, torch.float64):  # compiled and plain
        for target in (-1, 7):
            with pytest.raises(IndexError, match="7 columns"):
                kernels.cross_entropy(torch.zeros(1, 7, dtype=dtype), torch.tensor([target]), slope=True)
        with pytest.raises(IndexError, match="1 targets for 3 rows"):
            kernels.cross_entropy(torch.zeros(3, 7, dtype=dtype), torch.tensor([1]), slope=True)


@needs_compiler
def test_extreme_numbers_give_what_plain_pytorch_gives() -> None:
    x = torch.tensor([-2e9, 2e9, -3e38, 3e38, torch.inf, -torch.inf, torch.nan, -90.0, 90.0, -104.0, 0.5] * 3)
    torch.testing.assert_close(
        kernels.swiglu(x, torch.ones_like(x)), F.silu(x), equal_nan=True, rtol=1e-6, atol=0
    )
    for low in (-torch.inf, -3.4e38, -200.0, -95.0):
        logits = torch.tensor([[0.0, low, 1.0] * 7])
        losses, _ = kernels.cross_entropy(logits.clone(), torch.tensor([0]), slope=False)
        torch.testing.assert_close(losses, F.cross_entropy(logits, torch.tensor([0]), reduction="none"))
        lost, _ = kernels.cross_entropy(logits.clone(), torch.tensor([1]), slope=False)
        torch.testing.assert_close(lost, F.cross_entropy(logits, torch.tensor([1]), reduction="none"))


@needs_compiler
def test_compiled_kernels_round_to_bfloat16_as_pytorch_does() -> None:
    """To the nearest, ties to even, and NaN of every kind stays NaN."""
    exact = torch.cat([torch.randn(4000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 0.0, -0.0])])
    odd = exact[None, None, None].repeat(1, 1, 1, 2)  # cos · x in float32, then rounded
    turned = kernels.norm_rotate(
        torch.ones(1, 1, 1, 8010).bfloat16(), None, 0.0, odd.contiguous(), torch.zeros(1, 1, 1, 8010)
    )
    assert torch.equal(turned.flatten()[:4005], exact.bfloat16())


@needs_compiler
def test_default_dtype_and_strides_and_shapes_that_do_not_fit_change_nothing() -> None:
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    expected = [rms_norm(x, w, 1e-6), *torch.autograd.grad(rms_norm(x, w, 1e-6).sum(), (x, w))]
    try:
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            y = rms_norm(x, w, 1e-6)
            found = [y, *torch.autograd.grad(y.sum(), (x, w))]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
    strided = torch.randn(2, 3, 7, 10).transpose(1, 2)
    cos, sin = tables(7, 10)
    torch.testing.assert_close(
        kernels.norm_rotate(strided, None, 0.0, cos, sin), rotate(strided, cos, sin).transpose(1, 2)
    )
    gate, up = torch.randn(3, 4), torch.randn(4)
    torch.testing.assert_close(kernels.swiglu(gate, up), F.silu(gate) * up)
    with pytest.raises(RuntimeError):
        kernels.norm_rotate(torch.randn(1, 7, 2, 10), None, 0.0, *tables(5, 10))
    with pytest.raises(RuntimeError):
        kernels.norm_rotate(torch.randn(1, 7, 2, 10), torch.ones(3), 1e-6, *tables(7, 10))
    with pytest.raises(RuntimeError):
        rms_norm(torch.randn(4, 8), torch.ones(3), 1e-6)
    with pytest.raises(RuntimeError):
        attention(
            *(torch.randn(3, 2, 4, 8).bfloat16() for _ in range(3)), torch.ones(2, 1, 4, 4, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="strided"):
        native.call("swiglu", torch.float32, torch.randn(4, 4).t(), up, 16, torch.empty(4, 4))
    assert not native.takes(x.detach(), w.detach().double())
    assert not native.takes(torch.empty(2, device="meta"))


def test_a_mask_of_two_dimensions_is_one_for_all_rows_and_heads() -> None:
    q, k, v = (torch.randn(3, 2, 4, 8).bfloat16() for _ in range(3))
    triangle = torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, triangle), attention(q, k, v, causal=True))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_attention_weights_and_their_gradient_equal_their_definition(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "built", lambda: native.Built(None, ""))
    scores, grad = torch.randn(6, 5, 7), torch.randn(6, 5, 7)
    mask = torch.rand(3, 1, 5, 7) < 0.6
    mask[..., 0] = True
    exact = (scores.view(3, 2, 5, 7) * 0.3).requires_grad_()
    seen = mask & torch.ones(5, 7, dtype=torch.bool).tril()
    wanted = exact.masked_fill(~seen, -torch.inf).softmax(-1)
    (slope,) = torch.autograd.grad(wanted, exact, grad.view(3, 2, 5, 7))
    weights = kernels.attention_weights(scores.clone(), 3, mask, 0, 0.3)
    torch.testing.assert_close(weights, wanted.flatten(0, 1))
    found = kernels.attention_weights_backward(grad.clone(), weights, 0, 0.3)
    torch.testing.assert_close(found, 0.3 * slope.flatten(0, 1))
    assert kernels.attention_weights(scores[:0].clone(), 0, mask[:0], 0, 0.3).shape == (0, 5, 7)
    with pytest.raises(TypeError, match="bool is meant"):
        kernels.attention_weights(scores.clone(), 3, mask.float(), 0, 0.3)


def test_the_flags_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, wide in (("x86_64", True), ("aarch64", False)):
        monkeypatch.setattr(native.platform, "machine", lambda machine=machine: machine)
        assert ("-mprefer-vector-width=512" in native._flags()) is wide


@needs_compiler
def test_a_damaged_library_is_compiled_again_and_another_source_has_another_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.built.__wrapped__().library is not None
    [kept] = (tmp_path / "unmask").iterdir()
    whole = (kept / native.LIBRARY).read_bytes()
    for damaged in (whole[:6000], b""):
        (kept / native.LIBRARY).unlink()  # what is loaded stays mapped
        (kept / native.LIBRARY).write_bytes(damaged)
        assert native.built.__wrapped__().library is not None
        assert len((kept / native.LIBRARY).read_bytes()) == len(whole)
    (kept / "sha256").write_bytes(b"\xff\xfe")
    assert not native._whole(kept)
    assert native.built.__wrapped__().library is not None
    assert native._whole(kept)
    with monkeypatch.context() as other_user:
        other_user.setattr(native.os, "getuid", lambda: 12345)
        assert not native._whole(kept)
    key = native._key("12")
    assert native._key("13") != key
    monkeypatch.setattr(native, "_processor", lambda: "another")
    other = native._key("12")
    assert other != key
    source = tmp_path / "rowwise.cpp"
    source.write_text("// another")
    monkeypatch.setattr(native, "SOURCE", source)
    assert native._key("12") != other
    monkeypatch.setenv("XDG_CACHE_HOME", "here")  # relative: the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native._cache() == tmp_path / ".cache" / "unmask"


def test_without_a_compiler_plain_pytorch_does_the_work_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    built = native.built.__wrapped__()
    assert built.library is None and "no g++" in built.words
    monkeypatch.setattr(native, "built", lambda: built)
    q = torch.randn(2, 2, 6, 8)
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 0.03)):
        weights = kernels.attention_weights((q @ q.mT).flatten(0, 1).to(dtype), 2, None, 0, 0.5)
        exact = (
            (q @ q.mT * 0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        )
        torch.testing.assert_close(weights.view(2, 2, 6, 6).float(), exact, rtol=0, atol=error)
    went: list[str] = []
    through = AttentionInBlocks.forward

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        went.append("in blocks")
        return through(ctx, *inputs)

    monkeypatch.setattr(AttentionInBlocks, "forward", staticmethod(forward))
    if processor_has_bfloat16():
        attention(*(torch.randn(2, 2, 6, 8).bfloat16() for _ in range(3)), causal=True)
        assert went == ["in blocks"]  # SDPA takes twice as long
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'error: cannot do that' >&2\nexit 1\n")
    compiler.chmod(0o755)
    built = native.built.__wrapped__()
    assert built.library is None and "cannot do that" in built.words
