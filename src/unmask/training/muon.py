"""Muon: momentum, made orthogonal, for the matrices inside layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.training.shard import dealt_out, local

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at zero, so that small singular values rise fastest
_STEPS = 4


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """Each of the N matrices with its singular values pushed towards 1, computed in their dtype.

    Four Newton–Schulz steps X ← aX + (bA + cA²)X with A = XXᵀ. They do not converge (singular values above 0.01 of the
    Frobenius norm end between 0.7 and 1.2), which does not hurt training. A matrix of zeros stays one.
    """
    a, b, c = _QUINTIC
    wide = matrices_NRC.shape[1] <= matrices_NRC.shape[2]
    x = matrices_NRC if wide else matrices_NRC.mT  # XXᵀ is to be the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


class Muon:
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), as torch.optim.Muon computes it.

    Nesterov momentum as a running mean, decoupled weight decay, and Keller's scale rule: the update is
    multiplied by max(1, rows/cols)^0.5, so that a learning rate here is not one of the rule 0.2·max(rows,
    cols)^0.5. Deviations from torch's: four Newton–Schulz steps and not five (docs/decisions/muon.md), matrices of
    equal shape go through one batched product, and the products are in `dtype` (torch multiplies in bfloat16 always,
    which some CPUs do 50 times slower than float32). Of matrices that are sharded over ranks each makes some, whole.
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
            # One matrix after the other, not all at once: each stays in the processor's cache from line to line.
            ahead_NRC = torch.stack([self._advance(name).to(self._dtype) for name in names])
            directions = dealt_out(orthogonalize, ahead_NRC, self.matrices[names[0]])
            scale = max(1.0, rows / cols) ** 0.5
            for name, direction in zip(names, directions, strict=True):
                lr, matrix = self._rates[name] * lr_scale, local(self.matrices[name])
                if self._weight_decay:
                    matrix.mul_(1 - lr * self._weight_decay)
                matrix.add_(direction, alpha=-lr * scale)

    def _advance(self, name: str) -> Tensor:
        """Move the momentum towards the gradient; return Nesterov's look ahead, of the rows that are here."""
        grad, momentum = self.matrices[name].grad, local(self._momenta[name])
        assert grad is not None
        momentum.lerp_(local(grad), 1 - self._momentum)
        return local(grad).lerp(momentum, self._momentum)
