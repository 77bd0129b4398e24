"""Time of generation with random weights: a prompt of 32 ids, 128 new ones, sampled at temperature 1.

    python bench/generate.py --shape S --batch 16    # one JSON line: tokens/s

`gen(shape, dtype)` gives generate(prompt_ids_BP, new_tokens) → tokens made, to whoever times it beside others.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # `harness`, also for whoever loads this file by its path
from harness import DTYPES, SHAPES, decoder, dtype_here, say, seconds_of

from unmask.generation.engine import generate

PROMPT, NEW = 32, 128


def gen(shape: str, dtype: str) -> Callable[[Tensor, int], int]:
    model = decoder(shape, context=1024).to(DTYPES[dtype])

    def run(prompt_ids_BP: Tensor, new_tokens: int) -> int:
        prompts = prompt_ids_BP.tolist()
        answers = generate(
            model, prompts, max_new_tokens=new_tokens, stop_ids=(), temperature=1.0, rows=len(prompts)
        )
        return sum(len(answer.ids) for answer in answers)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    dtype = dtype_here()
    run = gen(options.shape, dtype)
    vocabulary = SHAPES[options.shape][2]
    prompts = torch.randint(vocabulary, (options.batch, PROMPT), generator=torch.Generator().manual_seed(0))
    seconds = seconds_of(lambda: run(prompts, NEW), options.times)
    say(
        "generate",
        shape=options.shape,
        batch=options.batch,
        dtype=dtype,
        tokens_per_second=options.batch * NEW / seconds["median"],
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
