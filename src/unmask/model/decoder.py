"""One readable decoder: RMSNorm, rotary positions, grouped attention, optional QK-norm, SwiGLU.

Parameter names are Hugging Face's: a checkpoint of ours opens in transformers and whatever reads its files,
and theirs here. Norms and rotations are in float32; the residual stream has the dtype of the weights.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from unmask.model.attention import attention, cached_mask, packed_mask
from unmask.model.cache import Cache
from unmask.model.compiled import compiled
from unmask.model.config import ModelConfig
from unmask.model.flex import block_mask
from unmask.model.kernels import embedding, norm_rotate, rms_norm, rotary_tables, swiglu
from unmask.model.precision import linear
from unmask.model.step import Step, worth_packing


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · w over the last axis, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position of each of the K/2 planes, float32: θ^(−2i/K), slowed by Llama 3's rule if asked.

    That rule (transformers' `rope_type: llama3`) counts a plane's turns within the original context: below
    low_freq_factor it becomes `factor` times slower, above high_freq_factor it stays, between is a blend.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency
    rule = config.rope_scaling
    turns = rule["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = (turns - rule["low_freq_factor"]) / (rule["high_freq_factor"] - rule["low_freq_factor"])
    kept = kept.clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / rule["factor"]


def at(x_BTD: Tensor, at_N: Tensor) -> Tensor:
    """(N, D): x at these positions of the flattened (B·T)."""
    return x_BTD.flatten(0, 1).index_select(0, at_N)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, size = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * size, config.qkv_bias)
        self.k_proj = Linear(width, config.num_key_value_heads * size, config.qkv_bias)
        self.v_proj = Linear(width, config.num_key_value_heads * size, config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * size, width, config.output_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, where: "Where", at_N: Tensor | None = None) -> Tensor:
        rows, tokens, _ = x_BTD.shape
        q, k, v = (
            projection(x_BTD).view(rows, tokens, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, keys = self._placed(q, self.q_norm, where), self._placed(k, self.k_norm, where)
        values = v.transpose(1, 2)
        if where.kept is not None:
            cache, layer, positions_BT, reach = where.kept
            kept_keys, kept_values = cache.write(layer, keys.transpose(1, 2), v, positions_BT, reach)
            if reach > tokens:  # else the cache was empty: the tokens at hand are all there is
                keys, values = kept_keys, kept_values
        y = attention(q, keys, values, where.mask, where.causal)
        y = y.transpose(1, 2).reshape(rows, tokens, -1)
        written: Tensor = self.o_proj(y if at_N is None else at(y, at_N))
        return written

    def _placed(self, x_BTHK: Tensor, norm: "RMSNorm | None", where: "Where") -> Tensor:
        """Queries or keys, normed and turned to their positions: (B, H, T, K)."""
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return norm_rotate(x_BTHK, weight, eps, where.cos, where.sin)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, where: "Where", at_N: Tensor | None = None) -> Tensor:
        """(B, T, D) → (B, T, D), or → (N, D) at these positions of the flattened (B·T)."""
        # One function with the block as its argument: compiled once, for all layers of all models of this shape.
        make = compiled(Block.made) if where.compiled else Block.made
        y: Tensor = make(self, x, where, at_N)
        return y

    def made(self, x: Tensor, where: "Where", at_N: Tensor | None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), where, at_N)
        x = (x if at_N is None else at(x, at_N)) + attended
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class Where(NamedTuple):
    """Where the tokens of one forward pass stand, and what they may see in a layer: made once a pass for all layers.

    With `compiled` nothing in here tells one layer from another of the same window.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | None
    causal: bool
    compiled: bool
    kept: tuple[Cache, int, Tensor, int] | None  # a cache, the layer in it, positions (B, T), how far is read


def places(
    config: ModelConfig,
    frequencies: Tensor,
    ids_BT: Tensor,
    positions_BT: Tensor | None,
    documents_BT: Tensor | None,
    cache: Cache | None,
    compiled: bool,
) -> list[Where]:
    """Of each layer."""
    tokens, device = ids_BT.shape[1], ids_BT.device
    past = reach = 0
    if cache is not None:
        assert positions_BT is documents_BT is None, "a cache counts its own positions"
        past = int(cache.lengths_B.max())
        reach = past + tokens
        assert reach <= cache.length, f"cache of {cache.length} positions cannot take {reach}"
        positions_BT = cache.lengths_B[:, None] + torch.arange(tokens, device=device)
    if positions_BT is None:
        positions_BT = torch.arange(tokens, device=device)[None]
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    masks: dict[int | None, Tensor | BlockMask | None]
    if past:
        masks = {window: cached_mask(positions_BT, reach, window) for window in set(windows)}
    else:
        packed = block_mask if compiled else packed_mask
        masks = {window: packed(tokens, window, documents_BT, device) for window in set(windows)}
    cos, sin = rotary_tables(positions_BT, frequencies)
    return [
        Where(
            cos,
            sin,
            masks[window],
            causal=not past,
            compiled=compiled,
            kept=None if cache is None else (cache, layer, positions_BT, reach),
        )
        for layer, window in enumerate(windows)
    ]


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what a decoder and a scorer share. Called `model` in both."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequencies: Tensor | None = None
        # Activation checkpointing: layers keep their input alone, and run again in backward.
        self.recompute = False
        # Blocks by torch.compile: for training on a GPU, whose kernels differ in the last bits from those that measure.
        self.compiled = False

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        at_N: Tensor | None = None,
    ) -> Tensor:
        assert cache is None or at_N is None, "a cache is read at its end, not at chosen positions"
        # Not a buffer: `model.to(bfloat16)` would round a buffer's angles.
        if self.frequencies is None or self.frequencies.device != ids_BT.device:
            self.frequencies = rotary_frequencies(self.config).to(ids_BT.device)
        if cache is not None and ids_BT.shape[1] == 1 and worth_packing(self.config, cache):
            if cache.step is None:
                cache.step = Step(self.config, dict(self.named_parameters()), self.frequencies)
            return cache.step.hidden(ids_BT[:, 0], cache)[:, None]
        compiled = self.compiled and cache is None
        *below, top = places(
            self.config, self.frequencies, ids_BT, positions_BT, documents_BT, cache, compiled
        )
        x = self.embed_tokens(ids_BT)
        for block, where in zip(self.layers, below, strict=False):
            x = self._through(block, x, where)
        x = self._through(self.layers[-1], x, top, at_N)
        normed: Tensor = self.norm(x)
        return normed

    def _through(self, block: nn.Module, x: Tensor, *more: Any) -> Tensor:
        y: Tensor
        if self.recompute and torch.is_grad_enabled():
            # Nothing here draws a random number, so there is no generator's state to keep.
            y = checkpoint(block, x, *more, use_reentrant=False, preserve_rng_state=False)
        else:
            y = block(x, *more)
        return y


class Decoder(nn.Module):
    """A causal language model. Its weights are undefined until `init_weights` or `weights.load` sets them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Embedding and head N(0, 0.02); matrices inside layers N(0, 0.32/√inputs), those that write into the residual
        stream divided by √(2L); norms 1, biases 0.

        GPT-2 draws all from N(0, 0.02), which is the same for 256 inputs: then what a step changes in the hidden states
        grows with the width (bench/coordinates.py), and no rate suits two widths.
        """
        init_weights(self, self.config.num_hidden_layers, generator)

    @property
    def head(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm.

        `positions_BT` (default 0, 1, …) are rotary positions; tokens attend only to those of equal number in
        `documents_BT`. With a cache the tokens continue each row at its own length (see Cache). With `at_N`,
        which names positions of the flattened (B·T), only those are given, (N, D), and the last layer is made for
        them alone.
        """
        x: Tensor = self.model(
            ids_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache, at_N=at_N
        )
        return x

    def new_cache(self, rows: int, length: int) -> Cache:
        """For `rows` sequences of up to `length` tokens, in this model's dtype and place."""
        return Cache(self.config, rows, length, self.head.dtype, self.head.device)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.head)

    def forward(
        self,
        ids_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in the weights' dtype; position t scores token t + 1."""
        hidden = self.hidden(ids_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache)
        return self.logits(hidden)


def init_weights(model: nn.Module, layers: int, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        deviation = 0.02
        if "layers" in name.split("."):
            deviation = 0.32 / math.sqrt(parameter.shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * layers)
        parameter.normal_(0.0, deviation, generator=generator)
