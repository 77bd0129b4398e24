"""What a checkpoint holds, as hashes: of each tensor (not file), tokenizer, template and configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.lineage.record import Record
from unmask.model import weights
from unmask.model.config import ModelConfig
from unmask.text.tokenizer import Tokenizer

NAMES_OF_TOOLS = ("transformers_version", "_name_or_path")  # in config.json: who saved it, not what it is


def hashes(directory: Path) -> dict[str, Any]:
    """The fields of a Record that say what a directory holds."""
    tokenizer = Tokenizer.load(directory)
    return {
        "tensors": weights.tensor_hashes(directory),
        "tokenizer": tokenizer.hash,
        "template": tokenizer.template_hash,
        "config": config_hash(weights.read_json(directory / weights.CONFIG)),
    }


def config_hash(config: Mapping[str, Any]) -> str:
    """Of what config.json means: the same after transformers saved the model again, another after an edit.

    What our reader understands is hashed in one spelling, every other key as it stands.
    """
    try:
        known = ModelConfig.from_hf(config).to_hf(str(config.get("dtype") or config.get("torch_dtype")))
    except UserError:  # an architecture of another house, or an edit that makes no sense
        known = {}
    rest = {
        key: value
        for key, value in config.items()
        if not (key in known and known[key] == value) and key not in NAMES_OF_TOOLS
    }
    return hash_json([known, rest])


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: a reader that does not find the end of a turn among the stops never stops."""
    return {
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": [tokenizer.turn_end, tokenizer.end_of_text],
        "pad_token_id": tokenizer.pad,
    }


def differences(directory: Path, record: Record, *, writes: bool) -> list[str]:
    """Where a directory is not what its record says, as clauses: what, in which file, what now and then.

    `writes`: it is a language model, whose generation_config.json must name the tokenizer's stop tokens (no
    record holds that file, as other tools rewrite it).
    """
    found: list[str] = []
    try:
        found += _tensor_differences(directory, record.tensors)
    except UserError as error:  # truncated, not safetensors, unreadable
        found.append(str(error))
    try:
        tokenizer = Tokenizer.load(directory)
        found += _difference("tokenizer", directory / "tokenizer.json", tokenizer.hash, record.tokenizer)
        path = directory / "chat_template.jinja"
        found += _difference("chat template", path, tokenizer.template_hash, record.template)
        if writes:
            found += _stop_differences(directory / "generation_config.json", tokenizer)
    except UserError as error:
        found.append(str(error))
    path = directory / weights.CONFIG
    found += _difference("configuration", path, config_hash(weights.read_json(path)), record.config)
    return found


def short(digest: str) -> str:
    """Enough of a hash for people to compare."""
    return digest[:12]


def _difference(what: str, path: Path, now: str, then: str) -> list[str]:
    if now == then:
        return []
    return [f"the {what} in {path} is not the recorded one (SHA-256 {short(now)}, recorded {short(then)})."]


def _tensor_differences(directory: Path, recorded: Mapping[str, str]) -> list[str]:
    now = weights.tensor_hashes(directory)
    changed: dict[Path, list[str]] = {}
    for name, digest in recorded.items():
        if name in now and now[name] != digest:
            changed.setdefault(_file_of(directory, name), []).append(name)
    found = [
        f"in {path} the numbers of {_listed(names)} are not the recorded ones."
        for path, names in changed.items()
    ]
    if missing := [name for name in recorded if name not in now]:
        found.append(f"{directory} lacks {_listed(missing)}, which the record names.")
    if added := [name for name in now if name not in recorded]:
        found.append(
            f"{_file_of(directory, added[0])} holds {_listed(added)}, which the record does not name."
        )
    return found


def _stop_differences(path: Path, tokenizer: Tokenizer) -> list[str]:
    expected = generation_config(tokenizer)["eos_token_id"]
    if not path.is_file():
        return [f"{path} is missing: other tools would not stop at the end of a turn."]
    stops = weights.read_json(path).get("eos_token_id")
    return (
        []
        if stops == expected
        else [f"{path} stops generation at {stops}, and the tokenizer's stops are {expected}."]
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _file_of(directory: Path, tensor: str) -> Path:
    files = weights.weight_files(directory)
    return next(path for path, names in files.items() if names is None or tensor in names)
