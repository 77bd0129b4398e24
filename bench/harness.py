"""What the benchmarks share: shapes, the timing, and the JSON line."""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
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


def dtype_here() -> str:
    """The name of what this machine computes in."""
    dtype = machine.compute_dtype(machine.pick_device())
    return next(name for name, each in DTYPES.items() if each == dtype)


def seconds_of(work: Callable[[], object], times: int) -> dict[str, float]:
    """Median, least and most seconds of `times` calls after a first one, which also allocates."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return {
        "median": statistics.median(taken[1:]),
        "min": min(taken[1:]),
        "max": max(taken[1:]),
        "n": times,
    }


def nanogpt(clone: Path) -> Any:
    """The module `model.py` of a clone of github.com/karpathy/nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def say(bench: str, **numbers: Any) -> None:
    """One JSON line, with the peak memory of the process."""
    peak = machine.peak_memory(machine.pick_device()) / 2**20
    print(json.dumps({"bench": bench, **numbers, "peak_rss_mb": peak}))
