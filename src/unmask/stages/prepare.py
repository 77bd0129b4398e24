"""From a recipe's sources to what layers are trained and measured on: tokenizer, shards, facts, held-out text.

Held-out documents are chosen by the hash of their text, so that one which several layers could read is kept from all of
them. What was made lies in a directory named by the hash of everything that decided it, so other settings never
overwrite it and equal ones find it.
"""

import hashlib
import heapq
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from unmask.errors import UserError
from unmask.files import atomic_directory, explained, hash_json, sweep_temporaries, sync, write_atomic
from unmask.progress import Progress
from unmask.recipe import Recipe, Source, given
from unmask.stages import examples, pretrain
from unmask.text import planted
from unmask.text.planted import Fact
from unmask.text.shards import Shards, build
from unmask.text.sources import Document, Dropped, held_out, read_texts, signature
from unmask.text.tokenizer import Tokenizer

TOKENIZER_BYTES = 6_000_000  # of text that it is trained on; more changes few merges and takes long
SCHEME = 6  # raised when the same recipe and sources would give other text, tokens or first weights
HELDOUT_BYTES = 1_000_000  # a source; kept in the run for measuring
_WORKING = "working.json"  # since when a process works, and how many seconds earlier ones did


@dataclass(frozen=True)
class Prepared:
    """What was made of a recipe's text. `seconds` is how long that took, over all processes that worked on it."""

    directory: Path
    facts: list[Fact]
    seconds: float

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.directory / "tokenizer")

    def shards(self, source: Source) -> Shards:
        return Shards.open(self.directory / "shards" / source.name, verify=True)

    @cached_property
    def heldout(self) -> list[Document]:
        try:
            rows = (self.directory / "heldout.jsonl").read_text("utf-8").split("\n")
            return [Document(row["text"], row["source"]) for row in map(json.loads, filter(None, rows))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(self.directory, error) from error

    def pretrain_sources(self, recipe: Recipe) -> list[pretrain.Source]:
        return [pretrain.Source(s.name, self.shards(s), s.share) for s in recipe.pretrain.sources]


def prepare(recipe: Recipe, directory: Path, progress: Progress) -> Prepared:
    """Make, or find made, everything that the text of `recipe` gives. What a killed process had made is taken up.

    Raises UserError for a source that is missing, empty or broken, or whose package is not installed.
    """
    decided = _decides(recipe)
    place = directory / hash_json(decided)[:16]
    if not place.exists():
        partial = directory / f"{place.name}.partial"
        with explained(place):
            for other in {*directory.glob("*.partial")} - {partial}:  # of text that is not wanted any more
                shutil.rmtree(other)
            partial.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(partial)
            earlier = _seconds(partial)
            started = time.monotonic()
            write_atomic(partial / _WORKING, json.dumps({"earlier": earlier, "since": time.time()}))
            _make(recipe, partial, progress)
            done = {"seconds": earlier + time.monotonic() - started, "decided by": decided}
            sync(partial / "heldout.jsonl")
            write_atomic(partial / "prepared.json", json.dumps(done, indent=2) + "\n")
            (partial / _WORKING).unlink()
            partial.rename(place)
            sync(directory)
    try:
        seconds = float(json.loads((place / "prepared.json").read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(place, error) from error
    return Prepared(place, _read_facts(place), seconds)


def _seconds(partial: Path) -> float:
    """How long processes worked here that were killed: the last one until it last wrote a file."""
    try:
        working = json.loads((partial / _WORKING).read_bytes())
        last = max(path.stat().st_mtime for path in partial.rglob("*") if path.is_file())
        return float(working["earlier"] + max(0.0, last - working["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _damaged(place: Path, error: Exception) -> UserError:
    return UserError(
        f"{place} is damaged ({type(error).__name__}). Delete this folder: the same command makes it again."
    )


def documents(source: Source, recipe: Recipe, *, held: bool, dropped: Dropped | None = None) -> Iterator[str]:
    """The source's documents that no layer may see (`held`), or those that are trained on; empty ones are counted."""
    share = recipe.heldout if source.heldout is None else source.heldout
    for text in read_texts(source.path, dropped):
        if held_out(text, share) == held:
            yield text


def raw_sources(recipe: Recipe) -> list[Source]:
    """Pretraining sources that are text of their own: all but the planted facts."""
    return [source for source in recipe.pretrain.sources if source.path != "facts"]


def plant(recipe: Recipe) -> list[Fact]:
    """The facts with their groups, and which of them the layers' other text gives away."""
    if recipe.facts is None:
        return []
    texts = {
        "base": (text for source in raw_sources(recipe) for text in documents(source, recipe, held=False)),
        "sft": (
            "\n".join(message["content"] for message in chat)
            for source in recipe.sft.sources
            if source.path != "facts"
            for chat in examples.chats(source, recipe, ())
        ),
    }
    return planted.facts(recipe.facts.shares(), texts, recipe.seed)


def _make(recipe: Recipe, directory: Path, progress: Progress) -> None:
    if not (directory / "facts.json").exists():
        write_atomic(directory / "facts.json", json.dumps([vars(fact) for fact in plant(recipe)]) + "\n")
    facts = _read_facts(directory)
    if not (directory / "tokenizer").exists():
        progress.line("preparing  tokenizer")
        with atomic_directory(directory / "tokenizer") as temporary:
            Tokenizer.train(_sample(recipe, facts), recipe.tokenizer.vocabulary).save(temporary)
    tokenizer = Tokenizer.load(directory / "tokenizer")

    question_share = recipe.facts.question_share if recipe.facts else 0.0
    with (directory / "heldout.jsonl").open("w", encoding="utf-8") as heldout:
        for source in recipe.pretrain.sources:
            progress.line(f"preparing  {source.name}")
            if source.path != "facts":
                for text in sample(documents(source, recipe, held=True), HELDOUT_BYTES):
                    row = json.dumps({"source": source.name, "text": text}, ensure_ascii=False)
                    heldout.write(row + "\n")
            if (shards := directory / "shards" / source.name).exists():
                continue
            dropped = Dropped()
            if source.path == "facts":
                passes = _passes(recipe, source, facts, tokenizer)
                texts: Iterable[str] = (
                    text
                    for i in range(passes)
                    for text in planted.plain_documents(facts, recipe.seed, i, question_share)
                )
            else:
                texts = documents(source, recipe, held=False, dropped=dropped)
            built = build(shards, texts, tokenizer)
            for reason, count in dropped.items():
                progress.line(f"preparing  {source.name}: left out {count:,} of reason: {reason}")
            if not built.tokens:
                raise UserError(
                    f"source {source.path!r} has no text. Give it some, or take it out of [pretrain]."
                )


def _passes(recipe: Recipe, source: Source, facts: list[Fact], tokenizer: Tokenizer) -> int:
    """How often all sentences have to be said so that no row of planted text comes twice."""
    one = sum(
        len(ids) + 1 for ids in tokenizer.encode_batch(list(planted.plain_documents(facts, recipe.seed, 0)))
    )
    if not one:
        raise UserError(
            "no planted fact is taught in pretraining: give facts.both or facts.base_only a share."
        )
    share = source.share / sum(other.share for other in recipe.pretrain.sources)
    return 1 + int(share * given(_planted_for(recipe)) // one)


def _planted_for(recipe: Recipe) -> int | None:
    """Tokens of pretraining that the planted text is made for."""
    return None if recipe.facts is None else recipe.facts.pretrain_tokens or recipe.pretrain.tokens


def _sample(recipe: Recipe, facts: list[Fact]) -> Iterator[str]:
    """Text for the tokenizer: of each source its share of TOKENIZER_BYTES."""
    total = sum(source.share for source in recipe.pretrain.sources)
    for source in recipe.pretrain.sources:
        texts: Iterable[str]
        if source.path == "facts":
            texts = planted.plain_documents(facts, recipe.seed, 0)
        else:
            texts = documents(source, recipe, held=False)
        yield from sample(texts, round(TOKENIZER_BYTES * source.share / total))


def sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """At most `limit` bytes of texts, from all over the source: those whose hashes are least; the last is cut.

    The first ones of a source would not do: many are sorted, by year or by author. One pass, and what is kept is
    no larger than `limit` and one text.
    """
    kept: list[tuple[int, bytes]] = []  # a heap, the largest hash first
    size = 0
    for text in texts:
        data = text.encode("utf-8", "replace")
        heapq.heappush(kept, (-int.from_bytes(hashlib.sha256(data).digest()), data))
        size += len(data)
        while kept and size - len(kept[0][1]) >= limit:
            size -= len(heapq.heappop(kept)[1])
    for _, data in sorted(kept, reverse=True):
        yield data[:limit].decode("utf-8", "ignore")
        limit -= len(data)


def _decides(recipe: Recipe) -> dict[str, Any]:
    """Everything that the prepared text depends on."""
    plain = recipe.model_dump(mode="json", exclude={"facts": {"pretrain_tokens"}})
    chats = [source for source in recipe.sft.sources if source.path != "facts"] if recipe.facts else []
    return {
        "scheme": SCHEME,
        **{key: plain[key] for key in ("seed", "heldout", "tokenizer", "facts")},
        "sources": plain["pretrain"]["sources"],
        "chats": [source.model_dump(mode="json") for source in chats],
        "tokens": _planted_for(recipe),
        "max_turns": recipe.sft.max_turns if recipe.facts else None,
        "files": {source.path: signature(source.path) for source in (*raw_sources(recipe), *chats)},
    }


def _read_facts(directory: Path) -> list[Fact]:
    try:
        return TypeAdapter(list[Fact]).validate_json((directory / "facts.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(directory, error) from error
