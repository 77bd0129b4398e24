"""Time of a training step at the shapes S, M, L, beside the rate of matrix products measured in the same process.

    python bench/train_step.py --shape S    # one JSON line: tokens/s, fraction of that rate, peak memory

`make(shape, dtype)` gives (model, loss_fn(model, ids, targets), optimizer) to whoever times it beside others.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.training import parallel
from unmask.training.optimizer import Optimizer, OptimizerSettings

SHAPES = {  # layers, width, vocabulary, tokens a row, rows, hidden width
    "S": (6, 256, 4096, 256, 16, 672),
    "M": (8, 512, 8192, 512, 8, 1376),
    "L": (12, 768, 50304, 512, 4, 2048),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(shape: str) -> ModelConfig:
    layers, width, vocabulary, length, _, hidden = SHAPES[shape]
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        qk_norm=True,
    )


class TorchStyle:
    """Our optimizer with the two methods that a timing loop calls."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step(1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()


def make(shape: str, dtype: str, matrix_lr: str = "") -> tuple[Decoder, Any, TorchStyle]:
    parallel.keep_large_blocks()
    model = Decoder(config(shape))
    model.init_weights(torch.Generator().manual_seed(0))
    settings = OptimizerSettings(lr=3e-4, matrix_lr=float(matrix_lr) if matrix_lr else None, weight_decay=0.1)

    def loss_fn(model: Decoder, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden = model.hidden(ids_BT).flatten(0, 1)
        return cross_entropy_sum(hidden, model.head, targets_BT.flatten()) / targets_BT.numel()

    return model, loss_fn, TorchStyle(Optimizer(model, settings, DTYPES[dtype]))


def flops_per_token(shape: str) -> int:
    """6 for each weight that a token is multiplied with (head in, embedding out) + 6·L·d·T of causal attention."""
    layers, width, vocabulary, length, _, hidden = SHAPES[shape]
    return (
        6 * (layers * (4 * width**2 + 3 * width * hidden) + vocabulary * width) + 6 * layers * width * length
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    device = parallel.pick_device()
    dtype = parallel.compute_dtype(device)
    name = next(key for key, value in DTYPES.items() if value == dtype)
    model, loss_fn, optimizer = make(options.shape, name, "0.02" if options.optimizer == "muon" else "")
    _, _, vocabulary, length, rows, _ = SHAPES[options.shape]
    batch = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_fn(model, batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])  # the first one also allocates
    rate = parallel.matmul_rate(dtype, device=device)
    tokens = rows * length
    result = {
        "bench": "train_step",
        "shape": options.shape,
        "optimizer": options.optimizer,
        "dtype": name,
        "tokens_per_second": tokens / median,
        "seconds": {"median": median, "min": min(times[1:]), "max": max(times[1:]), "n": options.steps},
        "matmul_gflops": rate / 1e9,
        "fraction_of_matmul": flops_per_token(options.shape) * tokens / median / rate,
        "peak_rss_mb": parallel.peak_memory(device) / 2**20,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
