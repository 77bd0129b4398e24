"""The scalar head: what it reads, and that transformers reads the same."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, SIZES, decoder, token_ids

from unmask.model import weights
from unmask.model.config import ModelConfig
from unmask.model.scorer import Scorer


def scorer(config: ModelConfig = CONFIGS["qwen3"]) -> Scorer:
    return Scorer.from_decoder(decoder(config), torch.Generator().manual_seed(1))


def test_the_trunk_is_a_copy_of_the_decoders() -> None:
    origin = decoder()
    made = Scorer.from_decoder(origin, torch.Generator().manual_seed(1))
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(made.model(ids), origin.hidden(ids))
        made.model.norm.weight.zero_()
    assert origin.model.norm.weight.abs().min() > 0


def test_the_head_starts_with_variance_one_over_width_plus_one() -> None:
    config = ModelConfig(**{**SIZES, "hidden_size": 4096, "intermediate_size": 8, "num_hidden_layers": 1})
    weight = scorer(config).score.weight
    assert weight.shape == (1, 4096)
    assert abs(weight.std().item() * math.sqrt(4097) - 1) < 0.05


def test_a_score_is_read_at_the_last_real_token_whatever_the_padding_and_the_neighbours() -> None:
    model, ids = scorer(), token_ids(4, 20)
    lengths = torch.tensor([20, 3, 11, 1])
    with torch.no_grad():
        scores = model(ids, lengths)
        values = model.values(ids)
        for row in range(4):
            alone = model(ids[row : row + 1, : lengths[row]], lengths[row : row + 1])
            torch.testing.assert_close(scores[row : row + 1], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values[row, lengths[row] - 1], scores[row], rtol=1e-5, atol=1e-5)
        some = model.values(ids, torch.tensor([2, 27]))
        torch.testing.assert_close(some, values.flatten()[[2, 27]], rtol=1e-5, atol=1e-5)
    assert scores.dtype is values.dtype is torch.float32


def test_scores_of_a_bfloat16_scorer_are_float32() -> None:
    model = scorer().to(torch.bfloat16)
    with torch.no_grad():
        assert model(token_ids(2, 5), torch.tensor([5, 2])).dtype is torch.float32


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama3", "mistral"])
def test_transformers_gives_equal_scores_with_padding_to_the_right(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = scorer(CONFIGS[name]), token_ids(3, 16)
    lengths = torch.tensor([16, 5, 9])
    for row, length in enumerate(lengths):
        ids[row, length:] = 3  # the config's pad_token_id
    weights.save(tmp_path, model)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs).__name__ == CONFIGS[name].family + "ForSequenceClassification"
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs(ids, attention_mask=ids != 3).logits
        assert expected.shape == (3, 1)
        torch.testing.assert_close(model(ids, lengths), expected[:, 0], rtol=1e-4, atol=1e-4)


def test_a_scorer_keeps_its_offset_on_disk_and_scores_stay_raw(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids, lengths = scorer(), token_ids(2, 8), torch.tensor([8, 8])
    model.config = dataclasses.replace(model.config, reward_offset=1.25)
    weights.save(tmp_path, model)
    loaded = weights.load(tmp_path)
    assert isinstance(loaded, Scorer)
    assert loaded.config == model.config
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids, lengths), model(ids, lengths))
        torch.testing.assert_close(theirs(ids).logits[:, 0], model(ids, lengths), rtol=1e-4, atol=1e-4)
