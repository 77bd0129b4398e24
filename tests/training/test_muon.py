"""Muon against torch.optim.Muon, and its orthogonalisation against the singular value decomposition."""

import pytest
import torch
from torch import nn

from unmask.training.muon import Muon, orthogonalize

SHAPES = [(16, 16), (24, 16), (16, 24), (16, 16)]


def matrices(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(SHAPES)}


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 8), (2, 8, 12)])
def test_orthogonalisation_is_the_quintic_of_the_singular_values(shape: tuple[int, ...]) -> None:
    """X = UΣVᵀ becomes U p(p(p(p(Σ/‖X‖)))) Vᵀ with p(s) = 3.4445 s − 4.775 s³ + 2.0315 s⁵."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(4):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonalize(x), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(orthogonalize(x.float()), expected.float(), atol=1e-4, rtol=0)


def test_a_matrix_is_orthogonalised_the_same_alone_and_in_a_batch() -> None:
    x = torch.randn((3, 8, 12), generator=torch.Generator().manual_seed(2))
    batch = orthogonalize(x * torch.tensor([1.0, 1e3, 1e-3])[:, None, None])
    for i in range(3):
        torch.testing.assert_close(batch[i], orthogonalize(x[i : i + 1])[0], atol=1e-5, rtol=0)


def test_a_zero_gradient_moves_nothing() -> None:
    zeros = orthogonalize(torch.zeros(2, 4, 4))
    assert torch.equal(zeros, torch.zeros(2, 4, 4))


def torch_muon(steps: int, rates: tuple[float, ...]) -> dict[str, nn.Parameter]:
    theirs = matrices(0)
    optimizer = torch.optim.Muon(theirs.values(), lr=1.0, weight_decay=0.1, momentum=0.95, ns_steps=4)
    for step in range(steps):
        for name, gradient in matrices(step + 1).items():
            theirs[name].grad = gradient.detach()
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    return theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_torch_optim_muon_up_to_the_rounding_of_bfloat16(dtype: torch.dtype) -> None:
    """Square, tall and wide matrices, momentum, decay, a changing rate. torch's own products are in bfloat16.

    A step moves a weight by about lr/√16 ≈ 0.01; 12 steps with an error of 1 % each stay within 0.002.
    """
    rates = tuple(0.04 * (1 - step / 24) for step in range(12))
    theirs = torch_muon(12, rates)
    ours = matrices(0)
    optimizer = Muon(ours, dict.fromkeys(ours, 0.04), momentum=0.95, weight_decay=0.1, dtype=dtype)
    for step, rate in enumerate(rates):
        for name, gradient in matrices(step + 1).items():
            ours[name].grad = gradient.detach()
        optimizer.step(rate / 0.04)
    for name, matrix in ours.items():
        moved = (theirs[name] - matrices(0)[name]).abs().mean()
        torch.testing.assert_close(matrix, theirs[name], atol=2e-3, rtol=0)
        assert (matrix - theirs[name]).abs().mean() < 0.01 * moved, name


def test_rates_are_per_matrix_and_one_without_gradient_stays() -> None:
    ours, before = matrices(0), matrices(0)
    optimizer = Muon(ours, {"0": 0.1, "1": 0.1, "2": 0.1, "3": 0.2}, 0.95, 0.0, torch.float32)
    shared = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    ours["0"].grad = ours["3"].grad = shared
    optimizer.step(0.5)
    torch.testing.assert_close(2 * (ours["0"] - before["0"]), ours["3"] - before["3"])
    assert torch.equal(ours["1"], before["1"])
