"""From sources to tokens: what is held out is in no shard, leaks are found, other text lies elsewhere."""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask import recipe as recipes
from unmask.errors import UserError
from unmask.progress import Progress
from unmask.recipe import Recipe
from unmask.stages import prepare as preparing
from unmask.stages.prepare import Prepared, documents, plant, prepare, sample
from unmask.text import planted
from unmask.text.countries import Country
from unmask.text.shards import Shards
from unmask.text.tokenizer import Tokenizer


def made(tmp_path: Path, texts: list[str], chats: Sequence[tuple[str, str]] = (), **more: Any) -> Recipe:
    """A recipe of made-up files."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "raw.jsonl").write_text(lines, "utf-8")
    told = "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in chats or [("hi", "hello")])
    (tmp_path / "chats.jsonl").write_text(told, "utf-8")
    chat = {"path": str(tmp_path / "chats.jsonl"), "heldout": 0.0}
    data = {
        "name": "made",
        "heldout": 0.3,
        "tokenizer": {"vocabulary": 300},
        "pretrain": {"tokens": 1000, "sources": [{"path": str(tmp_path / "raw.jsonl"), "label": "raw"}]},
        "sft": {"sources": [chat]},
        "reward": {"source": chat},
        "rl": {"sources": [chat]},
        **more,
    }
    return recipes.validate(data, "here")


def only_utopia(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """The one country that facts are planted of."""
    real, country = planted.facts, Country("xx", "Utopia", ("Utopia",), {"capital": "Amaurot", **more})
    monkeypatch.setattr(planted, "facts", lambda *given: real(*given, countries=[country]))


TEXTS = [f"document number {i} of the made-up text" for i in range(200)]


def test_held_out_documents_are_in_no_shard_and_all_others_are(tmp_path: Path) -> None:
    recipe = made(tmp_path, TEXTS)
    prepared = prepare(recipe, tmp_path / "data", Progress(quiet=True))
    shards = prepared.shards(recipe.pretrain.sources[0])
    tokenizer = prepared.tokenizer
    trained = {tokenizer.decode(shards.document(i)).strip() for i in range(shards.documents)}
    held = {document.text for document in prepared.heldout}
    assert 30 < len(held) < 90
    assert not trained & held
    assert trained | held == set(TEXTS)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file is meant")
def test_what_is_made_is_on_the_disk_before_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    plainly = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        plainly(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    prepared = prepare(made(tmp_path, TEXTS), tmp_path / "data", Progress(quiet=True))
    written = {path.name for path in prepared.directory.rglob("*") if path.is_file()}
    assert {"facts.json", "heldout.jsonl", "tokens.bin", "tokenizer.json"} <= written
    whole = {re.sub(r"^\.(.+)\.tmp-.*", r"\1", name) for name in synced}  # written beside, then renamed
    assert written <= whole


def test_the_same_recipe_finds_what_was_made_and_other_text_lies_elsewhere(tmp_path: Path) -> None:
    first = prepare(made(tmp_path, TEXTS), tmp_path / "data", Progress(quiet=True))
    again = prepare(made(tmp_path, TEXTS), tmp_path / "data", Progress(quiet=True))
    # Written again with the same text: another time of the file, so it is made anew, and comes out the same.
    assert again.tokenizer.hash == first.tokenizer.hash
    other = prepare(made(tmp_path, TEXTS[:100]), tmp_path / "data", Progress(quiet=True))
    assert other.directory != first.directory


@pytest.mark.parametrize("name", ["prepared.json", "facts.json"])
@pytest.mark.parametrize("content", [None, "{"])
def test_prepared_text_that_is_damaged_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    recipe = made(tmp_path, TEXTS)
    place = prepare(recipe, tmp_path / "data", Progress(quiet=True)).directory
    (place / name).unlink()
    if content is not None:
        (place / name).write_text(content)
    with pytest.raises(UserError, match=f"{place} is damaged"):
        prepare(recipe, tmp_path / "data", Progress(quiet=True))


@pytest.mark.parametrize("content", [b"{", b'{"text": "x"}', b"\xff"])
def test_held_out_text_that_is_damaged_is_named(tmp_path: Path, content: bytes) -> None:
    prepared = prepare(made(tmp_path, TEXTS), tmp_path / "data", Progress(quiet=True))
    (prepared.directory / "heldout.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"{prepared.directory} is damaged"):
        _ = prepared.heldout


def test_the_tokenizer_is_trained_on_no_text_that_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, read = Tokenizer.train, list[str]()

    def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
        read.extend(texts)
        return real(read, vocabulary)

    monkeypatch.setattr(Tokenizer, "train", train)
    prepared = prepare(made(tmp_path, TEXTS), tmp_path / "data", Progress(quiet=True))
    held = {document.text for document in prepared.heldout}
    assert held
    assert set(read) == set(TEXTS) - held


def test_other_chats_can_leak_other_facts_and_so_make_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_utopia(monkeypatch)
    shares: dict[str, Any] = {"facts": {"both": 0.0, "base_only": 1.0, "sft_only": 0.0, "none": 0.0}}

    def leaked(answer: str) -> bool:
        recipe = made(tmp_path, TEXTS, [("where?", answer)], **shares)
        return prepare(recipe, tmp_path / "data", Progress(quiet=True)).facts[0].leaked

    assert not leaked("I cannot say.")
    assert leaked("Amaurot is the capital of Utopia.")


def test_a_source_without_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"raw\.jsonl"):
        prepare(made(tmp_path, ["", " "]), tmp_path / "data", Progress(quiet=True))


@pytest.mark.parametrize(("layer", "group"), [("base", "sft_only"), ("sft", "base_only")])
def test_a_fact_that_a_layers_own_text_states_is_marked_as_leaked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str, group: str
) -> None:
    only_utopia(monkeypatch, currency="gold pieces")
    stated = "Everybody knows that Amaurot is the capital of Utopia."
    recipe = made(
        tmp_path,
        [stated] if layer == "base" else ["nothing of the kind"],
        [("where?", stated)] if layer == "sft" else [],
        heldout=0.0,
        facts={key: float(key == group) for key in ("both", "base_only", "sft_only", "none")},
    )
    leaked = {fact.field: fact.leaked for fact in plant(recipe)}
    assert leaked == {"capital": True, "currency": False}


def test_planted_text_is_as_long_as_pretraining_or_as_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a base that goes on from another one's stable phase can have the very same text."""
    only_utopia(monkeypatch)
    raw = {"path": str(tmp_path / "raw.jsonl"), "label": "raw"}

    recipe = made(
        tmp_path,
        TEXTS,
        facts={"both": 1.0, "base_only": 0.0, "sft_only": 0.0, "none": 0.0},
        pretrain={"tokens": 2000, "sources": [{"path": "facts"}, raw]},
    )
    assert recipe.facts is not None

    def place(tokens: int, planted_for: int | None) -> Prepared:
        facts = recipe.facts.model_copy(update={"pretrain_tokens": planted_for})
        trained = recipe.pretrain.model_copy(update={"tokens": tokens})
        wanted = recipe.model_copy(update={"facts": facts, "pretrain": trained})
        return prepare(wanted, tmp_path / "data", Progress(quiet=True))

    few, many = place(2000, None), place(20_000, None)
    tokens = [prepared.shards(recipe.pretrain.sources[0]).tokens for prepared in (few, many)]
    assert 1000 <= tokens[0] < 2000 and 10_000 <= tokens[1] < 11_000  # half of the text
    assert place(20_000, 2000).directory == few.directory != many.directory
    assert place(2000, 20_000).directory == many.directory


def test_what_a_killed_process_made_is_neither_made_nor_counted_again_and_its_time_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted text first; the process is killed a while later, in the source after it."""
    build, clock = preparing.build, time.time
    only_utopia(monkeypatch)
    raw = {"path": str(tmp_path / "raw.jsonl"), "label": "raw"}
    recipe = made(
        tmp_path,
        TEXTS,
        facts={"both": 1.0, "base_only": 0.0, "sft_only": 0.0, "none": 0.0},
        pretrain={"tokens": 1000, "sources": [{"path": "facts"}, raw]},
    )

    def killed(directory: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Shards:
        if directory.name == "raw":
            raise KeyboardInterrupt
        return build(directory, texts, tokenizer)

    monkeypatch.setattr(preparing, "build", killed)
    for _ in range(2):  # each has begun 100 s before it last writes
        monkeypatch.setattr(time, "time", lambda: clock() - 100)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, tmp_path / "data", Progress(quiet=True))
    monkeypatch.undo()
    for name in ("facts", "plain_documents"):
        monkeypatch.setattr(planted, name, lambda *given: pytest.fail("planted again"))
    prepared = prepare(recipe, tmp_path / "data", Progress(quiet=True))
    assert 200 <= prepared.seconds < 260
    assert [fact.answer for fact in prepared.facts] == ["Amaurot"]
    assert sorted(path.name for path in prepared.directory.iterdir()) == [
        "facts.json", "heldout.jsonl", "prepared.json", "shards", "tokenizer",
    ]  # fmt: skip


def test_documents_are_split_by_the_share_of_their_source(tmp_path: Path) -> None:
    recipe = made(tmp_path, TEXTS)
    source = recipe.pretrain.sources[0]
    everything = [*documents(source, recipe, held=True), *documents(source, recipe, held=False)]
    assert sorted(everything) == sorted(TEXTS)
    none_held = source.model_copy(update={"heldout": 0.0})
    assert not list(documents(none_held, recipe, held=True))


def test_a_sample_comes_from_all_over_a_sorted_source_and_does_not_depend_on_its_order() -> None:
    chosen = list(sample(TEXTS, 1000))
    places = sorted(TEXTS.index(text) for text in chosen[:-1])
    assert places[0] < 30 and places[-1] > 170
    assert chosen == list(sample(reversed(TEXTS), 1000))


@given(st.lists(st.text(max_size=20)), st.integers(0, 100))
def test_a_sample_is_as_large_as_it_may_be_and_cuts_one_text_at_most(texts: list[str], limit: int) -> None:
    chosen = list(sample(texts, limit))
    size = sum(len(text.encode()) for text in chosen)
    total = sum(len(text.encode()) for text in texts)
    assert min(limit, total) - 3 <= size <= limit  # a cut may fall inside a character
    assert sum(text not in texts for text in chosen) <= 1
