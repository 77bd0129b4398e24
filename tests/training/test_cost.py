"""What training is said to cost is what the usual convention counts, and near what a step holds."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.stages.ppo import ActorCritic
from unmask.training.cost import matrix_weights, parameters, training_bytes, training_flops


def decoder() -> Decoder:
    model = Decoder(ModelConfig.from_depth(2, vocabulary=128, context=32))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_flops_are_six_a_multiplied_weight_and_token_plus_attention() -> None:
    # width 64, hidden 160 (8/3 of 64 to a multiple of 32), 2 layers, head of 128 rows
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 160) + 128 * 64
    assert training_flops(decoder(), 10, 32) == 6 * 10 * (weights + 2 * 64 * 32)


def test_a_scorers_embedding_multiplies_nothing_and_ppo_trains_two_networks() -> None:
    policy = decoder()
    critic = Scorer.from_decoder(policy, torch.Generator().manual_seed(0))
    one, other = training_flops(policy, 10, 32), training_flops(critic, 10, 32)
    assert one - other == 6 * 10 * (128 * 64 - 64)  # the head of 128 rows against the one of a score
    both: nn.Module = ActorCritic(policy, critic)
    assert training_flops(both, 10, 32) == one + other


def test_weights_are_counted_from_the_sizes_alone() -> None:
    for model in (decoder(), Scorer.from_decoder(decoder(), torch.Generator().manual_seed(0))):
        assert parameters(model.config) == sum(p.numel() for p in model.parameters())
        inside = (p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
        assert matrix_weights(model.config) == sum(inside)


def test_memory_grows_with_the_tokens_of_a_micro_batch_and_muon_needs_less_of_it() -> None:
    config = ModelConfig.from_depth(6, vocabulary=4096, context=256)

    def planned(tokens: int, muon: bool = False) -> int:
        return training_bytes(config, torch.bfloat16, micro_tokens=tokens, length=256, muon=muon)

    assert planned(12288) - planned(4096) == 2 * (planned(8192) - planned(4096)) > 0
    assert planned(0) - planned(0, muon=True) == 4 * matrix_weights(config)


MEASURED = """
import torch
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.training import machine
from unmask.training.optimizer import Optimizer, OptimizerSettings
machine.keep_large_blocks()
cpu = torch.device("cpu")
torch.randn(256, 256) @ torch.randn(256, 256)
before = machine.peak_memory(cpu)
model = Decoder(ModelConfig.from_depth(6, vocabulary=4096, context=256))
model.init_weights(torch.Generator().manual_seed(0))
optimizer = Optimizer(model, OptimizerSettings(lr=1e-3), torch.float32)
ids = torch.randint(4096, (16, 257))
for _ in range(2):
    optimizer.zero_grad()
    cross_entropy_sum(model.hidden(ids[:, :-1]).flatten(0, 1), model.head, ids[:, 1:].flatten()).backward()
    optimizer.step(1.0)
print(machine.peak_memory(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured exactly on Linux alone")
def test_memory_is_near_what_a_step_takes() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    config = ModelConfig.from_depth(6, vocabulary=4096, context=256)
    planned = training_bytes(config, torch.float32, micro_tokens=4096, length=256, muon=False)
    assert 0.75 < planned / int(done.stdout) < 1.35
