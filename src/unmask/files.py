"""Files that are whole or absent: hashes, atomic writes, locks, JSON lines.

A reader never sees half a file of ours. What is written goes to a temporary sibling, reaches the disk (fsync)
and is then renamed. A process that is killed leaves at most a temporary, whose name holds its process id.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmask.errors import UserError

_TEMPORARY = re.compile(r"^\..+\.tmp-(\d+)-[0-9a-f]+$")


def sha256_hex(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(obj: Any) -> str:
    """The one spelling of a value that is hashed: keys sorted, no spaces, no NaN (ValueError)."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(obj: Any) -> str:
    return sha256_hex(canonical_json(obj).encode())


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` at the end of the block, all its files safely on disk.

    If the block raises, the temporary is removed and `path` stays absent. Raises UserError if `path` exists,
    or if the system refuses the write (disk full, no permission).
    """
    with explained(path):
        _refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _refuse_existing(path)  # rename() would silently replace an empty directory
            temporary.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_atomic(path: Path, data: str | bytes) -> None:
    """Put `data` at `path`, replacing what was there; after a crash `path` holds the old or the new."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sweep_temporaries(directory: Path) -> None:
    """Remove what killed processes left half written in `directory`; temporaries of living ones stay."""
    for entry in directory.iterdir() if directory.is_dir() else ():
        match = _TEMPORARY.match(entry.name)
        if match is None or _alive(int(match.group(1))):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keep other processes out of `directory` (made if absent) during the block, by its file `.lock`.

    The system drops the lock when the process ends, however it ends. Raises UserError if another has it.
    """
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"another process (pid {holder}) is working in {directory}. "
                "Wait until it has finished, stop it, or use another directory."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line, in one write, so that a reader sees whole lines."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text.encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON lines file; empty lines are passed over. UserError names file and line."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # broken JSON and broken UTF-8 alike
                raise UserError(f"{path}:{number}: not valid JSON ({error}). Mend or remove it.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
            rows.append(row)
    return rows


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read or write `path` (disk full, permission, …) into a UserError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise UserError(
                f"cannot write into {path}: a file is in the way{where}. Name a directory."
            ) from error
        raise UserError(
            f"cannot write {path}: {error.strerror or error}{where}. Check free space and permissions, or "
            "choose another directory; what was there before is untouched."
        ) from error


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already. Remove it, or choose another name.")


def sync(path: Path) -> None:
    """Return when what was written to this file or directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and belongs to someone else
        return True
    return True
