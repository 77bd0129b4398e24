"""What to build: a recipe is one TOML file, validated, with everything that was left out derived from `depth`.

A recipe is read (`load`), overridden (`--set sft.tokens=…`), and resolved (`resolve`): after that every amount and
every rate is a number that stands in the file which the run keeps. Amounts are in tokens, never in seconds.
"""

from unmask.recipe.derive import given, resolve, width_of
from unmask.recipe.schema import STAGES, Recipe, RlSection, Source, Training
from unmask.recipe.toml import difference, dumps, load, names, validate

__all__ = [
    "STAGES",
    "Recipe",
    "RlSection",
    "Source",
    "Training",
    "difference",
    "dumps",
    "given",
    "load",
    "names",
    "resolve",
    "validate",
    "width_of",
]
