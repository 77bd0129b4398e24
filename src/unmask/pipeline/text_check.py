"""`unmask text`: copies in what a recipe trains on, and what of its held-out text and questions stands in it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unmask.pipeline.measure import held_chats
from unmask.recipe import Recipe
from unmask.stages import examples as chats_of
from unmask.stages.prepare import HELDOUT_BYTES, documents, raw_sources, sample
from unmask.text.chat import Chat
from unmask.text.overlap import COMPARED, RUN, SHORTEST, Copies, Overlap, Seen


class Found(NamedTuple):
    """By label of a pretraining source its copies; by kind of text that is measured on what of it is trained on."""

    copies: dict[str, Copies]
    kinds: dict[str, Seen]


def look(recipe: Recipe) -> Found:
    """Reads what is trained on, once; measured on are the held-out text that a run keeps, the chats that RL is measured
    on, and `measure.questions`."""
    held = {
        f"held-out {source.name}": list(sample(documents(source, recipe, held=True), HELDOUT_BYTES))
        for source in raw_sources(recipe)
    }
    asked = [chat[-1]["content"] for chat in held_chats(recipe)]
    overlap = Overlap({**held, "held-out prompts": asked, "questions": list(recipe.measure.questions)})
    copies = {}
    for source in raw_sources(recipe):
        counted = copies[source.name] = Copies()
        for text in documents(source, recipe, held=False):
            counted.add(text)
            overlap.read(text)
    for chat in _trained_chats(recipe):
        for message in chat:
            overlap.read(message["content"])
    return Found(copies, overlap.kinds)


def _trained_chats(recipe: Recipe) -> Iterator[Chat]:
    """Of SFT, of both scorers, and RL's prompts; but for planted facts, which are there to be asked about."""
    for source in recipe.sft.sources:
        if source.path != "facts":
            yield from chats_of.chats(source, recipe, ())
    halves: tuple[chats_of.Half, ...] = ("proxy", "gold") if recipe.reward.gold else ("proxy",)
    for half in halves:
        for ranking in chats_of.rankings(recipe, half)[0]:
            yield from ranking.chats
    for source in recipe.rl.sources:
        if source.path != "facts":
            yield from chats_of.prompts(source, recipe, ())


def table(found: Found) -> Group:
    trained = Table("pretraining text", box=None)
    for title in ("documents", "copies", "near copies"):
        trained.add_column(title, justify="right")
    for label, copies in found.copies.items():
        trained.add_row(label, f"{copies.documents:,}", f"{copies.exact:,}", f"{copies.near:,}")
    measured = Table("measured on", box=None)
    for title in ("texts", f"under {SHORTEST} words", "seen in training", "of their runs"):
        measured.add_column(title, justify="right")
    for kind, seen in found.kinds.items():
        share = seen.seen_runs / max(1, seen.runs)
        measured.add_row(kind, f"{seen.texts:,}", f"{seen.short:,}", f"{seen.seen:,}", f"{share:.1%}")
    note = (
        f"Seen: a run of {RUN} words (all of them, of a shorter text) stands in what a layer is trained on. "
        f"Near copies: 0.8 of their runs of five words, by MinHash, among the first {COMPARED:,} of a source. "
        "Nothing is removed."
    )
    examples = [
        Text(f"{kind}: «{' '.join(seen.example.split())}»", no_wrap=True, overflow="ellipsis")
        for kind, seen in found.kinds.items()
        if seen.seen
    ]
    return Group(
        trained, "", measured, "", note, *(["", "One of each that was seen:"] if examples else []), *examples
    )


def as_json(found: Found) -> dict[str, Any]:
    return {
        "pretraining": {
            label: {"documents": copies.documents, "exact_copies": copies.exact, "near_copies": copies.near}
            for label, copies in found.copies.items()
        },
        "measured_on": {kind: vars(seen) for kind, seen in found.kinds.items()},
    }
