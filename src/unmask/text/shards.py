"""Token shards: a source's documents as one long stream of ids on disk, memory-mapped.

A directory holds `tokens.bin` (uint16 or, for a vocabulary above 65,536, uint32; little endian),
`documents.bin` (for each document two uint64: its first token, and the UTF-8 bytes of its text) and
`index.json` (sizes, hashes, and the fingerprint over all of it and the tokenizer). Every document begins
with the end-of-text token.
"""

import json
import mmap
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unmask.errors import UserError
from unmask.files import explained, hash_json, sha256_file, sync, write_atomic
from unmask.text.tokenizer import Tokenizer

_FORMAT = 1
_AT_ONCE = 1_000_000  # characters that a thread encodes at once
_THREADS = min(8, os.cpu_count() or 1)
_NOTE_SECONDS = 10.0  # of encoding, which a kill can cost
_PROGRESS = "progress.json"


class Shards:
    """The tokens of a source. `tokens`, `documents`: how many there are; `empty`: how many documents were
    left out because they had no text; `fingerprint`: a hash of tokens, documents and tokenizer;
    `tokenizer`: its hash; `document_bytes`: the UTF-8 bytes of each document's text, (documents,)."""

    def __init__(
        self, index: dict[str, Any], ids: NDArray[Any], starts: NDArray[Any], sizes: NDArray[Any]
    ) -> None:
        self._ids, self._starts = ids, starts
        self.document_bytes = sizes
        self.tokens, self.documents = len(ids), len(starts)
        self.empty: int = index["empty"]
        self.fingerprint: str = index["fingerprint"]
        self.tokenizer: str = index["tokenizer"]

    @staticmethod
    def open(directory: Path, verify: bool = False) -> "Shards":
        """Map the shards of a directory. UserError names the file that is missing, truncated or changed.

        Without `verify` the tokens' hash is not computed (the sizes are compared, and everything else is
        hashed).
        """
        path = directory / "index.json"
        try:
            index = json.loads(path.read_bytes())
            fingerprint = index.pop("fingerprint")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error!r}). {_MEND}") from error
        if hash_json(index) != fingerprint:
            raise UserError(f"{path} was changed after it was written. {_MEND}")
        if index["format"] != _FORMAT:
            raise UserError(
                f"{path} has format {index['format']}; this version reads format {_FORMAT}. {_MEND}"
            )
        for name, size in (("tokens.bin", np.dtype(index["dtype"]).itemsize * index["tokens"]),
                           ("documents.bin", 16 * index["documents"])):  # fmt: skip
            file = directory / name
            actual = file.stat().st_size if file.is_file() else None
            if actual != size:
                found = "is missing" if actual is None else f"has {actual} bytes, not {size}"
                raise UserError(f"{file} {found}. {_MEND}")
            if (verify or name == "documents.bin") and sha256_file(file) != index["sha256"][name]:
                raise UserError(f"{file} was changed after it was written (its SHA-256 differs). {_MEND}")
        # Signed, because numpy makes fractions of unsigned and signed numbers; no file is so large as to tell.
        table = np.memmap(directory / "documents.bin", dtype="<i8", mode="r").reshape(-1, 2)
        with (directory / "tokens.bin").open("rb") as tokens:
            mapped = mmap.mmap(tokens.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows come in a shuffled order: what the system reads ahead from a disk, 32 pages, is read for nothing.
        mapped.madvise(mmap.MADV_RANDOM)
        ids = np.frombuffer(mapped, dtype=index["dtype"])
        return Shards({**index, "fingerprint": fingerprint}, ids, table[:, 0], table[:, 1])

    def document(self, i: int) -> NDArray[np.int64]:
        """The ids of document i, (T,), its end-of-text token first."""
        end = self._starts[i + 1] if i + 1 < self.documents else self.tokens
        return self._ids[self._starts[i] : end].astype(np.int64)

    def rows(self, length: int) -> int:
        """How many rows of `length` inputs with their targets there are: windows of length + 1 tokens that
        overlap by one, so that every token but the first is a target once. What is left at the end is not
        used."""
        return (self.tokens - 1) // length

    def row(self, i: int, length: int) -> NDArray[np.int64]:
        """Row i: length + 1 ids."""
        assert 0 <= i < self.rows(length), i
        return self._ids[i * length : (i + 1) * length + 1].astype(np.int64)


@dataclass
class _Counted:
    """How far a build has come: documents read, and of those with text how many, their tokens and bytes."""

    read: int = 0
    empty: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def build(directory: Path, documents: Iterable[str], tokenizer: Tokenizer) -> Shards:
    """Encode documents into a new directory, whole or not at all. Those without text are left out and counted.

    What a killed process had encoded lies in `directory`.partial and is taken up, if the tokenizer is the same; the
    documents have to be the same too, which the caller knows. UserError if the directory exists already, if no
    document has text, or if the system refuses to write.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    with explained(directory):
        if directory.exists():
            raise UserError(f"{directory} exists already. Remove it, or choose another name.")
        counted = _encode(partial, documents, tokenizer)
        if not counted.documents:
            shutil.rmtree(partial)
            raise UserError(f"there is no text for {directory}: all {counted.empty} documents are empty.")
        index = {
            "format": _FORMAT,
            "dtype": _dtype(tokenizer),
            "tokens": counted.tokens,
            "documents": counted.documents,
            "bytes": counted.bytes,
            "empty": counted.empty,
            "tokenizer": tokenizer.hash,
            "sha256": {name: sha256_file(partial / name) for name in ("tokens.bin", "documents.bin")},
        }
        index["fingerprint"] = hash_json(index)
        write_atomic(partial / "index.json", json.dumps(index, indent=2) + "\n")
        (partial / _PROGRESS).unlink()
        partial.rename(directory)
        sync(directory.parent)
    return Shards.open(directory)


def _encode(partial: Path, documents: Iterable[str], tokenizer: Tokenizer) -> _Counted:
    """Append what is not there yet to the files in `partial`, and note every few seconds what surely is."""
    partial.mkdir(parents=True, exist_ok=True)
    counted = _noted(partial, tokenizer)
    dtype = _dtype(tokenizer)
    noted = time.monotonic()
    with (
        (partial / "tokens.bin").open("ab") as ids_file,
        (partial / "documents.bin").open("ab") as table_file,
    ):
        ids_file.truncate(counted.tokens * np.dtype(dtype).itemsize)
        table_file.truncate(counted.documents * 16)

        def note() -> None:
            for file in (ids_file, table_file):
                file.flush()
                os.fsync(file.fileno())
            write_atomic(partial / _PROGRESS, json.dumps({"tokenizer": tokenizer.hash, **asdict(counted)}))

        for block in _blocks(islice(documents, counted.read, None), tokenizer):
            starts = counted.tokens + block.lengths.cumsum() - block.lengths
            np.stack([starts, block.sizes], axis=1).astype("<u8").tofile(table_file)
            block.ids.tofile(ids_file)
            counted.read += block.read
            counted.empty += block.read - len(block.sizes)
            counted.documents += len(block.sizes)
            counted.tokens += len(block.ids)
            counted.bytes += int(block.sizes.sum())
            if time.monotonic() - noted >= _NOTE_SECONDS:
                note()
                noted = time.monotonic()
        note()
    return counted


def _noted(partial: Path, tokenizer: Tokenizer) -> _Counted:
    """What an earlier process has surely written into `partial`; nothing, if it had another tokenizer."""
    try:
        found = json.loads((partial / _PROGRESS).read_bytes())
        same = found.pop("tokenizer") == tokenizer.hash
        counted = _Counted(**found)
        ids, table = ((partial / name).stat().st_size for name in ("tokens.bin", "documents.bin"))
        width = np.dtype(_dtype(tokenizer)).itemsize
        whole = ids >= counted.tokens * width and table >= counted.documents * 16
        if same and whole and min(vars(counted).values()) >= 0:
            return counted
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return _Counted()


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocabulary <= 2**16 else "<u4"


_MEND = "Delete the prepared data that it belongs to (in a run: the folder in data/) and prepare it again."


class _Block(NamedTuple):
    """Documents that were encoded together: how many were read, and, of those with text, the ids of all in a row, and
    how many ids and bytes of text each has."""

    read: int
    ids: NDArray[Any]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]


def _blocks(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[_Block]:
    """The documents in order, encoded by several threads while the caller's reads on; few blocks are in memory."""
    waiting: deque[Future[_Block]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for texts in _together(documents):
            waiting.append(threads.submit(_encoded, texts, tokenizer))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encoded(texts: list[str], tokenizer: Tokenizer) -> _Block:
    all_ids = tokenizer.encode_batch(texts)
    kept = [(text, ids) for text, ids in zip(texts, all_ids, strict=True) if len(ids)]
    end = np.array([tokenizer.end_of_text])
    parts = [part for _, ids in kept for part in (end, ids)]
    return _Block(
        read=len(texts),
        ids=np.concatenate([end[:0], *parts], dtype=_dtype(tokenizer), casting="unsafe"),
        lengths=np.array([1 + len(ids) for _, ids in kept], dtype=np.int64),
        sizes=np.array([len(text.encode("utf-8", "replace")) for text, _ in kept], dtype=np.int64),
    )


def _together(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists that are worth a thread's while, and small beside the memory."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= _AT_ONCE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
