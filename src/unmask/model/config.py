"""What a decoder looks like: sizes and switches, read from and written to Hugging Face's `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from unmask.errors import UserError

CAUSAL, SCORING = "ForCausalLM", "ForSequenceClassification"
FAMILIES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral"}

# Far above any real model, far below what would exhaust memory before a single tensor has been compared.
LIMITS = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10,
    "head_dim": 2**12,
    "max_position_embeddings": 2**28,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder, under Hugging Face's names.

    Covers Qwen3 (`qk_norm`), Qwen2/2.5 (`qkv_bias`), Llama 2/3 and SmolLM (`rope_scaling`, biases), Mistral
    (`sliding_window`, in every layer unless `layer_types` says otherwise). `rope_scaling` is None or the parameters
    of Llama 3's rule: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    architecture: str = "Qwen3ForCausalLM"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, float] | None = None
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= limit:
                raise UserError(f"{name} must be a whole number from 1 to {limit:,}, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.sliding_window is not None and (type(self.sliding_window) is not int or self.sliding_window < 1):
            raise UserError(f"sliding_window must be a positive whole number or null, not {self.sliding_window!r}")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise UserError(f"{name} must be a positive number, not {value!r}")

    @staticmethod
    def from_depth(depth: int, *, vocabulary: int, context: int) -> "ModelConfig":
        """The shape that one dial gives: width 64·round(2·depth/3), heads of 64, SwiGLU of 8/3 the width, tied, Qwen3."""
        width = 64 * max(1, round(2 * depth / 3))
        return ModelConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=32 * round(8 * width / 3 / 32),
            num_hidden_layers=depth,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
            max_position_embeddings=context,
        )

    def window(self, layer: int) -> int | None:
        """How many positions (itself included) a token of this layer sees; None: all before it."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def scoring(self) -> "ModelConfig":
        """The same trunk with a scalar head instead of a vocabulary."""
        return replace(self, architecture=self.architecture.replace(CAUSAL, SCORING))

    @property
    def is_scorer(self) -> bool:
        return self.architecture.endswith(SCORING)
