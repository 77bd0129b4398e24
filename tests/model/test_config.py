"""Reading and writing config.json."""

import dataclasses
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, LLAMA3, SIZES

from unmask.errors import UserError
from unmask.model.config import ModelConfig

QWEN3 = CONFIGS["qwen3"].to_hf()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("scorer", [False, True])
def test_what_is_written_reads_back_as_the_same(config: ModelConfig, scorer: bool) -> None:
    config = dataclasses.replace(config, bos_token_id=1, eos_token_id=(2, 0))
    if scorer:
        config = dataclasses.replace(config.scoring(), reward_offset=-0.5)
    back = ModelConfig.from_hf(config.to_hf())
    assert [back.window(i) for i in range(3)] == [config.window(i) for i in range(3)]
    assert dataclasses.replace(back, layer_types=config.layer_types) == config


@pytest.mark.parametrize("family", ["Qwen3Config", "Qwen2Config", "LlamaConfig", "MistralConfig"])
def test_an_absent_key_means_what_it_means_to_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    keys = {name: size for name, size in SIZES.items() if name not in ("head_dim", "pad_token_id")}
    if family == "LlamaConfig":
        del keys["num_key_value_heads"]
    theirs = getattr(transformers, family)(**keys)
    ours = ModelConfig.from_hf({**keys, "model_type": theirs.model_type})
    expected = ModelConfig.from_hf(theirs.to_dict())
    ignored = {"bos_token_id": None, "eos_token_id": None, "layer_types": None}
    assert dataclasses.replace(ours, **ignored) == dataclasses.replace(expected, **ignored)


def test_both_names_of_what_readers_would_default_in_silence_are_written() -> None:
    config = dataclasses.replace(CONFIGS["llama3"], rope_theta=123.0).to_hf("bfloat16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 123.0
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert "rope_scaling" not in QWEN3


@pytest.mark.parametrize("old", [True, False])
def test_rope_is_read_from_either_generation_of_keys(old: bool) -> None:
    base = {k: v for k, v in CONFIGS["llama2"].to_hf().items() if not k.startswith("rope")}
    rope = {"rope_type": "llama3", **LLAMA3}
    keys: dict[str, Any] = (
        {"rope_theta": 5e5, "rope_scaling": rope} if old else {"rope_parameters": {**rope, "rope_theta": 5e5}}
    )
    config = ModelConfig.from_hf(base | keys)
    assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)


def test_windows_follow_each_familys_rule() -> None:
    qwen = QWEN3 | {"sliding_window": 7, "layer_types": None}
    assert ModelConfig.from_hf(qwen | {"use_sliding_window": False}).window(2) is None
    some = ModelConfig.from_hf(qwen | {"use_sliding_window": True, "max_window_layers": 2})
    assert [some.window(layer) for layer in range(3)] == [None, None, 7]
    mistral = CONFIGS["mistral"].to_hf()
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).window(0) is None
    del mistral["sliding_window"]
    assert ModelConfig.from_hf(mistral).window(0) == 4096


@pytest.mark.parametrize(
    ("depth", "width", "hidden", "heads"),
    [(1, 64, 160, 1), (4, 192, 512, 3), (6, 256, 672, 4), (12, 512, 1376, 8)],
)
def test_one_dial_gives_the_shape(depth: int, width: int, hidden: int, heads: int) -> None:
    config = ModelConfig.from_depth(depth, vocabulary=4096, context=256)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (depth, width, hidden)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, heads, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (4096, 256)
    assert config.tie_word_embeddings
    assert config.architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none of qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["LlamaForCausalLM"]}, "is not of the model_type 'qwen3'"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be a list"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"head_dim": None, "num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope scaling: low_freq_factor"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"use_sliding_window": True, "sliding_window": -3}, "sliding_window must be a whole number"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
            "1 of 3 layers",
        ),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["odd"] * 3}, "'odd' is not"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id"),
        ({"pad_token_id": [3]}, "pad_token_id must be a token id"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "num_labels must be 1"),
        ({"reward_offset": "x"}, "reward_offset must be a number"),
    ],
)
def test_what_cannot_be_run_faithfully_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(QWEN3 | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": False},
        {"mlp_bias": True},
        {"architecture": "Qwen2ForCausalLM", "qk_norm": False},
        {"architecture": "MistralForCausalLM", "qk_norm": False, "qkv_bias": True, "output_bias": True},
        {"architecture": "LlamaForCausalLM", "qk_norm": False, "sliding_window": 8},
        {"architecture": "Qwen3ForCausalLM", "qkv_bias": True},
        {"architecture": "GPT2LMHeadModel"},
    ],
)
def test_what_a_familys_config_could_not_say_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ModelConfig(**(SIZES | changes))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # of the machine, when others work on it
@given(st.dictionaries(st.sampled_from(sorted(QWEN3)), json_values, max_size=3))
def test_any_json_gives_a_config_or_a_user_error(changes: dict[str, Any]) -> None:
    with suppress(UserError):
        ModelConfig.from_hf(QWEN3 | changes)
