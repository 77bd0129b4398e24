"""Models small enough to train in a test, and made-up ids for them to read."""

from collections.abc import Sequence

import torch

from unmask.generation.engine import Answer
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer

VOCABULARY, CONTEXT = 64, 48
END_OF_TEXT, STOP, PAD = 0, 2, 3
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=CONTEXT,
)


def decoder(seed: int, config: ModelConfig = CONFIG) -> Decoder:
    """A fresh decoder whose logits differ clearly between tokens, as a trained one's do."""
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 5
    return model


def scorer(seed: int) -> Scorer:
    return Scorer.from_decoder(decoder(seed), torch.Generator().manual_seed(seed))


def rows(seed: int, n: int, longest: int) -> list[list[int]]:
    """n rows of 1 to `longest` ids, none of them a control token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def answer(ids: Sequence[int]) -> Answer:
    """As if the sampler had written it: finished if it ends with the stop token."""
    return Answer(list(ids), [-1.0] * len(ids), ids[-1] == STOP)
