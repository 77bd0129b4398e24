"""One optimizer for every stage: Muon or AdamW for the matrices inside layers, AdamW for all else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unmask.training.adamw import AdamW
from unmask.training.machine import compute_dtype
from unmask.training.muon import Muon
from unmask.training.shard import shard, whole


@dataclass(frozen=True)
class OptimizerSettings:
    """`lr` is AdamW's rate, `matrix_lr` Muon's (None: AdamW takes the matrices too, at `lr`)."""

    lr: float
    matrix_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95


class Optimizer:
    """Trains every parameter of `model` that requires a gradient, each in exactly one group, tied ones once.

    Weights that are updated (the masters) are float32, or what `dtype` is if that is wider. For dtype
    bfloat16 the model itself holds bfloat16 copies: they make the products, their gradients are added up in
    float32 across micro-batches, and every step rounds the masters into them again. `restore` ends that.
    With `sharded` the model is split over all ranks (see shard.py): masters, gradients and state are DTensors.

    Weight decay acts on the matrices inside layers only: not on norms, biases, embeddings, heads.
    `scale_of(name)` multiplies a parameter's rate, for models whose parts learn at different rates.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        dtype: torch.dtype = torch.float32,
        scale_of: Callable[[str], float] = lambda name: 1.0,
        sharded: bool = False,
    ) -> None:
        self.settings = settings
        self.precision = str(dtype).removeprefix("torch.")
        self.masters: dict[str, Tensor] = {}
        self._copies: dict[str, nn.Parameter] = {}
        self._hooks: list[RemovableHandle] = []
        self._shards = shard(model, dtype) if sharded else None
        for name, parameter in model.named_parameters():  # names a tied parameter once
            if parameter.requires_grad:
                self._adopt(name, parameter, dtype)
        self.scales = {name: scale_of(name) for name in self.masters}

        matrices = {name: master for name, master in self.masters.items() if _inside_layers(name, master)}
        by_muon = {} if settings.matrix_lr is None else matrices
        matrix_lr = settings.matrix_lr or 0.0
        self.muon = Muon(
            by_muon,
            {name: matrix_lr * self.scales[name] for name in by_muon},
            settings.momentum,
            settings.weight_decay,
            _product_dtype(by_muon),
        )
        self.adamw = AdamW(
            {name: master for name, master in self.masters.items() if name not in by_muon},
            {name: settings.lr * scale for name, scale in self.scales.items()},
            {name: settings.weight_decay if name in matrices else 0.0 for name in self.masters},
            settings.betas,
            settings.eps,
        )

    @property
    def sharded(self) -> bool:
        return self._shards is not None

    def expect(self, last: bool) -> None:
        """Say whether the next backward is a step's last: only then sharded gradients are added up over the ranks."""
        if self._shards is not None:
            self._shards.set_requires_gradient_sync(last)

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to a joint Euclidean norm of `max_norm`; return the norm before that."""
        grads = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = whole(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
        return norm.item()

    def step(self, lr_scale: float) -> None:
        """One update at lr_scale times the rates of the settings."""
        self.adamw.step(lr_scale)
        self.muon.step(lr_scale)
        self._round_into_copies()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: masters and state. Not copied."""
        parts = {
            "master": {name: master.detach() for name, master in self.masters.items()},
            "muon": self.muon.tensors(),
            "adamw": self.adamw.tensors(),
        }
        return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    @torch.no_grad()
    def load(self, read_into: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Go back to what `tensors()` was, for a model of the same parameters: `read_into` sets them."""
        read_into(self.tensors())
        self._round_into_copies()

    def restore(self, model: nn.Module) -> None:
        """Give the model its masters back, for saving it and measuring it. Training is over then."""
        for name, parameter in model.named_parameters():
            if name in self._copies:
                parameter.data = self.masters[name].data
        for hook in self._hooks:
            hook.remove()

    def _adopt(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        if self.sharded:
            self.masters[name] = parameter
            return
        if dtype.itemsize >= 4:
            parameter.data = parameter.data.to(dtype)
            self.masters[name] = parameter
            return
        self.masters[name] = master = nn.Parameter(parameter.detach().float())
        self._copies[name] = parameter
        parameter.data = parameter.data.to(dtype, copy=True)
        register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
        self._hooks.append(register(partial(_hand_over, master)))

    @torch.no_grad()
    def _round_into_copies(self) -> None:
        for name, parameter in self._copies.items():
            parameter.copy_(self.masters[name])


def _hand_over(master: Tensor, parameter: Tensor) -> None:
    """Add a copy's gradient to its master's in float32: a sum of bfloat16 would lose small micro-batches."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None


def _inside_layers(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "layers" in name.split(".")


def _product_dtype(matrices: Mapping[str, Tensor]) -> torch.dtype:
    """What Muon multiplies in, on the device where its matrices are; float64 stays."""
    first = next(iter(matrices.values()), None)
    if first is None or first.dtype == torch.float64:
        return torch.float64
    return compute_dtype(first.device)
