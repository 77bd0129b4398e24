"""What training costs, from a model's sizes alone: FLOPs, which records and plans count alike, and memory."""

import torch
from torch import nn

from unmask.model.attention import SCORES_TO_KEEP
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import rows_at_once
from unmask.model.native import built
from unmask.model.scorer import Scorer


def matrix_weights(config: ModelConfig) -> int:
    """Weights of the matrices inside layers."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return config.num_hidden_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Of training, forward and backward: 6 for each weight that a token is multiplied with (head in, embedding out),
    plus 6·L·d·T of attention with T = `length`, half of what Chowdhery et al. (arXiv 2204.02311, appendix B) count:
    what a causal model does not look at is left out. Too much where rows are shorter."""
    head = (1 if config.is_scorer else config.vocab_size) * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6 * (matrix_weights(config) + head + attention)


def training_flops(model: nn.Module, tokens: int, length: int) -> float:
    """Of every network in `model` for `tokens` read forward and backward. What PPO only reads forward (answers,
    reference, reward) is not counted."""
    networks = (network for network in model.modules() if isinstance(network, Decoder | Scorer))
    return float(sum(tokens * flops_per_token(network.config, length) for network in networks))


def parameters(config: ModelConfig) -> int:
    """All weights, a tied embedding once."""
    with torch.device("meta"):
        model = Scorer(config) if config.is_scorer else Decoder(config)
    return sum(parameter.numel() for parameter in model.parameters())


def training_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    micro_tokens: int,
    length: int,
    muon: bool,
    recompute: bool = False,
    cpu: bool = True,
    shards: int = 1,
    accumulates: bool = False,
) -> int:
    """The least that a training step holds at its fullest. The process itself and its allocator come on top:
    0.3 to 0.8 GB at the shapes of bench/, up to 1.5 in a run, which keeps what earlier stages took.

    Each weight: 4 bytes of master, 4 of gradient, 8 of AdamW's state (4 of Muon's for matrices inside layers), and a
    copy where the dtype is narrower. Each token of a micro-batch: what layers keep for backward, which is 4 vectors of
    the width, 7 of the heads, 3 of the hidden layer, and on a CPU each head's probabilities where attention keeps them
    (rows of up to 256). And a chunk of logits (larger on a GPU), which become their slope in place. Without compiled
    kernels: a vector more of the hidden layer, float32 copies of the logits, and on a CPU four more vectors of the
    width and eight of the heads. With `recompute` layers keep one vector of the width each, and one layer at a time all
    of it.

    Split over `shards` (see shard.py) a process holds its part of masters, gradients and state; whole, it holds what is
    outside layers, two layers, and the gradients of the larger of a layer and what is outside, as they are made and in
    float32. One that `accumulates` over micro-batches holds all gradients whole, in float32.
    """
    size = dtype.itemsize
    weights, matrices = parameters(config), matrix_weights(config)
    held = weights * (4 + 4 + 8) - (4 * matrices if muon else 0)
    if shards > 1:
        layer, rest = matrices // config.num_hidden_layers, weights - matrices
        gathered = size * (rest + 2 * layer) + (size + 4) * max(layer, rest)
        held = held // shards + gathered + (4 * weights if accumulates else 0)
    elif size < 4:
        held += size * weights
    heads = config.num_attention_heads * config.head_dim
    grouped = config.num_key_value_heads * config.head_dim
    compiled = cpu and built().library is not None
    kept = 4 * config.hidden_size + 3 * heads + 4 * grouped + 3 * config.intermediate_size
    if not compiled:
        kept += config.intermediate_size
    if cpu and not compiled:
        kept += 4 * (config.hidden_size + heads + grouped)
    if cpu and dtype is torch.bfloat16 and length**2 <= SCORES_TO_KEEP:
        kept += config.num_attention_heads * length
    layers = config.num_hidden_layers
    read = micro_tokens * size * (layers * config.hidden_size + kept if recompute else layers * kept)
    rows = min(micro_tokens, rows_at_once(config.vocab_size, cpu))
    chunk = rows * config.vocab_size * (size if compiled else 2 * size + 4)
    return held + read + (0 if config.is_scorer else chunk)
