"""One more token in every row of a cache, through weights that are laid out for it.

The same network as `decoder.py` computes, with half as many operations: where a model is small, the time goes
into calling hundreds of them a token, not into their arithmetic.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.model.cache import Cache
from unmask.model.config import ModelConfig
from unmask.model.kernels import rms_norm, rotary_tables, rotate
from unmask.model.precision import emulated, wide

# Numbers in the copy that is made, 1 GB of float32 at most; larger models lose little in calls.
LARGEST = 2**28


def worth_packing(config: ModelConfig, cache: Cache) -> bool:
    """Whether nothing is to be learned, more than one step will be taken, and the model is small enough."""
    if torch.is_grad_enabled() or cache.length == 1:
        return False
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    size = config.num_hidden_layers * config.hidden_size * (attention + 3 * config.intermediate_size)
    return size <= LARGEST


class Layer(NamedTuple):
    """Matrices are (inputs, outputs); those that read the same input are one."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (heads + key heads, K): each head's weights
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Step:
    """A trunk's weights as they are at this moment, and the step they take: a snapshot, to live as long as a cache."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], frequencies: Tensor) -> None:
        self.config, self.weights, self.frequencies = config, weights, frequencies
        self.layers = [self._layer(f"layers.{i}.") for i in range(config.num_hidden_layers)]

    def _layer(self, prefix: str) -> Layer:
        config = self.config

        def packed(*names: str) -> Tensor:
            # In bfloat16 without instructions products go through float32: turned into it once, here.
            matrix = torch.cat([self.weights[f"{prefix}{name}_proj.weight"].detach() for name in names])
            return (wide(matrix) if emulated(matrix) else matrix).t().contiguous()

        def bias(*names: str) -> Tensor | None:
            found = [self.weights.get(f"{prefix}{name}_proj.bias") for name in names]
            return (
                torch.cat([each.detach() for each in found if each is not None])
                if found[0] is not None
                else None
            )

        def norm(name: str) -> Tensor:
            return self.weights[f"{prefix}{name}.weight"].detach()

        qkv, gate_up = [f"self_attn.{name}" for name in "qkv"], ("mlp.gate", "mlp.up")
        qk_norm = None
        if config.qk_norm:
            heads = (("q", config.num_attention_heads), ("k", config.num_key_value_heads))
            qk_norm = torch.cat([norm(f"self_attn.{name}_norm").expand(n, -1) for name, n in heads])
            qk_norm = wide(qk_norm)
        return Layer(
            norm("input_layernorm"),
            packed(*qkv),
            bias(*qkv),
            qk_norm,
            packed("self_attn.o"),
            bias("self_attn.o"),
            norm("post_attention_layernorm"),
            packed(*gate_up),
            bias(*gate_up),
            packed("mlp.down"),
            bias("mlp.down"),
        )

    def hidden(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Hidden states (B, D) after the final norm; each row's token stands at that row's length."""
        config = self.config
        past = cache.lengths_B.tolist()
        reach, even = max(past) + 1, min(past) == max(past)
        assert reach <= cache.length, f"cache of {cache.length} positions cannot take {reach}"
        rows, heads, groups = len(past), config.num_attention_heads, config.num_key_value_heads
        cos, sin = rotary_tables(cache.lengths_B, self.frequencies)
        every = torch.arange(rows, device=ids_B.device)
        windows = {config.window(i) for i in range(config.num_hidden_layers)}
        biases = {window: self._bias(cache, reach, window) for window in windows}
        x = F.embedding(ids_B, self.weights["embed_tokens.weight"].detach())
        for i, layer in enumerate(self.layers):
            qkv = product(rms_norm(x, layer.norm, config.rms_norm_eps), layer.qkv, layer.qkv_bias)
            qkv = qkv.view(rows, heads + 2 * groups, config.head_dim)
            qk, v = qkv[:, : heads + groups], qkv[:, heads + groups :]
            if layer.qk_norm is not None:
                qk = F.rms_norm(wide(qk), (config.head_dim,), None, config.rms_norm_eps)
                qk = qk.mul_(layer.qk_norm).to(x.dtype)
            qk = rotate(qk, cos, sin)
            if even:
                cache.k[i, :, :, reach - 1] = qk[:, heads:]
                cache.v[i, :, :, reach - 1] = v
            else:
                cache.k[i].transpose(1, 2)[every, cache.lengths_B] = qk[:, heads:].to(cache.k.dtype)
                cache.v[i].transpose(1, 2)[every, cache.lengths_B] = v.to(cache.v.dtype)
            keys, values = (t[i, :, :, :reach].reshape(rows * groups, reach, -1) for t in (cache.k, cache.v))
            y = attend(
                qk[:, :heads].reshape(rows * groups, heads // groups, -1),
                keys,
                values,
                biases[config.window(i)],
            )
            x = added(x, y.reshape(rows, -1), layer.out, layer.out_bias)
            gate_up = product(
                rms_norm(x, layer.mlp_norm, config.rms_norm_eps), layer.gate_up, layer.gate_up_bias
            )
            gate, up = gate_up.chunk(2, -1)
            x = added(x, F.silu(gate).mul_(up), layer.down, layer.down_bias)
        return rms_norm(x, self.weights["norm.weight"].detach(), config.rms_norm_eps)

    def _bias(self, cache: Cache, reach: int, window: int | None) -> Tensor:
        """What to add to the scores, (B · G, 1, reach): −∞ beyond a row's length and before its window."""
        distance = cache.lengths_B[:, None] - torch.arange(reach, device=cache.k.device)
        hidden = distance < 0
        if window is not None:
            hidden = hidden | (distance >= window)
        bias = torch.zeros_like(distance, dtype=cache.k.dtype).masked_fill_(hidden, float("-inf"))
        return bias.repeat_interleave(self.config.num_key_value_heads, 0)[:, None]


def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    y = x.to(matrix.dtype) @ matrix
    return (y if bias is None else y + bias).to(x.dtype)


def added(x: Tensor, y: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x + y M + b, in one operation where nothing stands in the way."""
    if bias is None and matrix.dtype is x.dtype:
        return torch.addmm(x, y, matrix)
    return x + product(y, matrix, bias)


def attend(q_NHK: Tensor, k_NSK: Tensor, v_NSK: Tensor, bias_N1S: Tensor) -> Tensor:
    """softmax(q kᵀ / √K + bias) v for N = rows · key heads, each with its H query heads."""
    if emulated(q_NHK):
        return attend(q_NHK.float(), k_NSK.float(), v_NSK.float(), bias_N1S.float()).to(q_NHK.dtype)
    scores = torch.baddbmm(bias_N1S, q_NHK, k_NSK.mT, alpha=q_NHK.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v_NSK)
