"""Recipes as TOML: read, overridden, validated, written, compared."""

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from unmask.errors import UserError, nearest
from unmask.recipe.explain import explain
from unmask.recipe.schema import Recipe


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of one that ships with unmask, or from a TOML file, with `section.key=value` overrides.

    Raises UserError for a missing file, broken TOML, an unknown key (with the nearest valid one), or a bad value.
    """
    path = Path(name_or_path)
    shipped = resources.files("unmask") / "recipes" / f"{name_or_path}.toml"
    if path.suffix == ".toml" or (path.exists() and path.is_file()):
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"the recipe {path} is not UTF-8 (byte {error.start}). Save it as UTF-8."
            ) from error
    elif shipped.is_file():
        text = shipped.read_text("utf-8")
    else:
        raise UserError(
            f"there is no recipe {str(name_or_path)!r}.{nearest(str(name_or_path), names())} Recipes that ship with"
            f" unmask: {', '.join(names())}; or give the path of a .toml file."
        )
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # also for a number of thousands of digits
        raise UserError(f"{name_or_path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(data, override)
    return validate(data, str(name_or_path))


def names() -> list[str]:
    """Names of the recipes that ship with unmask."""
    folder = resources.files("unmask") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def validate(data: dict[str, Any], where: str) -> Recipe:
    """The Recipe, or a UserError that names the key, what is wrong with it and the nearest valid key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        # A list with a bad entry is also reported as too short: what is wrong inside it says it all.
        inner = {problem["loc"][:end] for problem in problems for end in range(1, len(problem["loc"]))}
        said = [explain(problem) for problem in problems if problem["loc"] not in inner]
        raise UserError(f"{where}: {'; '.join(said)}") from error


def dumps(recipe: Recipe) -> str:
    """The recipe as TOML that `load` reads back to an equal Recipe."""
    return tomli_w.dumps(_without_none(recipe.model_dump(mode="json")))


def difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first key whose value differs, with both values; None if all are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if found := difference(old.get(name), new.get(name), f"{key}.{name}" if key else name):
                return found
        return None
    return None if old == new else f"{key} was {old!r} and is now {new!r}"


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(
            f"--set {override!r} is not of the form section.key=value, as in --set sft.tokens=600000"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {section!r} is not a section of the recipe")
        data = inner
    data[last] = value


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is None is left out, and its default of None comes back on reading."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
