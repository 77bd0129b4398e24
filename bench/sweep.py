"""Are the rates that a recipe leaves to be derived near the best? Held-out loss of bases at three depths.

    python bench/sweep.py --text FOLDER             # some 30 trainings, one JSON line each; then what was best

At each depth both rates are multiplied by 1/4, 1/2, 1, 2 and 4 in turn, the other one left as derived, and the
derived ones are trained with three seeds, whose spread says which differences mean something.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import say
from learning import held_losses, read, stage, trained

from unmask.recipe.derive import pretraining_rates

FACTORS = (0.25, 0.5, 2.0, 4.0)
SEEDS = 3


def trials(depth: int, factors: tuple[float, ...]) -> Iterator[tuple[str, float, int]]:
    """(rate, its factor, seed)."""
    yield from (("derived", 1.0, seed) for seed in range(SEEDS))
    yield from ((rate, factor, 0) for rate in pretraining_rates(depth) for factor in factors)


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
            for rate, factor, seed in trials(depth, tuple(options.factors)):
                rates = pretraining_rates(depth)
                if rate in rates:
                    rates[rate] *= factor
                model, objective, optimizer = stage(text, options.tokens, depth, seed, **rates)
                seconds = trained(model, objective, optimizer, seed)
                loss = float(held_losses(model, text).mean())
                if rate == "derived":
                    derived.append(loss)
                else:
                    others[f"{rate} x {factor:g}"] = loss
                say("sweep", depth=depth, **rates, seed=seed, nats_a_token=loss, seconds=seconds)
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
