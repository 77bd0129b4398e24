"""The dial: at its ends one of the layers' models, between them the mixture that DESIGN's formula names."""

from collections.abc import Callable, Sequence

import pytest
import torch

from unmask.errors import UserError
from unmask.generation.dial import generate_dial
from unmask.generation.engine import generate
from unmask.model.decoder import Decoder

PROMPTS = [[1, 7, 3], [9], [4, 4, 30, 11, 2, 0, 5]]


@pytest.fixture(scope="module")
def layers(model: Decoder) -> list[Decoder]:
    """A base and two layers over it: the same weights, moved a little each time."""
    made = [model]
    for seed in (1, 2):
        child = Decoder(model.config)
        child.load_state_dict(made[-1].state_dict())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in child.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        made.append(child)
    return made


def dialled(models: Sequence[Decoder], weights: Sequence[float], **settings: object) -> list[list[int]]:
    settings = {"max_new_tokens": 15, "stop_ids": (5,), "temperature": 0.0, "rows": 2} | settings
    return [answer.ids for answer in generate_dial(models, weights, PROMPTS, **settings)]  # type: ignore[arg-type]


def alone(model: Decoder, **settings: object) -> list[list[int]]:
    settings = {"max_new_tokens": 15, "stop_ids": (5,), "temperature": 0.0} | settings
    return [answer.ids for answer in generate(model, PROMPTS, **settings)]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_of_one_and_of_nought_are_the_finished_model_and_the_base(
    layers: list[Decoder], temperature: float
) -> None:
    texts = [alone(layer, temperature=temperature) for layer in layers]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    for weights, layer in (((0, 0), 0), ((1, 0), 1), ((1, 1), 2)):
        assert dialled(layers, weights, temperature=temperature) == texts[layer]


def test_between_its_ends_the_dial_says_neither_layers_text(layers: list[Decoder]) -> None:
    half = dialled(layers, (0.5, 0.5), temperature=0.8)
    assert half != dialled(layers, (0, 0), temperature=0.8)
    assert half != dialled(layers, (1, 1), temperature=0.8)


@torch.no_grad()
def test_recorded_log_probabilities_are_the_mixtures_of_full_forward_passes(layers: list[Decoder]) -> None:
    weights, temperature = (0.3, 1.5), 0.9
    answers = generate_dial(
        layers, weights, PROMPTS, max_new_tokens=12, stop_ids=(), temperature=temperature, seed=4
    )
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer.ids])
        p = [layer(ids)[0, len(prompt) - 1 : -1].log_softmax(-1) for layer in layers]
        mixture = p[0] + weights[0] * (p[1] - p[0]) + weights[1] * (p[2] - p[1])
        expected = (mixture / temperature).log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(answer.log_probs), expected, atol=1e-4, rtol=0)


def test_a_base_alone_is_generate(model: Decoder) -> None:
    assert dialled([model], (), temperature=1.0) == alone(model, temperature=1.0)


def test_layers_of_other_sizes_mix_and_the_shortest_context_holds(decoder: Callable[..., Decoder]) -> None:
    small = decoder(3, num_hidden_layers=1, hidden_size=16, max_position_embeddings=10)
    models = [small, decoder(4)]
    assert dialled(models, (1,), stop_ids=()) != dialled(models, (0,), stop_ids=())
    assert [len(ids) for ids in dialled(models, (0.5,), stop_ids=())] == [
        10 - len(prompt) for prompt in PROMPTS
    ]


def test_layers_and_weights_that_do_not_fit_are_named(
    layers: list[Decoder], decoder: Callable[..., Decoder]
) -> None:
    with pytest.raises(UserError, match="3 layers have 2 above the base"):
        dialled(layers, (1,))
    with pytest.raises(UserError, match="vocabularies differ"):
        dialled([layers[0], decoder(vocab_size=77)], (1,))
    with pytest.raises(UserError, match="at least a base"):
        dialled([], ())
