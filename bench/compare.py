"""Time of comparing two checkpoints with random weights, token by token, in float32: KL both ways, Jensen–Shannon,
entropy and the rank of the likeliest token, over the whole vocabulary.

    python bench/compare.py --shape S    # one JSON line: tokens/s that both models read
"""

import argparse

import torch
from harness import SHAPES, decoder, say, seconds_of

from unmask.probes.forward import Text, teacher_forced
from unmask.probes.profile import read_pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    models = [decoder(options.shape, seed) for seed in (0, 1)]
    _, _, vocabulary, length, _, _ = SHAPES[options.shape]
    ids_BT = torch.randint(vocabulary, (options.rows, length + 1), generator=torch.Generator().manual_seed(0))
    texts = [Text(row, 1) for row in ids_BT.tolist()]
    seconds = seconds_of(lambda: teacher_forced(models, texts, read_pairs([(0, 1)])), options.times)
    say(
        "compare",
        shape=options.shape,
        dtype="fp32",
        tokens_per_second=options.rows * length / seconds["median"],
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
