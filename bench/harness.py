"""What the benchmarks share: shapes, the timing, and the JSON line."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.training import machine

SHAPES = {  # layers, width, vocabulary, tokens a row, rows, hidden width
    "S": (6, 256, 4096, 256, 16, 672),
    "M": (8, 512, 8192, 512, 8, 1376),
    "L": (12, 768, 50304, 512, 4, 2048),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(shape: str, context: int | None = None) -> ModelConfig:
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
        max_position_embeddings=context or length,
        tie_word_embeddings=True,
        qk_norm=True,
    )


def decoder(shape: str, seed: int = 0, context: int | None = None) -> Decoder:
    """With random weights, in float32."""
    machine.keep_large_blocks()
    model = Decoder(config(shape, context))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


CPU = torch.device("cpu")  # where all of this runs; a GPU has bench/gpu.py


def dtype_here() -> str:
    """The name of what this machine's processor computes in."""
    dtype = machine.compute_dtype(CPU)
    return next(name for name, each in DTYPES.items() if each == dtype)


def seconds_of(work: Callable[[], object], times: int) -> dict[str, float]:
    """Median, least and most seconds of `times` calls after a first one, which also allocates."""
    return spread(in_turn({"": work}, times)[""])


def in_turn(works: Mapping[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    """Seconds of `times` calls of each, in turn round by round, after a round that compiles and allocates."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in taken.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def say(bench: str, *, alone: bool = True, **numbers: Any) -> None:
    """One JSON line, with the peak memory of the process where one thing alone was measured in it."""
    peak = {"peak_rss_mb": machine.peak_memory(CPU) / 2**20} if alone else {}
    print(json.dumps({"bench": bench, **numbers, **peak}))
