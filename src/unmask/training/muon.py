"""Muon: momentum, made orthogonal, for the matrices inside layers."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at zero, so that small singular values rise fastest
_STEPS = 5


def orthogonalize(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of the N matrices with its singular values pushed towards 1, computed in `dtype`, returned in it.

    Five Newton–Schulz steps X ← aX + (bA + cA²)X with A = XXᵀ. They do not converge (singular values end
    between about 0.7 and 1.2), which does not hurt training. A matrix of zeros stays one.
    """
    a, b, c = _QUINTIC
    wide = matrices_NRC.shape[1] <= matrices_NRC.shape[2]
    x = matrices_NRC.to(dtype) if wide else matrices_NRC.mT.to(dtype)  # XXᵀ is to be the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


def _dealt_out(matrices_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of matrices whose rows are sharded over ranks: each rank gathers some of the N, and gives them back."""
    if not isinstance(matrices_NRC, DTensor):
        return orthogonalize(matrices_NRC, dtype)
    mesh, rows, matrices = matrices_NRC.device_mesh, matrices_NRC.placements, [Shard(0)]
    mine = cast("DTensor", matrices_NRC.to(dtype)).redistribute(placements=matrices).to_local()
    done = DTensor.from_local(
        orthogonalize(mine, dtype).contiguous(),
        mesh,
        matrices,
        shape=matrices_NRC.shape,
        stride=matrices_NRC.stride(),
    )
    return done.redistribute(placements=rows)


class Muon:
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), as torch.optim.Muon computes it.

    Nesterov momentum as a running mean, decoupled weight decay, and Keller's scale rule: the update is
    multiplied by max(1, rows/cols)^0.5, so that a learning rate here is not one of the rule 0.2·max(rows,
    cols)^0.5. Deviations from torch's: matrices of equal shape go through one batched product, and the
    products are in `dtype` (torch multiplies in bfloat16 always, which some CPUs do 50 times slower than
    float32). Of matrices that are sharded over ranks each rank makes some, whole.
    """

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        rates: Mapping[str, float],
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        self.matrices = dict(matrices)
        self._momenta = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
        self._rates = dict(rates)
        self._momentum, self._weight_decay, self._dtype = momentum, weight_decay, dtype

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name. Not copied."""
        return {f"momentum/{name}": momentum for name, momentum in self._momenta.items()}

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One update with rates[name]·lr_scale. A matrix without a gradient is left as it is."""
        same_shape: dict[torch.Size, list[str]] = {}
        for name, matrix in self.matrices.items():
            if matrix.grad is not None:
                same_shape.setdefault(matrix.shape, []).append(name)
        for (rows, cols), names in same_shape.items():
            directions = _dealt_out(torch.stack([self._advance(name) for name in names]), self._dtype)
            scale = max(1.0, rows / cols) ** 0.5
            for name, direction in zip(names, directions, strict=True):
                lr = self._rates[name] * lr_scale
                self.matrices[name].mul_(1 - lr * self._weight_decay).add_(direction, alpha=-lr * scale)

    def _advance(self, name: str) -> Tensor:
        """Move the momentum towards the gradient; return Nesterov's look ahead."""
        grad, momentum = self.matrices[name].grad, self._momenta[name]
        assert grad is not None
        momentum.lerp_(grad, 1 - self._momentum)
        return grad.lerp(momentum, self._momentum)
