"""Time of a training step at the shapes S, M, L, beside the rate of matrix products measured in the same process.

    python bench/train_step.py --shape S    # one JSON line: tokens/s, fraction of that rate, peak memory
    python bench/train_step.py --shape S --nanogpt-dir CLONE --nanochat-dir CLONE    # steps of others in turn with ours
    python bench/train_step.py --shape S --nanogpt-dir CLONE --only nanogpt          # its own memory

`make(shape, dtype)` gives (model, loss_fn(model, ids, targets), optimizer) to whoever times it beside others.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # `harness`, also for whoever loads this file by its path
import peers
from harness import CPU, DTYPES, SHAPES, config, decoder, dtype_here, in_turn, say, spread

from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.training import machine
from unmask.training.cost import flops_per_token
from unmask.training.optimizer import Optimizer, OptimizerSettings


class TorchStyle:
    """Our optimizer with the two methods that a timing loop calls."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step(1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()


def make(shape: str, dtype: str, matrix_lr: str = "") -> tuple[Decoder, Any, TorchStyle]:
    model = decoder(shape)
    settings = OptimizerSettings(lr=3e-4, matrix_lr=float(matrix_lr) if matrix_lr else None, weight_decay=0.1)

    def loss_fn(model: Decoder, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden = model.hidden(ids_BT).flatten(0, 1)
        return cross_entropy_sum(hidden, model.head, targets_BT.flatten()) / targets_BT.numel()

    return model, loss_fn, TorchStyle(Optimizer(model, settings, DTYPES[dtype]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument(
        "--nanogpt-dir", type=peers.clone_with("model.py"), help="a clone of karpathy/nanoGPT"
    )
    parser.add_argument(
        "--nanochat-dir", type=peers.clone_with("nanochat/gpt.py"), help="a clone of karpathy/nanochat"
    )
    parser.add_argument("--only", choices=["nanogpt", "nanochat"], help="of all, for its memory")
    parser.add_argument("--plain-malloc", action="store_true", help="leave glibc as it is, as the others do")
    parser.add_argument("--eager", action="store_true", help="do not compile the others")
    options = parser.parse_args()
    dtype = dtype_here()
    _, _, vocabulary, length, rows, _ = SHAPES[options.shape]
    batch = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def ours() -> Callable[[], object]:
        model, loss_fn, optimizer = make(options.shape, dtype, "0.02" if options.optimizer == "muon" else "")
        model.model.recompute = options.recompute

        def step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(loss_fn(model, inputs, targets))
            optimizer.step()

        return step

    def other(make_peer: Callable[..., peers.Peer], clone: Path) -> Callable[[], object]:
        peer = make_peer(clone, config(options.shape), compile=not options.eager)
        return lambda: peer.step(inputs, targets)

    if not options.plain_malloc:
        machine.keep_large_blocks()
    steps = {} if options.only else {"unmask": ours()}
    for name, maker in (("nanogpt", peers.nanogpt), ("nanochat", peers.nanochat)):
        clone = getattr(options, f"{name}_dir")
        if clone and options.only in (None, name):
            steps[name] = other(maker, clone)
    seconds = in_turn(steps, options.steps)
    rate = machine.matmul_rate(DTYPES[dtype], device=CPU)
    for name, taken in seconds.items():
        tokens_per_second = rows * length / statistics.median(taken)
        numbers: dict[str, Any] = {"optimizer": options.optimizer, "recompute": options.recompute}
        if name == "unmask":
            share = flops_per_token(config(options.shape), length) * tokens_per_second / rate
            numbers |= {"matmul_gflops": rate / 1e9, "fraction_of_matmul": share}
        elif "unmask" in seconds:
            numbers = {"ours_to_it": spread([b / a for a, b in zip(seconds["unmask"], taken, strict=True)])}
        say(
            "train_step",
            alone=len(seconds) == 1,
            model=name,
            shape=options.shape,
            dtype=dtype,
            tokens_per_second=tokens_per_second,
            seconds=spread(taken),
            **numbers,
        )


if __name__ == "__main__":
    main()
