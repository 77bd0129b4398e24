"""AdamW, for everything that is not a matrix inside a layer (and for those too, where Muon is not wanted)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from unmask.training.shard import local


class AdamW:
    """Loshchilov and Hutter, arXiv 1711.05101, by torch's fused kernel: decoupled decay, bias correction.

    The state is held here and not in a torch.optim.AdamW, whose construction loads the compiler: seconds at
    every start.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rates: Mapping[str, float],
        decays: Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.parameters = dict(parameters)
        self._rates, self._decays = dict(rates), dict(decays)
        self._betas, self._eps = betas, eps
        self._means = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._steps = {name: torch.zeros((), device=p.device) for name, p in parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name. Not copied."""
        named = {"mean": self._means, "square": self._squares, "steps": self._steps}
        return {f"{kind}/{name}": t for kind, tensors in named.items() for name, t in tensors.items()}

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """One update with rates[name]·lr_scale. A parameter without a gradient is left as it is."""
        alike: dict[tuple[float, float], list[str]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                alike.setdefault((self._rates[name], self._decays[name]), []).append(name)
        for (rate, decay), names in alike.items():
            adamw(
                [local(self.parameters[name]) for name in names],
                [local(grad) for name in names if (grad := self.parameters[name].grad) is not None],
                [local(self._means[name]) for name in names],
                [local(self._squares[name]) for name in names],
                [],
                [self._steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=rate * lr_scale,
                weight_decay=decay,
                eps=self._eps,
                maximize=False,
            )
