"""Writing a checkpoint: the whole directory appears at once, or nothing of it does."""

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unmask.errors import UserError
from unmask.files import atomic_directory
from unmask.lineage import contents
from unmask.lineage import record as records
from unmask.lineage.card import model_card
from unmask.lineage.chain import Lineage
from unmask.lineage.checkpoint import Checkpoint
from unmask.lineage.contents import short
from unmask.lineage.record import Record
from unmask.model import native, weights
from unmask.model.decoder import Decoder
from unmask.model.scorer import Scorer
from unmask.text.tokenizer import Tokenizer

PACKAGES = ("unmask", "torch", "numpy", "safetensors", "tokenizers", "tiktoken")


def write_checkpoint(
    path: Path,
    *,
    model: Decoder | Scorer,
    tokenizer: Tokenizer,
    name: str,
    kind: str,
    parent: Checkpoint | None,
    data: Mapping[str, str],
    recipe: Mapping[str, Any],
    seed: int,
    steps: int,
    tokens: int,
    flops: float,
    seconds: float,
    peak_bytes: int,
    metrics: Mapping[str, Any],
    inputs: Mapping[str, Checkpoint] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Write weights, tokenizer, record and card to `path`.

    The order of `metrics` counts: the first number is the stage's headline. Raises UserError if `path` exists, the
    name is taken by an ancestor, the tokenizer is not the parent's, or the disk refuses.
    """
    if parent is not None:
        _refuse(name, tokenizer, parent)
    with atomic_directory(path) as directory:
        try:
            weights.save(directory, model, dtype=dtype)
        except SafetensorError as error:  # not an OSError, even where the disk is full
            raise UserError(
                f"cannot write the weights of {path}: {error}. Make room or choose another directory; "
                "nothing of this checkpoint was left behind, and what was there before is untouched."
            ) from error
        tokenizer.save(directory)
        if isinstance(model, Decoder):
            stops = json.dumps(contents.generation_config(tokenizer), indent=2) + "\n"
            (directory / "generation_config.json").write_text(stops, "utf-8")
        record = Record(
            name=name,
            kind=kind,
            parent=parent.refer(path) if parent else None,
            inputs={role: checkpoint.refer(path) for role, checkpoint in (inputs or {}).items()},
            **contents.hashes(directory),
            data=dict(data),
            recipe=dict(recipe),
            seed=seed,
            steps=steps,
            tokens=tokens,
            flops=flops,
            seconds=seconds,
            peak_bytes=peak_bytes,
            dtype=str(dtype).removeprefix("torch."),
            metrics=dict(metrics),
            versions=_versions(),
        )
        (directory / records.FILE).write_text(record.dumps(), "utf-8")
        (directory / "README.md").write_text(model_card(record), "utf-8")
    return Checkpoint.open(path)


def _refuse(name: str, tokenizer: Tokenizer, parent: Checkpoint) -> None:
    ancestors = [checkpoint.name for checkpoint in Lineage.open(parent.path).checkpoints]
    if name in ancestors:
        raise UserError(
            f"the name {name!r} is taken in this lineage ({', '.join(ancestors)}). Choose another."
        )
    theirs = parent.tokenizer().hash
    if theirs != tokenizer.hash:
        raise UserError(
            f"{name} has another tokenizer ({short(tokenizer.hash)}) than its parent {parent.path} "
            f"({short(theirs)}): layers of one lineage share one. Use the parent's."
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found | {"CPU kernels": native.built().words}
