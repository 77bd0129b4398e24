"""Do the derived rates carry over widths? How far a few steps move each layer's output, at several widths.

    python bench/coordinates.py     # one JSON line a width

The coordinate check of Yang et al., arXiv 2203.03466 (appendix D): where rates carry over, the root mean square of what
a step changes in a hidden state neither grows nor shrinks with the width. Depth stays, so that width alone is seen; the
rates are those that `derive` gives for a width, on random tokens whose next token can be learned.
"""

import argparse
import math
from dataclasses import replace

import torch
from harness import say
from torch import Tensor

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.model.loss import cross_entropy_sum
from unmask.recipe.derive import pretraining_rates
from unmask.training.optimizer import Optimizer, OptimizerSettings

VOCABULARY, LENGTH, ROWS = 512, 64, 16


def moved(width: int, depth: int, steps: int, seed: int = 0) -> dict[str, float]:
    """Root mean square of the change in each block's output (B·T, D), and in the logits, that `steps` steps make."""
    config = replace(
        ModelConfig.from_depth(depth, vocabulary=VOCABULARY, context=LENGTH),
        hidden_size=width,
        intermediate_size=32 * round(8 * width / 3 / 32),
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    rates = pretraining_rates(depth_of(width))
    optimizer = Optimizer(model, OptimizerSettings(lr=rates["lr"], matrix_lr=rates["matrix_lr"]))
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    ids[:, 1::2] = (ids[:, 0:-1:2] * 7 + 1) % VOCABULARY  # every other token follows from the one before it
    before = outputs(model, ids[:, :-1])
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        torch.autograd.backward(
            cross_entropy_sum(hidden, model.head, ids[:, 1:].flatten()) / ids[:, 1:].numel()
        )
        optimizer.clip(1.0)
        optimizer.step(1.0)
    after = outputs(model, ids[:, :-1])
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def depth_of(width: int) -> int:
    """The depth whose derived width this is."""
    return round(1.5 * width / 64)


@torch.no_grad()
def outputs(model: Decoder, ids_BT: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda module, inputs, y, i=i: found.update({f"block {i}": y.float()}))
        for i, block in enumerate(model.model.layers)
    ]
    found["logits"] = model(ids_BT).float()
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    sizes = [moved(width, options.depth, options.steps) for width in options.widths]
    for width, size in zip(options.widths, sizes, strict=True):
        say("coordinates", width=width, depth=options.depth, steps=options.steps, moved=size)
    slopes = {
        name: math.log(sizes[-1][name] / sizes[0][name]) / math.log(options.widths[-1] / options.widths[0])
        for name in sizes[0]
    }
    say("coordinates", grows_as_width_to_the=slopes)


if __name__ == "__main__":
    main()
