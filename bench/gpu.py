"""Training steps on a GPU, as `unmask run` takes them, beside the rate of matrix products in the same process.

    python bench/gpu.py                                      # 124M and 1B parameters: one JSON line each
    python bench/gpu.py --sizes 124M --nanogpt-dir nanoGPT   # in turn with a clone of github.com/karpathy/nanoGPT
    python bench/gpu.py --device cpu --layers 2 --width 64 --vocabulary 128 --length 32 --rows 2    # that it runs

Medians over rounds of `--steps` steps, with the least and the most. FLOPs as `unmask.training.cost` counts them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # `harness`, also for whoever loads this file by its path
import peers
from harness import DTYPES, spread

from unmask.errors import UserError
from unmask.model.compiled import compiles, lacking
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.stages.batches import sent
from unmask.training import cost, machine
from unmask.training.loop import train_step
from unmask.training.optimizer import Optimizer, OptimizerSettings

SIZES = {  # layers, width, heads, hidden width, rows of a micro-batch; the tokens of a row are 1,024
    "124M": (12, 768, 12, 2048, 32),
    "1B": (24, 1792, 14, 4864, 16),
}


class MadeUp:
    """The objective of pretraining on one batch of random ids, sent anew each step."""

    steps, pause_every, fingerprint = 10**9, 1, ""

    def __init__(self, model: Decoder, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.tokens_per_step = self.tokens(ids)

    def micro_batches(self, step: int) -> list[Tensor]:
        return [sent(self.ids, self.model.head.device)]

    def tokens(self, batch: Tensor) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)

    def counts(self, batch: Tensor) -> dict[str, int]:
        return {"tokens": self.tokens(batch)}

    def loss(self, batch: Tensor, totals: dict[str, int]) -> tuple[Tensor, dict[str, Tensor | float]]:
        hidden = self.model.hidden(batch[:, :-1]).flatten(0, 1)
        return cross_entropy_sum(hidden, self.model.head, batch[:, 1:].flatten()) / totals["tokens"], {}


def ours(config: ModelConfig, ids: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(options.device)
    model.model.compiled = options.compile
    model.model.recompute = options.recompute
    matrix_lr = 0.02 if options.optimizer == "muon" else None
    settings = OptimizerSettings(lr=3e-4, matrix_lr=matrix_lr, weight_decay=0.1)
    optimizer, objective = Optimizer(model, settings, options.dtype), MadeUp(model, ids)
    return lambda: train_step(objective, optimizer, 0, 1.0, 1.0)


def nanogpt(config: ModelConfig, ids: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """A step as its `train.py` takes it: autocast, compiled where ours is, a fused AdamW."""
    peer = peers.nanogpt(
        options.nanogpt_dir,
        config,
        device=options.device.type,
        dtype=options.dtype,
        compile=options.compile,
    )

    def step() -> None:
        batch = sent(ids, options.device)
        peer.step(batch[:, :-1], batch[:, 1:].contiguous(), clip=1.0)

    return step


def measure(config: ModelConfig, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Each in turn, round by round, after a round that compiles and allocates, in which memory is measured."""
    length, device = config.max_position_embeddings, options.device
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    makers = {"unmask": ours} | ({"nanogpt": nanogpt} if options.nanogpt_dir else {})
    steps: dict[str, Callable[[], object]] = {}
    peaks: dict[str, float] = {}
    for name, make in makers.items():
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        machine.reset_peak_memory(device)
        steps[name] = make(config, ids, options)
        seconds_of(steps[name], options)
        peaks[name] = (machine.peak_memory(device) - held) / 2**20
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            rates[name].append(options.steps * rows * length / seconds_of(step, options))
    flops = cost.flops_per_token(config, length)
    limit = machine.matmul_rate(options.dtype, 1.0, device)
    of_limit = {name: flops * statistics.median(each) / limit for name, each in rates.items()}
    found: dict[str, Any] = {
        "parameters": cost.parameters(config),
        "tokens_per_second": {name: spread(each) for name, each in rates.items()},
        "flops_per_token": flops,
        "matmul_gflops": limit / 1e9,
        "fraction_of_matmul": of_limit["unmask"],
        "peak_mb": peaks,
    }
    if options.nanogpt_dir:
        found["to_nanogpt"] = spread([a / b for a, b in zip(*rates.values(), strict=True)])
    return found


def seconds_of(step: Callable[[], object], options: argparse.Namespace) -> float:
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    machine.synchronize(options.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--nanogpt-dir", type=peers.clone_with("model.py"), help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, help="of a step, instead of the size's own")
    parser.add_argument("--layers", type=int, help="with --width: another size, of heads of 32")
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    try:
        options.device = machine.pick_device(options.device)
    except UserError as error:
        print(f"nothing is measured: {error}")
        return
    options.dtype = machine.compute_dtype(options.device)
    options.compile = compiles(options.device) and not options.eager
    if options.device.type == "cuda" and (what := lacking(options.device)):
        print(f"nothing is compiled: the GPU lacks {what}", file=sys.stderr)
    sizes = {name: SIZES[name] for name in options.sizes}
    if options.layers:
        sizes = {"given": (options.layers, options.width, options.width // 32, 3 * options.width, 2)}
    for name, (layers, width, heads, hidden, rows) in sizes.items():
        config = ModelConfig(
            architecture="Qwen3ForCausalLM", vocab_size=options.vocabulary, hidden_size=width,
            intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, head_dim=width // heads, max_position_embeddings=options.length,
            tie_word_embeddings=True, qk_norm=True,
        )  # fmt: skip
        rows = options.rows or rows
        try:
            found = measure(config, rows, options)
        except torch.OutOfMemoryError as error:
            found = {"does_not_fit": str(error).splitlines()[0]}
        told = {
            "bench": "gpu", "size": name, "machine": machine.describe(options.device), "torch": torch.__version__,
            "dtype": next(key for key, dtype in DTYPES.items() if dtype is options.dtype), "rows": rows,
            "length": options.length, "optimizer": options.optimizer, "compiled": options.compile,
            "recompute": options.recompute,
        }  # fmt: skip
        print(json.dumps(told | found), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
