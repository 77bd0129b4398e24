"""A decoder's trunk with one number for a head: reward models, and the value function of PPO."""

import copy
import math

import torch
from torch import Tensor, nn

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder, Linear, Trunk
from unmask.model.precision import wide


class Scorer(nn.Module):
    """Scores a sequence at its last real token. Saved as `…ForSequenceClassification` with one label.

    transformers finds that token as the last one that is not `pad_token_id`, we by its length, so that a
    padding id inside a text changes nothing here. Scores are raw: `config.reward_offset` is for the caller
    to subtract.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.is_scorer
        self.config = config
        self.model = Trunk(config)
        self.score = Linear(config.hidden_size, 1)

    @staticmethod
    @torch.no_grad()
    def from_decoder(decoder: Decoder, generator: torch.Generator) -> "Scorer":
        """A copy of the decoder's trunk, and a head drawn from N(0, 1/(D + 1)) (variance; no bias)."""
        config = decoder.config.scoring()
        weight = decoder.model.norm.weight
        with torch.device("meta"):
            scorer = Scorer(config)
        scorer.model = copy.deepcopy(decoder.model)
        scorer.model.config = config
        scorer.score = Linear(config.hidden_size, 1).to(weight.device, weight.dtype)
        scorer.score.weight.normal_(0.0, 1 / math.sqrt(config.hidden_size + 1), generator=generator)
        return scorer

    def values(self, ids_BT: Tensor, at_N: Tensor | None = None) -> Tensor:
        """The head at every position (B, T), or at these of the flattened (B·T), (N,); float32 (float64 stays)."""
        return self._read(self.model(ids_BT, at_N=at_N))

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores (B,) float32 of rows padded to the right, read at token length − 1."""
        starts_B = torch.arange(ids_BT.shape[0], device=ids_BT.device) * ids_BT.shape[1]
        return self._read(self.model(ids_BT, at_N=starts_B + lengths_B - 1))

    def _read(self, hidden: Tensor) -> Tensor:
        return wide(hidden) @ wide(self.score.weight[0])
