"""What is wrong with a recipe, in words that do not speak of Python."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from unmask.errors import nearest
from unmask.recipe.schema import Recipe

# What pydantic calls a problem → what a person is told, where pydantic's own words speak of Python.
_SAID = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a section with keys of its own",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_type": "must be a whole number",
    "model_type": "must be a section with keys of its own",
    "string_pattern_mismatch": "may hold letters, digits, '.', '_' and '-', and begins with none of '.' and '-'",
    "string_type": "must be text in quotes",
    "too_short": "must have at least one entry",
    "tuple_type": "must be a list in brackets",
}


def explain(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{_meant(path)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    said = _SAID.get(
        problem["type"], problem["msg"].replace("Input should", "must").removeprefix("Value error, ")
    )
    given = problem.get("input")
    shown = str(given).lower() if isinstance(given, bool) else repr(given)  # as TOML writes it
    shown = shown if len(shown) < 100 else f"{shown[:80]}…"
    return (
        said
        if not key
        else f"{key}: {said}"
        if isinstance(given, dict)
        else f"{key}: {said} (given: {shown})"
    )


def _meant(path: Sequence[str]) -> str:
    """The end of a message about an unknown key: its section's nearest, and the sections that have one so named."""
    *here, last = path
    section = tuple(part for part in here if not part.isdigit())  # of a list each entry has the same keys
    known = list(_keys(Recipe))
    siblings = [key[-1] for key in known if key[:-1] == section]
    owners = ", ".join(".".join(key) for key in known if key[-1] == last)
    cutoff = (
        0.85 if owners else 0.6
    )  # where the name is right elsewhere, only a slip of the finger is one here
    close = nearest(last, siblings, prefix="".join(f"{part}." for part in here), cutoff=cutoff)
    return close + (f" It is a key elsewhere: {owners}." if owners else "")


def _keys(model: type[BaseModel], section: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every key of this section and of the sections in it."""
    for name, field in model.model_fields.items():
        yield (*section, name)
        for inner in _models(field.annotation):
            yield from _keys(inner, (*section, name))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models(inner)]
