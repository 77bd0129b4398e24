"""Chunked losses against float64 arithmetic on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.model import loss as loss_module
from unmask.model import precision
from unmask.model.loss import cross_entropy_sum, token_log_probs


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (37,), generator=generator)
    weights = torch.rand(37, generator=generator) * (torch.rand(37, generator=generator) < 0.7)
    return hidden, head, targets, weights


def exact(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same inputs in float64, and every row's cross-entropy."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    return hidden, head, F.cross_entropy(hidden @ head.T, targets, reduction="none")


@pytest.mark.parametrize("chunk", [1, 8, 37, 1024])
def test_cross_entropy_sum_and_its_gradients_equal_float64(chunk: int) -> None:
    hidden, head, targets, _ = inputs()
    loss = cross_entropy_sum(hidden, head, targets, chunk)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    (loss * 0.3).backward()
    hidden64, head64, rows = exact(hidden, head, targets)
    expected = rows.sum()
    (expected * 0.3).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.grad.double(), head64.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [5, 1024])
def test_token_log_probs_and_their_gradients_equal_float64(chunk: int) -> None:
    hidden, head, targets, weights = inputs()
    log_probs = token_log_probs(hidden, head, targets, chunk)
    assert (log_probs.dtype, log_probs.shape) == (torch.float32, (37,))
    (log_probs * weights).sum().backward()
    hidden64, head64, _ = exact(hidden, head, targets)
    expected = -F.cross_entropy(hidden64 @ head64.T, targets, reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.grad.double(), head64.grad, rtol=1e-4, atol=1e-6)


def test_the_gradients_pass_a_numerical_check() -> None:
    hidden, head, targets, _ = inputs(torch.float64)
    small = hidden[:5, :4].detach().requires_grad_(), head[:6, :4].detach().requires_grad_()
    targets = targets[:5] % 6
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, targets, 2), small)
    assert torch.autograd.gradcheck(lambda h, w: token_log_probs(h, w, targets, 2), small)


def test_a_tied_head_receives_the_gradients_of_both_its_uses() -> None:
    _, head, targets, _ = inputs()
    cross_entropy_sum(F.embedding(targets.roll(1), head), head, targets).backward()
    head64 = head.detach().double().requires_grad_()
    F.cross_entropy(head64[targets.roll(1)] @ head64.T, targets, reduction="sum").backward()
    torch.testing.assert_close(head.grad.double(), head64.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_other_keeps_its_own(frozen: str) -> None:
    hidden, head, targets, _ = inputs()
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    for loss in (cross_entropy_sum(hidden, head, targets), -token_log_probs(hidden, head, targets).sum()):
        hidden.grad = head.grad = None
        loss.backward()
        hidden64, head64, rows = exact(hidden, head, targets)
        rows.sum().backward()
        free, free64 = (head, head64) if frozen == "hidden" else (hidden, hidden64)
        torch.testing.assert_close(free.grad.double(), free64.grad, rtol=1e-4, atol=1e-6)
        assert (hidden if frozen == "hidden" else head).grad is None


def test_no_rows_give_a_zero_loss_and_zero_gradients() -> None:
    hidden, head, targets, _ = inputs()
    no_rows = cross_entropy_sum(hidden[:0], head, targets[:0])
    assert no_rows == 0
    no_rows.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.grad, torch.zeros_like(head))
    assert token_log_probs(hidden[:0], head, targets[:0]).shape == (0,)


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_hidden_states_give_a_float32_loss_and_bfloat16_gradients(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "processor_has_bfloat16", lambda: native)
    hidden, head, targets, _ = inputs(torch.bfloat16)
    loss = cross_entropy_sum(hidden, head, targets)
    log_probs = token_log_probs(hidden, head, targets)
    assert loss.dtype is log_probs.dtype is torch.float32
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype is torch.bfloat16
    hidden64, _, rows = exact(hidden, head, targets)
    rows.sum().backward()
    torch.testing.assert_close(loss.double(), rows.sum(), rtol=5e-3, atol=0)
    torch.testing.assert_close(-log_probs.double(), rows, rtol=0.02, atol=0.1)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=0.05, atol=0.05)


def test_the_logits_of_a_chunk_are_bounded_whatever_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, *_ = inputs()
    assert list(loss_module.chunks(hidden, head, 20)) == [slice(0, 20), slice(20, 37)]
    assert list(loss_module.chunks(hidden, head, None)) == [slice(0, 37)]
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 2 * len(head))
    assert list(loss_module.chunks(hidden[:3], head, None)) == [slice(0, 2), slice(2, 3)]
    assert loss_module.rows_at_once(1000, cpu=True) == 1
    assert loss_module.rows_at_once(50304, cpu=False) == 5336


def test_the_heads_gradient_adds_up_chunks_in_float32() -> None:
    """64 chunks, each rounded as a product is: a sum in bfloat16 would lose four times as much."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator).bfloat16()
    head = torch.randn(32, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(32, (512,), generator=generator)
    (found,) = torch.autograd.grad(cross_entropy_sum(hidden, head, targets, chunk=8), head)
    exact_head = head.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(hidden.double() @ exact_head.T, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(exact, exact_head)
    assert (found.double() - wanted).norm() / wanted.norm() < 0.004


def test_what_a_loss_is_divided_by_is_not_rounded_to_bfloat16() -> None:
    """1/3,000 in bfloat16 is 0.14 % too large: in every gradient alike, and so in the norm that is clipped."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator).bfloat16().requires_grad_()
    head = torch.randn(32, 16, generator=generator).bfloat16().requires_grad_()
    loss = cross_entropy_sum(hidden, head, torch.randint(32, (512,), generator=generator))
    whole = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    divided = torch.autograd.grad(loss / 3000, (hidden, head))
    for one, other in zip(whole, divided, strict=True):
        assert other.dtype is torch.bfloat16
        assert abs((3000 * other.double() / one.double()).mean().item() - 1) < 4e-4
