"""Single steps through packed weights against the decoder's own forward pass."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, decoder, token_ids

from unmask.model import precision
from unmask.model.cache import Cache
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.step import LARGEST, worth_packing


def steps(model: Decoder, packed: bool, lengths: list[int]) -> torch.Tensor:
    """Hidden states of four single steps after prompts of these lengths."""
    ids, lengths_B = token_ids(len(lengths), 20), torch.tensor(lengths)
    cache = Cache(model.config, len(lengths), 20, model.head.dtype, "cpu")
    rows, found = torch.arange(len(lengths)), []
    with torch.no_grad():
        model.hidden(ids[:, : max(lengths)], cache=cache)
    cache.advance(lengths_B)
    for _ in range(4):
        # With gradients on, nothing is packed.
        with torch.set_grad_enabled(not packed):
            found.append(model.hidden(ids[rows, cache.lengths_B][:, None], cache=cache)[:, 0])
        cache.advance(1)
        assert (cache.step is not None) == packed
        if not packed:  # the cache holds tensors, not their history
            cache.k, cache.v = cache.k.detach(), cache.v.detach()
    return torch.stack(found)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [9, 1, 4]], ids=["one", "even", "uneven"])
def test_packed_steps_equal_the_forward_pass(config: ModelConfig, lengths: list[int]) -> None:
    model = decoder(config)
    torch.testing.assert_close(
        steps(model, True, lengths), steps(model, False, lengths), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", ["qwen3-untied-bias", "smollm"])
def test_packed_steps_in_bfloat16_are_near_those_in_float32(
    name: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "processor_has_bfloat16", lambda: native)
    model = decoder(CONFIGS[name], spread=0.1)
    exact = steps(model, True, [5, 3])
    rounded = steps(model.to(torch.bfloat16), True, [5, 3])
    assert rounded.dtype is torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.999


def test_steps_in_float64_are_float64() -> None:
    model = decoder()
    single, double = steps(model, True, [5, 3]), steps(model.double(), True, [5, 3])
    assert double.dtype is torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


def test_an_empty_cache_takes_its_first_token_by_a_step() -> None:
    model, ids = decoder(), token_ids(2, 1)
    with torch.no_grad():
        first = model.hidden(ids, cache=Cache(model.config, 2, 4, torch.float32, "cpu"))
        torch.testing.assert_close(first, model.hidden(ids), rtol=1e-4, atol=1e-5)


def test_large_models_and_caches_of_one_place_are_not_packed() -> None:
    small = CONFIGS["qwen3"]
    cache = Cache(small, 1, 2, torch.float32, "cpu")
    with torch.no_grad():
        assert worth_packing(small, cache)
        assert not worth_packing(replace(small, intermediate_size=LARGEST // (3 * 3 * 32)), cache)
        assert not worth_packing(small, Cache(small, 1, 1, torch.float32, "cpu"))
    assert not worth_packing(small, cache)


def test_a_trained_model_steps_with_its_new_weights_in_a_new_cache() -> None:
    model = decoder()
    before = steps(model, True, [5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(steps(model, True, [5]), steps(model, False, [5]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steps(model, True, [5]), before)


def test_measuring_first_does_not_hinder_learning() -> None:
    model, ids = decoder(), token_ids(1, 6)
    with torch.inference_mode():  # what is kept between passes must not be an inference tensor's
        measured = model(ids)
    logits = model(ids)
    logits.sum().backward()
    assert torch.equal(logits.detach(), measured)
    assert all(parameter.grad is not None for parameter in model.parameters())
