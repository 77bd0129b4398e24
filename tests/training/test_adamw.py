"""AdamW against torch.optim.AdamW."""

import torch
from torch import nn

from unmask.training.adamw import AdamW


def parameters(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(4, 3, generator=generator)) for name in "abc"}


def test_it_is_torch_optim_adamw_with_a_rate_and_a_decay_for_each_parameter() -> None:
    rates, decays = {"a": 0.1, "b": 0.1, "c": 0.03}, {"a": 0.0, "b": 0.2, "c": 0.2}
    ours, theirs = parameters(0), parameters(0)
    optimizer = AdamW(ours, rates, decays, betas=(0.9, 0.95), eps=1e-8)
    reference = torch.optim.AdamW(
        [{"params": [theirs[name]], "lr": rates[name], "weight_decay": decays[name]} for name in theirs],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    for step in range(8):
        for name, gradient in parameters(step + 1).items():
            absent = (
                step == 3 and name == "b"
            )  # a step without a gradient is no step: the bias correction waits
            ours[name].grad = theirs[name].grad = None if absent else gradient.detach()
        for group in reference.param_groups:
            group["lr"] /= 1.5
        optimizer.step(1.5 ** -(step + 1))
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=0)
