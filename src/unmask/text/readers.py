"""Files of text and rows, read in a stream: compressed or not, with errors that name file and line.

Lines end at "\\n" alone: U+2028 and other separators may stand inside JSON strings. A byte order mark and
"\\r\\n" are tolerated. No text or line may be longer than `MOST_BYTES`, so that a small file cannot unpack
into all of the memory.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

from unmask.errors import UserError

KINDS = ".txt, .jsonl, .json, each also .gz, .xz, .zst; .parquet"
MOST_BYTES = 256 * 2**20
_COMPRESSED = (".gz", ".xz", ".zst")
_BOM = b"\xef\xbb\xbf"

Row = tuple[str, dict[str, Any]]  # where it stands, columns


def kind(path: Path) -> str:
    """ ".txt", ".jsonl", ".json" or ".parquet", whatever it is compressed with; "" for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]] or [""]
    plain = suffixes[-1] if suffixes[-1] not in _COMPRESSED else suffixes[0]
    if plain == ".parquet":
        return plain if suffixes[-1] == plain else ""
    return plain if plain in (".txt", ".jsonl", ".json") else ""


def whole(path: Path) -> str:
    """All of a text file."""
    with _opened(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(
            f"{path} is one document of more than {MOST_BYTES >> 20} MiB. Split it, or make it .jsonl, "
            "a document a line."
        )
    return _decoded(data.removeprefix(_BOM), str(path))


def rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file."""
    return {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}[kind(path)](path)


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of NAME[:config][#split] (split "train" if none is given), streamed; no code of its own runs."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("hf:// needs the library `datasets`: pip install 'unmask[hf]'") from None
    source, _, split = name.partition("#")
    source, _, config = source.partition(":")
    try:
        for number, row in enumerate(
            load_dataset(source, config or None, split=split or "train", streaming=True)
        ):
            yield f"hf://{name} row {number}", row
    except Exception as error:  # it raises whatever its readers and the network raise
        raise UserError(f"hf://{name} cannot be read ({type(error).__name__}: {error}).") from error


def _json_lines(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MOST_BYTES:
                raise UserError(
                    f"{where}: the line is longer than {MOST_BYTES >> 20} MiB. Split or remove it."
                )
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield where, _object(_parsed(line, where), where)


def _json(path: Path) -> Iterator[Row]:
    """A file that is one JSON array of rows, or one row."""
    found = _parsed(whole(path).encode(), str(path))
    for number, row in enumerate(found if isinstance(found, list) else [found]):
        where = f"{path} item {number}"
        yield where, _object(row, where)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Read ahead, without a buffer, or by one reader for all row groups it would take most of the file into memory.
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            number = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                    for row in batch.to_pylist():
                        yield f"{path} row {number}", row
                        number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}). Restore it from a copy.") from error


def _parsed(line: bytes, where: str) -> Any:
    text = _decoded(line, where)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}). Mend or remove it.") from None
    # An escape can hold half of a surrogate pair, which is no character and which no file can hold.
    return _sound(found) if "\\ud" in text.lower() else found


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(row).__name__}.")
    return row


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}). Convert it, for instance "
            "with `iconv -f latin1 -t utf-8`."
        ) from None


def _sound(value: Any) -> Any:
    """The value with lone surrogates in its texts replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_sound(each) for each in value]
    if isinstance(value, dict):
        return {_sound(key): _sound(each) for key, each in value.items()}
    return value


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. What is broken in it is a UserError, whenever it shows."""
    try:
        with _unpacked(path) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}). Restore it from a copy.") from error


def _unpacked(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, BufferedReader(pyarrow.input_stream(path, compression="zstd")))
    return path.open("rb")
