"""Making shards of text, and what reading them costs a training step.

    python bench/data.py --mb 400               # made-up words
    python bench/data.py --text books.jsonl     # a source of your own, as often as makes `mb` of it

One JSON line. `build`: MB/s from a file to shards, cores that it used, MB by which memory grew at most. `read`: ms that
the batch of a step takes, of pretraining (`cold`: with no page of the shards in memory, where the system grants that)
and of SFT, and its fraction of a training step of that kind.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from itertools import chain, count, cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import DTYPES, SHAPES, config, dtype_here, say, seconds_of
from stage_step import ADAMW, imitation

from unmask.stages import pretrain
from unmask.text.shards import Shards, build
from unmask.text.sources import read_texts
from unmask.text.tokenizer import Tokenizer
from unmask.training import machine
from unmask.training.loop import Objective, train_step
from unmask.training.optimizer import Optimizer

STEPS = 64  # that are read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--mb", type=float, default=200)
    parser.add_argument("--text", help="a source as in recipes")
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        text, shards = Path(temporary) / "text.jsonl", Path(temporary) / "shards"
        write(text, options.text, options.mb * 1e6)
        tokenizer = Tokenizer.train(islice(read_texts(str(text)), 1000), SHAPES[options.shape][2])
        building = built(shards, text, tokenizer)
        cold = cold_read(options.shape, shards)
        read = {
            "pretrain": of_a_step(*pretraining(options.shape, shards), options.times) | {"cold": cold},
            "sft": of_a_step(*imitation(options.shape, DTYPES[dtype_here()]), options.times),
        }
    say("data", shape=options.shape, dtype=dtype_here(), build=building, read=read)


def write(path: Path, source: str | None, size: float) -> None:
    """The source's texts, again and again, until there are `size` bytes of them."""
    texts = chain.from_iterable(read_texts(source) for _ in count()) if source else cycle(made_up())
    with path.open("w", encoding="utf-8") as file:
        while size > 0:
            text = next(texts)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size -= len(text.encode())


def made_up() -> Iterator[str]:
    """Documents of 800 words, few of which are frequent."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdfglmnprst", k=draw.randint(2, 9))) for _ in range(20_000)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    for _ in range(1000):
        yield " ".join(draw.choices(words, frequencies, k=800))


def built(directory: Path, text: Path, tokenizer: Tokenizer) -> dict[str, float]:
    device = machine.pick_device("cpu")
    machine.reset_peak_memory(device)
    before, cpu, start = machine.peak_memory(device), time.process_time(), time.perf_counter()
    shards = build(directory, read_texts(str(text)), tokenizer)
    seconds = time.perf_counter() - start
    return {
        "mb": int(shards.document_bytes.sum()) / 1e6,
        "mb_per_second": int(shards.document_bytes.sum()) / 1e6 / seconds,
        "cores": (time.process_time() - cpu) / seconds,
        "grown_mb": (machine.peak_memory(device) - before) / 2**20,
    }


def pretraining(shape: str, directory: Path) -> tuple[Objective, Optimizer]:
    _, _, _, length, rows, _ = SHAPES[shape]
    shards = Shards.open(directory)
    _, objective, optimizer = pretrain.stage(
        config(shape), [pretrain.Source("text", shards, 1.0)], length=length, tokens=shards.tokens,
        batch_tokens=rows * length, micro_tokens=rows * length, end_of_text=0, settings=ADAMW,
        dtype=DTYPES[dtype_here()], device=machine.pick_device(), seed=0,
    )  # fmt: skip
    return objective, optimizer


def cold_read(shape: str, directory: Path) -> dict[str, float]:
    objective, _ = pretraining(shape, directory)
    objective.micro_batches(0)  # draws the order of the epoch
    file = os.open(directory / "tokens.bin", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    return reading(objective)


def reading(objective: Objective) -> dict[str, float]:
    """ms of a step's batch, mean and longest of STEPS."""
    taken = []
    for step in range(1, 1 + STEPS):
        start = time.perf_counter()
        batches = objective.micro_batches(step % objective.steps)
        if isinstance(objective, pretrain.Pretraining):  # its rows are read when their loss is made
            for batch in batches:
                objective.read(batch)
        taken.append(1000 * (time.perf_counter() - start))
    return {"ms": sum(taken) / STEPS, "most_ms": max(taken)}


def of_a_step(objective: Objective, optimizer: Optimizer, times: int) -> dict[str, float]:
    step_ms = 1000 * seconds_of(lambda: train_step(objective, optimizer, 0, 1.0, 1.0), times)["median"]
    read = reading(objective)
    return {**read, "step_ms": step_ms, "fraction": read["ms"] / step_ms}


if __name__ == "__main__":
    main()
