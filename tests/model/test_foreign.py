"""Families that transformers runs for us."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, decoder, token_ids

from unmask.errors import UserError
from unmask.generation.engine import generate
from unmask.lineage import Checkpoint
from unmask.model import foreign, weights
from unmask.model.config import NotCovered

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def saved(config: object, directory: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # wide enough for a cap on the logits to bend them
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        transformers.Gemma2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0
        ),
        transformers.CohereConfig(**SMALL, intermediate_size=48, logit_scale=0.25),
        transformers.GraniteConfig(**SMALL, intermediate_size=48, logits_scaling=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_from_hidden_states_and_head_are_those_of_transformers(config: object, tmp_path: Path) -> None:
    model, ids = foreign.open(saved(config, tmp_path)), token_ids(2, 12)
    with torch.no_grad():
        hidden = model.hidden(ids)
        torch.testing.assert_close(model.logits(hidden), model(ids), rtol=1e-4, atol=1e-4)
    assert model.head.shape == (96, 32)
    assert model.config.vocab_size == 96
    assert model.config.max_position_embeddings >= 64


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        {"hidden_act": "gelu"},
    ],
    ids=["linear", "yarn", "gelu"],
)
def test_what_our_decoder_does_not_cover_of_a_family_of_ours_is_run_by_transformers(
    changes: dict[str, object], tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, **changes)
    directory, ids = saved(config, tmp_path), token_ids(2, 12)
    model = Checkpoint.open(directory).model()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotCovered):
        weights.load(directory)


def test_it_writes_what_transformers_writes_from_prompts_of_unequal_length(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=95
    )
    model = foreign.open(saved(config, tmp_path))
    prompts = [token_ids(1, n)[0].tolist() for n in (3, 9, 1, 6)]
    said = generate(model, prompts, max_new_tokens=[8, 5, 7, 6], stop_ids=[95], temperature=0.0, rows=2)
    for prompt, answer, limit in zip(prompts, said, [8, 5, 7, 6], strict=True):
        theirs = model.inner.generate(
            torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, pad_token_id=0
        )
        assert answer.ids == theirs[0, len(prompt) :].tolist()


def test_rows_that_are_selected_keep_what_they_have_read() -> None:
    cache, ids = foreign.TokenCache(3, 4, torch.device("cpu")), torch.arange(12).view(3, 4)
    cache.ids_BT.copy_(ids)
    cache.advance(torch.tensor([4, 2, 3]))
    cache.select(torch.tensor([2, 0]))
    assert cache.ids_BT.tolist() == ids[[2, 0]].tolist()
    assert cache.lengths_B.tolist() == [3, 4]


def test_a_family_of_ours_gives_the_same_through_transformers(tmp_path: Path) -> None:
    ours, ids = decoder(CONFIGS["qwen3"]), token_ids(2, 12)
    weights.save(tmp_path, ours)
    with torch.no_grad():
        torch.testing.assert_close(foreign.open(tmp_path)(ids), ours(ids), rtol=1e-4, atol=1e-4)


def test_logits_made_in_an_unknown_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.CohereConfig(**SMALL, intermediate_size=48, logit_scale=0.25)
    saved(config, tmp_path)
    real = foreign.Foreign.__init__

    def blind(self: foreign.Foreign, model: object) -> None:
        real(self, model)
        self.scale = 1.0

    monkeypatch.setattr(foreign.Foreign, "__init__", blind)
    with pytest.raises(UserError, match="CohereForCausalLM makes its logits"):
        foreign.open(tmp_path)


def test_what_transformers_cannot_open_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        foreign.open(tmp_path)


def lacking(directory: Path, how: str) -> None:
    """Spoil the weights in a directory."""
    file = directory / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "layers.1" in name)
    if how == "missing":
        del state[name]
    elif how == "shape":
        state[name] = state[name][:-1].contiguous()
    elif how == "NaN":
        state[name] = state[name] * float("nan")
    save_file(state, file, {"format": "pt"})
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "missing 1 of the weights, as model.layers.1"),
        ("shape", "transformers cannot open it"),
        ("NaN", r"model\.layers\.1.* holds NaN"),
        ("cut", "transformers cannot open it"),
    ],
)
def test_weights_that_are_not_whole_are_refused_and_never_drawn_at_random(
    how: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved(transformers.LlamaConfig(**SMALL, intermediate_size=48, hidden_act="gelu"), tmp_path)
    lacking(tmp_path, how)
    verbosity = transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    with pytest.raises(UserError, match=said):
        Checkpoint.open(tmp_path).model()
    assert capfd.readouterr() == ("", "")  # the sentence says it all
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_hidden_layers": 1},
            r"model\.layers\.1.* is no tensor of the model that config\.json describes",
        ),
        ({"hidden_act": 5}, "transformers cannot open it"),
        ({"num_attention_heads": 3}, "cannot open it"),
        ({"num_attention_heads": 0}, "."),
    ],
)
def test_a_config_that_is_wrong_for_the_weights_is_a_sentence(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    saved(transformers.LlamaConfig(**SMALL, intermediate_size=48, hidden_act="gelu"), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        Checkpoint.open(tmp_path).model()


def test_a_scorer_that_our_decoder_does_not_cover_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=48, hidden_act="gelu", num_labels=1, pad_token_id=0
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_act 'gelu' is not supported"):
        Checkpoint.open(tmp_path).model()


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    saved(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot open"):
        foreign.open(tmp_path)


def test_code_that_comes_with_a_model_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def opened(source: object, **keys: object) -> None:
        asked.update(keys)
        raise OSError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", opened)
    with pytest.raises(UserError):
        foreign.open(tmp_path)
    assert asked["trust_remote_code"] is False
