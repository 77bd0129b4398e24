"""A checkpoint directory, and whether it still is what its record says.

A checkpoint is a Hugging Face model directory with a stage record beside it (record.py). A directory without
a record, as the Hub has them, is a checkpoint too: it has a name and contents, and no ancestry.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.lineage import contents
from unmask.lineage import record as records
from unmask.lineage.contents import short
from unmask.lineage.record import Record, Reference
from unmask.model import foreign, weights
from unmask.model.config import SCORING, NotCovered
from unmask.model.foreign import LanguageModel
from unmask.model.scorer import Scorer
from unmask.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, with the record that stands in it now (None: it has none)."""

    path: Path
    read: records.Read | None
    config: Mapping[str, Any]

    @staticmethod
    def open(path: str | Path) -> "Checkpoint":
        """Raises UserError if there is no checkpoint, or its record or config cannot be understood."""
        path = Path(path)
        if not (path / weights.CONFIG).is_file():
            raise UserError(_no_checkpoint(path))
        file = path / records.FILE
        found = records.read(file) if file.exists() else None
        return Checkpoint(path, found, weights.read_json(path / weights.CONFIG))

    @property
    def record(self) -> Record | None:
        return self.read.record if self.read else None

    @property
    def name(self) -> str:
        return self.record.name if self.record else self.path.resolve().name

    @property
    def kind(self) -> str:
        return self.record.kind if self.record else "unrecorded"

    @property
    def is_language_model(self) -> bool:
        return not any(str(name).endswith(SCORING) for name in self.config.get("architectures") or ())

    @cached_property
    def hash(self) -> str:
        """Of the record; without one, of the contents that a record would name."""
        return self.read.hash if self.read else hash_json(contents.hashes(self.path))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    def model(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel | Scorer:
        """The weights as they lie on disk; a language model that our decoder does not cover is run by transformers
        (extra `hf`). Nothing is verified here: `problems` and `Lineage.load` do."""
        try:
            return weights.load(self.path, dtype=dtype, device=device)
        except NotCovered:
            if not self.is_language_model:
                raise
            return foreign.open(self.path, dtype=dtype, device=device)

    def problems(self) -> list[str]:
        """What here is not as the record says; each a sentence with what, where and what to do."""
        if self.read is None:
            return []
        found = []
        if self.read.hash != self.read.claimed:
            found.append(
                f"the record in {self.path / records.FILE} has been edited: its hash is "
                f"{short(self.read.hash)}, and it was written with {short(self.read.claimed)}."
            )
        found += contents.differences(self.path, self.read.record, writes=self.is_language_model)
        return [f"{self.name}: {clause} {self.remedy}" for clause in found]

    @property
    def remedy(self) -> str:
        stage = (
            "reward" if self.name == "gold" else self.name
        )  # what --from knows: both scorers are one stage
        return f"Restore it from a copy, or build the stage anew with `unmask run … --from {stage}`."

    def refer(self, start: Path) -> Reference:
        """A reference to this checkpoint as it stands in the record of a checkpoint in `start`."""
        return Reference(path=os.path.relpath(self.path.resolve(), start.resolve()), hash=self.hash)


def _no_checkpoint(path: Path) -> str:
    if path.is_file():
        return f"{path} is a file. Give the directory of a checkpoint, as runs/tiny/rl."
    if not path.is_dir():
        hint = (
            f" To fetch it from the Hub: hf download {path} --local-dir DIRECTORY." if _hub_id(path) else ""
        )
        return (
            f"{path}: there is no such directory. Give the directory of a checkpoint, as runs/tiny/rl.{hint}"
        )
    inside = sorted(str(found.parent) for found in path.glob(f"*/{records.FILE}"))
    if inside:
        return f"{path} is a run, not a checkpoint. Give one of its stages: {', '.join(inside)}."
    return f"{path} is not a checkpoint: it has no config.json. Give the directory of a model."


def _hub_id(path: Path) -> bool:
    return not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists()
