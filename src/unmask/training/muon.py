"""Muon: momentum, made orthogonal, for the matrices inside layers."""

from collections.abc import Mapping, Sequence

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
        alike: dict[tuple[torch.Size, float], list[str]] = {}
        for name, matrix in self.matrices.items():
            if matrix.grad is not None:
                alike.setdefault((matrix.shape, self._rates[name]), []).append(name)
        for ((rows, cols), rate), names in alike.items():
            matrices = [self.matrices[name] for name in names]
            ahead_NRC = torch.stack(self._advance(names)).to(self._dtype)
            directions = dealt_out(orthogonalize, ahead_NRC, matrices[0])
            scale, lr = max(1.0, rows / cols) ** 0.5, rate * lr_scale
            matrices = [local(matrix) for matrix in matrices]
            torch._foreach_mul_(matrices, 1 - lr * self._weight_decay)
            torch._foreach_add_(matrices, directions.unbind(), alpha=-lr * scale)

    def _advance(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Move the momenta towards the gradients; return Nesterov's look ahead of each, of its rows that are here."""
        grads = [local(grad) for name in names if (grad := self.matrices[name].grad) is not None]
        momenta = [local(self._momenta[name]) for name in names]
        torch._foreach_lerp_(momenta, grads, 1 - self._momentum)
        return torch._foreach_lerp(grads, momenta, self._momentum)
