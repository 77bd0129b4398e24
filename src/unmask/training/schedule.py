"""The learning rate as a function of tokens: warm-up, stable, decay (WSD)."""

import math


def lr_scale(
    done_tokens: float, total_tokens: float, warmup_tokens: float, decay_tokens: float, floor: float = 0.0
) -> float:
    """The factor on every learning rate when `done_tokens` of `total_tokens` have been trained on.

    Linear from 0 to 1 over the warm-up, 1, then linear from 1 to `floor` over the last `decay_tokens` (Hu
    et al., MiniCPM, arXiv 2404.06395, but with a linear decay). Where warm-up and decay overlap, the
    smaller holds. The loop asks at the middle of a step, so that neither the first nor the last step has
    rate 0.
    """
    rising = done_tokens / warmup_tokens if warmup_tokens > 0 else 1.0
    left = max(0.0, total_tokens - done_tokens) / decay_tokens if decay_tokens > 0 else 1.0
    return min(1.0, rising, floor + (1.0 - floor) * left)


def stable_phase(steps: int, tokens_per_step: int, warmup_tokens: float, decay_tokens: float) -> range:
    """After how many steps a training stands in its stable phase: the warm-up is over, the decay has not begun.

    There the rate does not depend on the training's length: it can be branched, into another decay or into none.
    """
    warm = max(1, math.ceil(warmup_tokens / tokens_per_step))
    # The rate is that of a step's middle; a step at the very edge may round to either side, so it is not counted.
    return range(warm, math.floor(steps - decay_tokens / tokens_per_step + 0.5 - 1e-6) + 1)
