"""What a stage was begun with, kept beside its work for whoever goes on with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from unmask.errors import UserError
from unmask.files import write_atomic
from unmask.recipe import Recipe

FILE = "recipe.json"
DECIDES_NOTHING = ("snapshot_seconds", "recompute", "shard")  # when is saved, and in how much memory


def there(work: Path) -> bool:
    return (work / FILE).exists()


def write(work: Path, decided: Mapping[str, Any]) -> None:
    """Before its first step."""
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(work / FILE, json.dumps(decided))


def read(work: Path) -> dict[str, Any]:
    """Raises UserError if it is missing or damaged."""
    path = work / FILE
    try:
        decided = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError:
        decided = None
    if not isinstance(decided, dict) or not isinstance(decided.get("sources"), dict):
        raise UserError(f"{path} is damaged, so what this stage was begun with is not known.")
    return decided


def with_defaults(decided: Mapping[str, Any]) -> dict[str, Any]:
    """What decided a stage, with the keys that recipes did not have yet when it was made, at their defaults."""
    filled = dict(decided)
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and name in decided:
            defaults = {
                key: each.get_default(call_default_factory=True)
                for key, each in section.model_fields.items()
                if not each.is_required() and key not in DECIDES_NOTHING
            }
            deciding = {key: value for key, value in decided[name].items() if key not in DECIDES_NOTHING}
            filled[name] = {**defaults, **deciding}
    return filled
