"""The optimizer: who updates what, and in which precision."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import RATES, Net, Toy

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.training.loop import train_step
from unmask.training.optimizer import Optimizer, OptimizerSettings

ADAMW = replace(RATES, matrix_lr=None)


def decoder(tied: bool = True) -> Decoder:
    config = replace(ModelConfig.from_depth(1, vocabulary=64, context=16), tie_word_embeddings=tied)
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def give_gradients(optimizer: Optimizer, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(7)
    for master in optimizer.masters.values():
        noise = torch.randn(master.shape, generator=generator)
        master.grad = noise if value is None else torch.full_like(master, value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [RATES, ADAMW], ids=["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group_and_a_tied_one_counts_once(
    tied: bool, settings: OptimizerSettings
) -> None:
    model = decoder(tied)
    optimizer = Optimizer(model, settings)
    groups = [*optimizer.muon.matrices.values(), *optimizer.adamw.parameters.values()]
    assert len(groups) == len({id(p) for p in groups})
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in groups) == sum(p.numel() for p in model.parameters())


def test_muon_has_the_matrices_inside_layers_and_only_those() -> None:
    optimizer = Optimizer(decoder(tied=False), RATES)
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in optimizer.muon.matrices} == set(projections)
    others = {name.split(".")[-2] for name in optimizer.adamw.parameters}
    assert others == {
        "embed_tokens",
        "lm_head",
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "q_norm",
        "k_norm",
    }


@pytest.mark.parametrize("settings", [RATES, ADAMW], ids=["muon", "adamw"])
def test_decay_acts_on_matrices_inside_layers_only(settings: OptimizerSettings) -> None:
    """With gradients of zero nothing else moves a weight; biases, norms and embeddings stay."""
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = Optimizer(net, settings)
    give_gradients(optimizer, 0.0)
    optimizer.step(0.5)
    lr = 0.5 * (settings.matrix_lr or settings.lr)
    decayed = set()
    for name, p in net.named_parameters():
        if not torch.equal(p, before[name]):
            torch.testing.assert_close(p, before[name] * (1 - lr * settings.weight_decay))
            decayed.add(name)
    assert decayed == {f"layers.{i}.{part}.weight" for i in range(2) for part in ("up", "down")}


@pytest.mark.parametrize("settings", [RATES, ADAMW], ids=["muon", "adamw"])
def test_parts_of_a_model_learn_at_their_own_rates(settings: OptimizerSettings) -> None:
    """Policy and critic of equal weights and gradients: the critic moves three times as far."""
    both = nn.ModuleDict({"policy": Net(), "critic": Net()})
    settings = replace(settings, weight_decay=0.0)
    optimizer = Optimizer(both, settings, scale_of=lambda name: 3.0 if name.startswith("critic.") else 1.0)
    assert len(optimizer.masters) == 2 * len(dict(Net().named_parameters()))
    for part in ("policy", "critic"):
        generator = torch.Generator().manual_seed(7)
        for p in both[part].parameters():
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step(0.1)
    starts = dict(Net().named_parameters())
    for name, p in both["policy"].named_parameters():
        critic = both["critic"].get_parameter(name)
        torch.testing.assert_close(critic - starts[name], 3 * (p - starts[name]), atol=1e-5, rtol=1e-3)


def test_clip_returns_the_joint_norm_and_scales_all_gradients_to_the_limit() -> None:
    optimizer = Optimizer(Net(), RATES)
    give_gradients(optimizer)
    before = {
        name: master.grad.clone() for name, master in optimizer.masters.items() if master.grad is not None
    }
    norm = torch.cat([grad.flatten() for grad in before.values()]).norm().item()
    assert optimizer.clip(2.0) == pytest.approx(norm)
    for name, master in optimizer.masters.items():
        assert master.grad is not None
        torch.testing.assert_close(master.grad, before[name] * 2.0 / norm)
    assert optimizer.clip(2.1) == pytest.approx(2.0)
    assert optimizer.clip(1e9) == pytest.approx(2.0)  # and below the limit nothing is scaled


def test_its_tensors_are_all_that_the_next_step_depends_on() -> None:
    a, b = Optimizer(Net(), RATES), Optimizer(Net(), RATES)
    for optimizer in (a, b):
        give_gradients(optimizer)
    a.step(1.0)
    b.load(lambda into: [tensor.copy_(a.tensors()[name]) for name, tensor in into.items()])
    for optimizer in (a, b):
        optimizer.step(0.7)
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


# bfloat16


def test_with_bfloat16_the_model_holds_rounded_copies_and_gets_its_masters_back() -> None:
    net, exact = Net(), dict(Net().named_parameters())
    optimizer = Optimizer(net, RATES, torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert all(torch.equal(master, exact[name]) for name, master in optimizer.masters.items())
    for step in range(3):
        train_step(Toy(net, micro=4), optimizer, step, 1.0, 1.0)
        for name, p in net.named_parameters():
            assert torch.equal(p, optimizer.masters[name].bfloat16()), name
    optimizer.restore(net)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(torch.equal(p, optimizer.masters[name]) for name, p in net.named_parameters())
    assert net.head.weight is net.embed.weight


def test_steps_too_small_for_bfloat16_still_add_up() -> None:
    """A rate of 1e-5 moves no bfloat16 weight in one step; a hundred of them in float32 do."""
    net = Net()
    optimizer = Optimizer(net, OptimizerSettings(lr=1e-5), torch.bfloat16)
    for _ in range(100):
        give_gradients(optimizer, 1.0)
        optimizer.step(1.0)
    moved = Net().embed.weight - optimizer.masters["embed.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), atol=1e-5, rtol=0)


def test_gradients_of_bfloat16_copies_are_added_up_in_float32() -> None:
    """1 + 512 × 2⁻⁹ is 2; a sum kept in bfloat16 would never leave 1."""
    net = Net()
    optimizer = Optimizer(net, RATES, torch.bfloat16)
    for factor in [1.0] + [2**-9] * 512:
        torch.autograd.backward((net.embed.weight * factor).sum())
    grad = optimizer.masters["embed.weight"].grad
    assert grad is not None
    assert torch.equal(grad, torch.full_like(grad, 2.0))
    assert net.embed.weight.grad is None


def test_frozen_parameters_are_left_alone() -> None:
    net = Net()
    net.embed.weight.requires_grad_(False)
    assert "embed.weight" not in Optimizer(net, RATES).masters
