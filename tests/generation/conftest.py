"""Small random decoders whose next token hangs on the whole context."""

from collections.abc import Callable

import pytest
import torch

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder

VOCABULARY, CONTEXT = 61, 48


def build(seed: int = 0, **changes: object) -> Decoder:
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    model = Decoder(ModelConfig(**(sizes | changes)))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # as initialised, a token would mostly repeat itself
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def decoder() -> Callable[..., Decoder]:
    """decoder(seed=0, **changes to the configuration)."""
    return build


@pytest.fixture(scope="session")
def model() -> Decoder:
    return build()
