"""What a decoder looks like: sizes and switches, read from and written to Hugging Face's `config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unmask.errors import UserError

CAUSAL, SCORING = "ForCausalLM", "ForSequenceClassification"
FAMILIES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral"}

# Far above any real model, and far below what would exhaust memory before one tensor has been compared.
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
LLAMA3_RULE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class NotCovered(UserError):
    """A model that is whole, as far as can be seen, and whose like this decoder is not; transformers may run it."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder, under Hugging Face's names.

    Covers Qwen3 (`qk_norm`), Qwen2/2.5 (`qkv_bias`), Llama 2/3 and SmolLM (`rope_scaling`, biases), Mistral
    (`sliding_window`, in every layer unless `layer_types` says otherwise). `rope_scaling` is None or Llama
    3's rule: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings. `reward_offset`
    belongs to scorers: the mean score of reference answers, for callers to subtract; others ignore it.
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
    rope_scaling: Mapping[str, float] | None = field(default=None, hash=False)
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
    reward_offset: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            whole(name, getattr(self, name), limit)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.sliding_window is not None:
            whole("sliding_window", self.sliding_window, LIMITS["max_position_embeddings"])
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise UserError(f"layer_types has {len(self.layer_types)} of {self.num_hidden_layers} layers")
            for kind in self.layer_types:
                if kind not in ("full_attention", "sliding_attention"):
                    raise UserError(f"layer_types: {kind!r} is not full_attention or sliding_attention")
        for name in ("rms_norm_eps", "rope_theta"):
            positive(name, getattr(self, name))
        if self.rope_scaling is not None:
            for name in LLAMA3_RULE:
                positive(f"rope scaling: {name}", self.rope_scaling.get(name))
        if type(self.reward_offset) not in (int, float) or not math.isfinite(self.reward_offset):
            raise UserError(f"reward_offset must be a number, not {self.reward_offset!r}")
        self._check_family()

    def _check_family(self) -> None:
        """What a family has no key for, its readers would drop in silence."""
        family = self.family
        if self.qk_norm != (family == "Qwen3"):
            raise UserError(f"{family} models {'have' if family == 'Qwen3' else 'have no'} QK-norm")
        biases = (self.qkv_bias, self.output_bias)
        allowed = {"Qwen2": [(True, False)], "Mistral": [(False, False)]}
        if biases not in allowed.get(family, [(False, False), (True, True)]):
            raise UserError(f"{family} models cannot have the biases {biases} of (q, k, v) and output")
        if self.mlp_bias and family != "Llama":
            raise UserError(f"{family} models have no mlp_bias")
        if self.sliding_window is not None and family == "Llama":
            raise UserError("Llama models have no sliding_window")

    @property
    def family(self) -> str:
        for family in FAMILIES.values():
            if self.architecture in (family + CAUSAL, family + SCORING):
                return family
        raise UserError(
            f"the architecture {self.architecture!r} is none of ours: "
            f"{', '.join(FAMILIES.values())}, each with {CAUSAL} or {SCORING}"
        )

    @property
    def is_scorer(self) -> bool:
        return self.architecture.endswith(SCORING)

    def scoring(self) -> "ModelConfig":
        """The same trunk with a scalar head instead of a vocabulary."""
        return replace(self, architecture=self.family + SCORING)

    def window(self, layer: int) -> int | None:
        """How many positions (its own included) a token sees in this layer; None: all up to its own."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    @staticmethod
    def from_depth(depth: int, *, vocabulary: int, context: int) -> "ModelConfig":
        """The shape that one dial gives: width 64·round(2·depth/3), heads of 64, SwiGLU 8/3 as wide, tied."""
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

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> "ModelConfig":
        """Read the content of a `config.json`. Where a key is absent, transformers' default holds.

        Code that a config names (`auto_map`) is never looked at. NotCovered for what this decoder does not do,
        UserError for what is wrong.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise NotCovered(
                f"model_type {model_type!r} is none of {', '.join(FAMILIES)}; other families open "
                "through transformers (extra `hf`)"
            )
        family = FAMILIES[model_type]
        architecture = (words(config, "architectures") or [family + CAUSAL])[0]
        if architecture not in (family + CAUSAL, family + SCORING):
            raise UserError(f"the architecture {architecture!r} is not of the model_type {model_type!r}")
        if config.get("quantization_config") is not None:
            raise UserError("quantization_config: quantized weights are not supported")
        refuse(config, "hidden_act", "silu")
        refuse(config, "partial_rotary_factor", 1.0)
        if architecture == family + SCORING:
            labels = config.get("id2label")
            if (len(labels) if isinstance(labels, Mapping) else config.get("num_labels")) != 1:
                raise UserError("a scorer has one score: num_labels must be 1")
        sizes: dict[str, Any] = {name: config.get(name) for name in LIMITS}
        heads = sizes["num_attention_heads"]
        if sizes["num_key_value_heads"] is None and family == "Llama":
            sizes["num_key_value_heads"] = heads
        if sizes["head_dim"] is None and family == "Qwen3":
            sizes["head_dim"] = 128
        if sizes["head_dim"] is None:
            whole("num_attention_heads", heads, LIMITS["num_attention_heads"])
            whole("hidden_size", sizes["hidden_size"], LIMITS["hidden_size"])
            sizes["head_dim"] = sizes["hidden_size"] // heads
        bias = flag(config, "attention_bias") and family in ("Qwen3", "Llama")
        theta, scaling = read_rope(config)
        window = config.get("sliding_window", 4096 if family == "Mistral" else None)
        if family == "Llama" or (family != "Mistral" and not flag(config, "use_sliding_window")):
            window = None
        kinds = words(config, "layer_types")
        if kinds is None and window is not None and family != "Mistral":
            first, layers = config.get("max_window_layers", 28), sizes["num_hidden_layers"]
            whole("num_hidden_layers", layers, LIMITS["num_hidden_layers"])
            if type(first) is not int:
                raise UserError(f"max_window_layers must be a whole number, not {first!r}")
            kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        return ModelConfig(
            **sizes,
            architecture=architecture,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            qk_norm=family == "Qwen3",
            qkv_bias=bias or family == "Qwen2",
            output_bias=bias,
            mlp_bias=flag(config, "mlp_bias") and family == "Llama",
            sliding_window=window,
            layer_types=None if kinds is None or window is None else tuple(kinds),
            bos_token_id=token_ids(config, "bos_token_id"),
            eos_token_id=token_ids(config, "eos_token_id"),
            pad_token_id=token_ids(config, "pad_token_id"),
            reward_offset=config.get("reward_offset", 0.0),
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The content of `config.json`, under transformers 5's keys and the older ones of other readers.

        `rope_theta` beside `rope_parameters`, because who knows only the first takes a default in silence;
        `torch_dtype` beside `dtype` likewise.
        """
        family = self.family
        rope = {"rope_type": "llama3" if self.rope_scaling else "default", **(self.rope_scaling or {})}
        eos = self.eos_token_id
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": next(key for key, name in FAMILIES.items() if name == family),
            **{name: getattr(self, name) for name in LIMITS},
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": self.pad_token_id,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        if self.rope_scaling is not None:
            config["rope_scaling"] = rope
        if family in ("Qwen3", "Llama"):
            config["attention_bias"] = self.qkv_bias
        if family == "Llama":
            config["mlp_bias"] = self.mlp_bias
        if family == "Mistral":
            config["sliding_window"] = self.sliding_window
        if family in ("Qwen3", "Qwen2"):
            windows = [self.window(layer) for layer in range(self.num_hidden_layers)]
            kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
            config["layer_types"] = kinds
            config["use_sliding_window"] = self.sliding_window is not None
            config["sliding_window"] = self.sliding_window
            config["max_window_layers"] = kinds.count("full_attention")
        if self.is_scorer:
            config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
            config["reward_offset"] = self.reward_offset
        return config


def whole(name: str, value: object, limit: int) -> None:
    if type(value) is not int or not 0 < value <= limit:
        raise UserError(f"{name} must be a whole number from 1 to {limit:,}, not {value!r}")


def positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e18:
        raise UserError(f"{name} must be a positive number, not {value!r}")


def flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return value


def refuse(config: Mapping[str, Any], name: str, known: object) -> None:
    if config.get(name) not in (None, known):
        raise NotCovered(f"{name} {config[name]!r} is not supported here")


def words(config: Mapping[str, Any], name: str) -> list[str] | None:
    value = config.get(name)
    if value is None or (isinstance(value, list) and value and all(isinstance(word, str) for word in value)):
        return value
    raise UserError(f"{name} must be a list of names, not {value!r}")


def token_ids(config: Mapping[str, Any], name: str) -> Any:
    """A token id, None, or (for the end of text) several."""
    value = config.get(name)
    if name == "eos_token_id" and isinstance(value, list):
        value = tuple(value)
    for id in value if isinstance(value, tuple) else [value]:
        if id is not None and type(id) is not int:
            raise UserError(f"{name} must be a token id or null, not {value!r}")
    return value


def read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, float] | None]:
    """θ, and Llama 3's rule or None: from transformers 5's `rope_parameters` or the older keys."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"rope_parameters must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise NotCovered(f"rope_type {kind!r} is not supported here; default and llama3 are")
    refuse(rope, "partial_rotary_factor", 1.0)
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if kind == "default":
        return theta, None
    defaults = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    return theta, {name: rope.get(name, defaults.get(name)) for name in LLAMA3_RULE}
