"""Every layer turned up or down while it writes: tokens drawn from log p ∝ log p_0 + Σ_k a_k · delta_k."""

from collections.abc import Collection, Sequence

from torch import Tensor

from unmask import delta
from unmask.errors import UserError
from unmask.generation.engine import Answer, Settings, answer, to_requests
from unmask.model.foreign import LanguageModel


def generate_dial(
    models: Sequence[LanguageModel],
    weights: Sequence[float],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    rows: int = 64,
) -> list[Answer]:
    """`generate` from the mixture of the layers' models, oldest first, with a weight for each above the base.

    Weights (1, …, 1) are the finished model, (0, …, 0) the base, (0.5, …) half a layer; below 0 and above 1
    they go on. All models read the same tokens in step, each with a cache of its own: a token costs a forward
    pass of each. Recorded log-probabilities are the mixture's.

    Raises UserError as `generate` does, and for weights or vocabularies that do not fit together.
    """
    if not models:
        raise UserError("the dial needs at least a base model")
    if len(weights) != len(models) - 1:
        raise UserError(
            f"{len(models)} layers have {len(models) - 1} above the base: give as many weights, "
            f"not {len(weights)}"
        )
    sizes = [model.config.vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise UserError(
            f"the layers' vocabularies differ ({', '.join(map(str, sizes))}): they must share one"
        )

    def mixed(logits: Sequence[Tensor]) -> Tensor:
        return delta.mix(logits[0], logits[1:], weights)

    settings = Settings(stop_ids, temperature, top_k, top_p, seed)
    return answer(models, mixed, to_requests(models, prompts, max_new_tokens, streams), settings, rows)
