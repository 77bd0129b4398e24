"""Are rates and batch that a recipe leaves to be derived near the best? Held-out loss of bases at three depths.

    python bench/sweep.py --text FOLDER             # some 45 trainings, one JSON line each; then what was best

At each depth both rates and the batch are multiplied by 1/4, 1/2, 2 and 4 in turn, the others left as derived (with
another batch the rates follow it), and what is derived is trained with three seeds, whose spread says which differences
mean something.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import say
from learning import LENGTH, held_losses, read, stage, trained

from unmask.recipe.derive import pretraining_batch, pretraining_rates

FACTORS = (0.25, 0.5, 2.0, 4.0)
SEEDS = 3


def trials(factors: tuple[float, ...]) -> Iterator[tuple[str, float, int]]:
    """(what is changed, its factor, seed)."""
    yield from (("derived", 1.0, seed) for seed in range(SEEDS))
    yield from ((name, factor, 0) for name in ("lr", "matrix_lr", "batch") for factor in factors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="sotu", help="a source as a recipe names them")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--vocabulary", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = read(options.text, options.vocabulary, Path(directory))
        for depth in options.depths:
            derived: list[float] = []
            others: dict[str, float] = {}
            for name, factor, seed in trials(tuple(options.factors)):
                batch = max(LENGTH, pretraining_batch(options.tokens))
                if name == "batch":
                    batch = max(LENGTH, int(batch * factor))
                rates = pretraining_rates(depth, batch)
                if name in rates:
                    rates[name] *= factor
                model, objective, optimizer = stage(text, options.tokens, depth, seed, batch, **rates)
                seconds = trained(model, objective, optimizer, seed)
                loss = float(held_losses(model, text).mean())
                if name == "derived":
                    derived.append(loss)
                else:
                    others[f"{name} x {factor:g}"] = loss
                say(
                    "sweep",
                    depth=depth,
                    batch_tokens=batch,
                    lr=rates["lr"],
                    matrix_lr=rates["matrix_lr"],
                    seed=seed,
                    nats_a_token=loss,
                    seconds=seconds,
                )
            best = min(others, key=lambda name: others[name])
            say(
                "sweep",
                depth=depth,
                derived=statistics.mean(derived),
                spread=max(derived) - min(derived),
                best_other={best: others[best]},
                derived_above_best=statistics.mean(derived) - min(others[best], *derived),
            )


if __name__ == "__main__":
    main()
