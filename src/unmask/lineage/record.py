"""The stage record: what a checkpoint says of itself, the hash that guards it, the model card made from it.

`unmask.json` is `{"hash": …, "record": {…}}`. The hash is the SHA-256 of the record in canonical JSON, so an
edited record no longer has its hash; a checkpoint's children keep it too, so that nobody edits both unseen.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from unmask.errors import UserError
from unmask.files import hash_json

FILE = "unmask.json"
FORMAT = 1


class Reference(BaseModel):
    """Another checkpoint: its path relative to the directory of the one that refers to it, and its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    hash: str


class Branch(NamedTuple):
    """A run's directory, as the recipe names it, and a hash of the state that its stable phase ended with."""

    path: str
    state: str


class Record(BaseModel):
    """One stage. The checkpoint's hash covers all of it; the first number of `metrics` is the headline."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int = FORMAT
    name: str = Field(min_length=1)
    kind: str = Field(min_length=1)
    parent: Reference | None
    inputs: dict[str, Reference]  # further checkpoints that took part, as the reward model of PPO
    tensors: dict[str, str]  # name → SHA-256 of dtype, shape and bytes, whatever file holds it
    tokenizer: str
    template: str
    config: str
    data: dict[str, str]  # label → fingerprint
    recipe: dict[str, JsonValue]
    seed: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    peak_bytes: int
    dtype: str  # of the weights on disk
    metrics: dict[str, JsonValue]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """What is written and hashed. A number that is not finite has no place in JSON and becomes null."""
        plain: dict[str, Any] = _finite(self.model_dump(mode="json"))
        return plain

    @property
    def hash(self) -> str:
        return hash_json(self.to_json())

    @property
    def branch(self) -> Branch | None:
        """What this base went on from, if it is a branch of another run's."""
        section, sources = self.recipe.get("pretrain"), self.recipe.get("sources")
        if not isinstance(section, dict) or not isinstance(sources, dict):
            return None
        path = section.get("branch")
        return Branch(path, str(sources.get(path))) if isinstance(path, str) else None

    def dumps(self) -> str:
        return json.dumps({"hash": self.hash, "record": self.to_json()}, indent=2, ensure_ascii=False) + "\n"


class Read(BaseModel):
    """A record as found on disk: `hash` is that of what stands there, `claimed` the one written beside it."""

    model_config = ConfigDict(frozen=True)

    record: Record
    hash: str
    claimed: str


def read(path: Path) -> Read:
    """The record in the file `path`, edited or not. Raises UserError if it cannot be understood at all."""
    try:
        found = json.loads(path.read_bytes())
        body, claimed = found["record"], found["hash"]
        if body["format"] > FORMAT:
            raise UserError(
                f"{path}: the record has format {body['format']}, and this unmask reads up to {FORMAT}. "
                "Install a newer unmask."
            )
        record = Record.model_validate_json(json.dumps(body))
        return Read(record=record, hash=hash_json(body), claimed=str(claimed))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: the record is damaged at {where!r}: {first['msg']}. {_REMEDY}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a stage record of unmask ({error!r}). {_REMEDY}") from error


_REMEDY = "Restore the file from a copy, or build the stage anew with `unmask run … --from STAGE`."


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
