"""Who came from whom: follows the ancestry of a checkpoint, verifies it, and loads its layers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmask.errors import UserError
from unmask.lineage import record as records
from unmask.lineage.checkpoint import Checkpoint
from unmask.lineage.contents import short
from unmask.lineage.record import Reference
from unmask.model import weights
from unmask.model.foreign import LanguageModel
from unmask.model.scorer import Scorer
from unmask.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Layer:
    """A language model of a lineage, loaded: what blame, diff, the dial and chat take."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    hash: str = ""


@dataclass(frozen=True)
class Lineage:
    """A checkpoint and its ancestors, oldest first. `broken` says why the chain ends early, if it does; `beside`
    are the other checkpoints of the run that was opened, on which its figures rest."""

    checkpoints: tuple[Checkpoint, ...]
    broken: str | None = None
    beside: tuple[Checkpoint, ...] = ()

    @staticmethod
    def open(path: str | Path) -> "Lineage":
        """Follow the parents as far as they can be found. A run stands for the last of its layers.

        Raises UserError if `path` is neither a checkpoint nor a run with one.
        """
        tip = tip_of_run(Path(path))
        chain = [Checkpoint.open(tip or path)]
        files = sorted(Path(path).glob(f"*/{records.FILE}")) if tip else []
        beside = tuple(Checkpoint.open(file.parent) for file in files)
        while (record := chain[0].record) is not None and record.parent is not None:
            found = _follow(chain[0], "parent", record.parent)
            if isinstance(found, str):
                return Lineage(tuple(chain), found, beside)
            if found.path.resolve() in [checkpoint.path.resolve() for checkpoint in chain]:
                circle = f"{chain[0].name}: its parent {found.path} descends from it. {chain[0].remedy}"
                return Lineage(tuple(chain), circle, beside)
            chain.insert(0, found)
        return Lineage(tuple(chain), None, beside)

    @property
    def tip(self) -> Checkpoint:
        return self.checkpoints[-1]

    @property
    def layers(self) -> tuple[Checkpoint, ...]:
        """The language models of the chain: a reward model scores and writes nothing."""
        return tuple(checkpoint for checkpoint in self.checkpoints if checkpoint.is_language_model)

    def verify(self) -> list[str]:
        """Everything that does not hold: contents, links, and the further checkpoints that took part."""
        if self.tip.read is None:
            return [
                f"{self.tip.name}: {self.tip.path} has no {records.FILE}, so nothing says what it should "
                "hold or where it comes from. unmask can read it, not verify it."
            ]
        return self._problems(inputs=True)

    def load(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Layer]:
        """The layers, oldest first, in one vocabulary. Raises UserError if the chain does not hold, or if it ends in
        a model that writes nothing."""
        if not self.tip.is_language_model:
            below = f": give {self.layers[-1].path}" if self.layers else ""
            raise UserError(f"{self.tip.path} scores text and writes none{below}.")
        _refuse(self._problems(inputs=False), self.tip)
        return load_layers(self.layers, dtype, device)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row a checkpoint, oldest first: what `unmask log` prints."""
        return [_row(checkpoint) for checkpoint in self.checkpoints]

    def _problems(self, *, inputs: bool) -> list[str]:
        problems: list[str] = []
        visited: set[Path] = set()

        def visit(checkpoint: Checkpoint) -> None:
            visited.add(checkpoint.path.resolve())
            record = checkpoint.record
            references = {"parent": record.parent} if record and record.parent else {}
            if record and inputs:
                references |= record.inputs
            for role, reference in references.items():
                found = _follow(checkpoint, role, reference)
                if isinstance(found, str):
                    problems.append(found)
                    continue
                if found.path.resolve() not in visited:
                    visit(found)
                problems.extend(_link_problems(checkpoint, role, reference, found))
            problems.extend(checkpoint.problems())

        visit(self.tip)
        for checkpoint in self.beside if inputs else ():
            if checkpoint.path.resolve() not in visited:
                visit(checkpoint)
        if self.broken and self.broken not in problems:  # a circle: each of its links leads somewhere
            problems.insert(0, self.broken)
        return problems


def tip_of_run(path: Path) -> Path | None:
    """The language model in the run `path` that none there descends from; None if there is not exactly one."""
    if (path / weights.CONFIG).exists():
        return None
    found = [Checkpoint.open(file.parent) for file in sorted(path.glob(f"*/{records.FILE}"))]
    # A run under way has scorers that descend from its tip.
    models = [c for c in found if c.is_language_model]
    parents = {c.record.parent.hash for c in models if c.record is not None and c.record.parent is not None}
    # Of a model and its copies, the one in the directory of its name.
    named = sorted(models, key=lambda c: c.path.name == c.name)
    tips = {c.hash: c for c in named if c.hash not in parents}
    if len(tips) > 1:  # a stranger in the place of a parent begins no lineage of this run: verifying names it
        tips = {hash: c for hash, c in tips.items() if c.record is not None and c.record.parent is not None}
    return next(iter(tips.values())).path if len(tips) == 1 else None


def open_layers(
    paths: Sequence[Path], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Layer]:
    """Layers to compare, oldest first: the whole lineage of one checkpoint or run, or else the models named.

    Raises UserError if a hash does not hold, or they do not share a tokenizer.
    """
    if len(paths) == 1:
        return Lineage.open(paths[0]).load(dtype, device)
    checkpoints = [Checkpoint.open(tip_of_run(path) or path) for path in paths]
    for checkpoint in checkpoints:
        _refuse(checkpoint.problems(), checkpoint)
    return load_layers(checkpoints, dtype, device)


def load_layers(
    checkpoints: Sequence[Checkpoint], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Layer]:
    """Language models that can be compared token by token. Raises UserError unless all share a tokenizer.

    Layers of equal names, as two masks that are both called sft, go by their paths.
    """
    layers: list[Layer] = []
    for name, checkpoint in zip(_distinct(checkpoints), checkpoints, strict=True):
        model, tokenizer = checkpoint.model(dtype, device), checkpoint.tokenizer()
        if isinstance(model, Scorer):
            raise UserError(f"{checkpoint.path} is not a language model: it scores text and writes none.")
        if layers and tokenizer.hash != layers[0].tokenizer.hash:
            raise UserError(
                f"{checkpoint.path} has another tokenizer than {checkpoints[0].path}, so their tokens cannot "
                "be compared one by one. Compare models of one family."
            )
        layers.append(Layer(name, model, tokenizer, checkpoint.hash))
    return layers


def _distinct(checkpoints: Sequence[Checkpoint]) -> list[str]:
    places: dict[str, set[Path]] = {}
    for checkpoint in checkpoints:
        places.setdefault(checkpoint.name, set()).add(checkpoint.path.resolve())
    names: list[str] = []
    for checkpoint in checkpoints:
        name = checkpoint.name if len(places[checkpoint.name]) == 1 else str(checkpoint.path)
        again = sum(other.path.resolve() == checkpoint.path.resolve() for other in checkpoints[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)  # beside itself it differs by nothing
    return names


def _refuse(problems: Sequence[str], checkpoint: Checkpoint) -> None:
    if problems:
        count = len(problems) - 1
        raise UserError(problems[0] + (f" ({count} more: `unmask log {checkpoint.path}`)" if count else ""))


def _follow(checkpoint: Checkpoint, role: str, reference: Reference) -> Checkpoint | str:
    """The checkpoint that a record refers to, or the sentence that says why it cannot be had."""
    path = Path(os.path.normpath(checkpoint.path.resolve() / reference.path))
    if not checkpoint.path.is_absolute():
        path = Path(os.path.relpath(path))
    if not path.exists():  # a stage that was set aside in RUN/set-aside/N: its parent may still lie in RUN
        kept = path.parent.parent.parent / path.name
        path = kept if path.parent.parent.name == "set-aside" and _hash_in(kept) == reference.hash else path
    try:
        return Checkpoint.open(path)
    except UserError as error:
        if path.exists():
            return f"{checkpoint.name}: its {role} cannot be read. {error}"
    nearby = sorted(found.parent for found in path.parent.glob(f"*/{records.FILE}"))
    moved = next((found for found in nearby if _hash_in(found) == reference.hash), None)
    advice = f"It lies in {moved} now: move it back." if moved else "Put it back there."
    return (
        f"{checkpoint.name}: its {role} is missing: {path} does not exist ({reference.path} in the record, "
        f"hash {short(reference.hash)}). {advice}"
    )


def _hash_in(directory: Path) -> str | None:
    try:
        return Checkpoint.open(directory).hash
    except UserError:
        return None


def _link_problems(checkpoint: Checkpoint, role: str, reference: Reference, found: Checkpoint) -> list[str]:
    if found.hash == reference.hash:
        return []
    return [
        f"{checkpoint.name}: the {role} in {found.path} is not the one it was made from: hash "
        f"{short(found.hash)}, recorded {short(reference.hash)}. {checkpoint.remedy}"
    ]


def _row(checkpoint: Checkpoint) -> dict[str, Any]:
    row = {
        "name": checkpoint.name,
        "kind": checkpoint.kind,
        "path": str(checkpoint.path),
        "hash": checkpoint.hash,
    }
    if (record := checkpoint.record) is None:
        return row
    numbers = {name: value for name, value in record.metrics.items() if isinstance(value, int | float)}
    return row | {
        "parent_hash": record.parent.hash if record.parent else None,
        "inputs": {role: reference.hash for role, reference in record.inputs.items()},
        "data": record.data,
        "branch": record.branch._asdict() if record.branch else None,
        "steps": record.steps,
        "tokens": record.tokens,
        "seconds": record.seconds,
        "peak_bytes": record.peak_bytes,
        "headline": dict(list(numbers.items())[:1]),
    }
