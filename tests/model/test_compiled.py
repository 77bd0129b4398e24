"""Blocks and losses as they run on a GPU: whole graphs, few of them, the same numbers. Compiled here by `aot_eager`,
which makes graphs for forward and backward and runs them with PyTorch's own kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, decoder, token_ids
from torch import Tensor
from torch.nn.attention import flex_attention

from unmask.model import compiled as compiled_module
from unmask.model import decoder as decoder_module
from unmask.model import kernels, native, precision
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum, token_log_probs
from unmask.training.optimizer import Optimizer, OptimizerSettings


class Graphs:
    """What stands in for torch.compile's GPU backend; `count` graphs were made."""

    def __init__(self) -> None:
        self.count = 0
        self.made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self.made:
            self.made[function] = torch.compile(function, fullgraph=True, backend=self.backend)
        return self.made[function]

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """As on a GPU: no library for the CPU, and PyTorch does not refuse FlexAttention's gradients."""
    torch._dynamo.reset()
    counted = Graphs()
    monkeypatch.setattr(decoder_module, "compiled", counted)
    monkeypatch.setattr(kernels, "compiled", counted)
    monkeypatch.setattr(kernels, "compiles", lambda device: True)
    monkeypatch.setattr(native, "takes", lambda *tensors: False)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    with torch._dynamo.config.patch(recompile_limit=compiled_module.VARIANTS):
        yield counted


def documents(rows: int, tokens: int) -> Tensor:
    return (torch.rand(rows, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.2).cumsum(1)


def hidden_and_gradients(model: Decoder, ids: Tensor, **more: Tensor) -> list[Tensor]:
    model.zero_grad()
    hidden = model.hidden(ids, **more)
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "packed"), [("qwen3", False), ("qwen3-window", True)])
def test_compiled_blocks_are_the_blocks_and_all_layers_and_sizes_share_a_few_graphs(
    name: str, packed: bool, graphs: Graphs
) -> None:
    config = CONFIGS[name]
    model = decoder(config).double()
    made = []
    for step, (rows, tokens) in enumerate([(3, 20), (3, 20), (2, 31), (4, 40), (5, 17)]):
        more = {"at_N": torch.arange(0, rows * tokens, 2 + step // 2)}
        if packed:
            more["documents_BT"] = documents(rows, tokens)
        found = []
        for model.model.compiled in (False, True):
            model.model.recompute = model.model.compiled and step == 1
            found.append(hidden_and_gradients(model, token_ids(rows, tokens, step), **more))
        torch.testing.assert_close(*found)
        made.append(graphs.count)
    kinds = 3 if name == "qwen3-window" else 2  # layers that see all, that see a window, and the last one
    assert made[0] == made[1] == kinds
    assert made[-1] == made[2] == 2 * kinds  # once more when sizes first differ


def test_a_compiled_model_trains_its_masters_in_bfloat16_as_the_other_does(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor, mask: None, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    monkeypatch.setattr(decoder_module, "attention", causal)  # a CPU has its own in bfloat16
    monkeypatch.setattr(precision, "processor_has_bfloat16", lambda: True)
    config = ModelConfig.from_depth(2, vocabulary=96, context=32)
    ids = token_ids(4, 33)
    losses = []
    for compile_blocks in (False, True):
        model = Decoder(config)
        model.init_weights(torch.Generator().manual_seed(0))
        names = list(model.state_dict())
        model.model.compiled = compile_blocks
        optimizer = Optimizer(model, OptimizerSettings(lr=1e-2, matrix_lr=0.02), torch.bfloat16)
        for _ in range(6):
            optimizer.zero_grad()
            hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
            loss = cross_entropy_sum(hidden, model.head, ids[:, 1:].flatten()) / 128
            loss.backward()
            optimizer.step(1.0)
            losses.append(loss.item())
        assert list(model.state_dict()) == names  # nothing is wrapped: a checkpoint's names stay
    assert losses[5] < losses[0] - 1
    torch.testing.assert_close(losses[:6], losses[6:], rtol=0.01, atol=0)


def test_generation_and_what_is_not_told_to_stays_as_it_is(graphs: Graphs) -> None:
    model = decoder()
    model.model.compiled = True
    with torch.no_grad():
        model.hidden(token_ids(2, 8), cache=model.new_cache(2, 12))
        model.model.compiled = False
        model.hidden(token_ids(2, 8))
    assert graphs.count == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_rows_of_the_loss_are_the_plain_ones(
    backend: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor":
        monkeypatch.setattr(kernels, "compiled", compiled_module.compiled)
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(50, 16, generator=generator), torch.randn(96, 16, generator=generator)
    targets = torch.randint(96, (50,), generator=generator)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(kernels, "compiles", lambda device, compiled=compiled: compiled)
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = cross_entropy_sum(*leaves, targets, chunk=20)
        log_probs = token_log_probs(hidden, head, targets)
        found.append([loss.detach(), log_probs, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found)


def test_a_cpu_compiles_nothing_and_what_a_gpu_lacks_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not compiled_module.compiles(torch.device("cpu"))
    monkeypatch.setattr(compiled_module.importlib.util, "find_spec", lambda name: None)
    assert compiled_module.lacking_here() == "the package triton"
    monkeypatch.setattr(compiled_module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiled_module.shutil, "which", lambda name: None)
    assert compiled_module.lacking_here() == "a C compiler (gcc)"
