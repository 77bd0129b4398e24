"""Tiny random models of every family, ours and transformers'."""

import torch

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Every switch that the families use: QK-norm, biases, rope rules, windows in all or some layers, heads.
CONFIGS = {
    "qwen3": ModelConfig(**SIZES),
    "qwen3-untied-bias": ModelConfig(**SIZES, tie_word_embeddings=False, qkv_bias=True, output_bias=True),
    "qwen3-window": ModelConfig(
        **SIZES, sliding_window=5, layer_types=("full_attention", "sliding_attention", "full_attention")
    ),
    "qwen2": ModelConfig(**SIZES, architecture="Qwen2ForCausalLM", qk_norm=False, qkv_bias=True),
    "llama2": ModelConfig(
        **SIZES, architecture="LlamaForCausalLM", qk_norm=False, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
    "llama3": ModelConfig(
        **SIZES, architecture="LlamaForCausalLM", qk_norm=False, rope_theta=500_000.0, rope_scaling=LLAMA3
    ),
    "smollm": ModelConfig(
        **SIZES,
        architecture="LlamaForCausalLM",
        qk_norm=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "mistral": ModelConfig(
        **SIZES, architecture="MistralForCausalLM", qk_norm=False, tie_word_embeddings=False, sliding_window=6
    ),
}


def decoder(config: ModelConfig = CONFIGS["qwen3"], seed: int = 0, spread: float = 0.2) -> Decoder:
    """Weights drawn widely, norms and biases too, so that no term of the network is nearly neutral."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
    return model


def token_ids(rows: int, tokens: int, seed: int = 0, vocabulary: int = 96) -> torch.Tensor:
    """Random ids that never hit the padding id 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (rows, tokens), generator=generator)
