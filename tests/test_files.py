"""Files that are whole or absent: hashes, atomic writes, locks, JSON lines."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import files
from unmask.errors import UserError

DEAD = 2**22 + 1  # above the highest pid of Linux

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


# Hashes


def test_hashes_are_sha256_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert files.sha256_hex(data) == files.sha256_hex(memoryview(data)) == expected
    assert files.sha256_file(tmp_path / "file") == expected


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values))
def test_canonical_json_is_read_back_and_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    text = files.canonical_json(value)
    assert json.loads(text) == value
    assert files.canonical_json(dict(reversed(value.items()))) == text
    assert files.hash_json(value) == files.sha256_hex(text.encode())


def test_canonical_json_has_one_spelling_and_no_nan() -> None:
    assert files.canonical_json({"b": 1, "a": ["é", None]}) == '{"a":["é",null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical_json({"a": float("nan")})


# Atomic directories and files


def test_a_directory_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with files.atomic_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert re.fullmatch(rf"\.model\.tmp-{os.getpid()}-[0-9a-f]+", temporary.name)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_text("w")
        assert not target.exists()
    assert (target / "sub" / "weights").read_text() == "w"
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]


def test_after_an_error_neither_the_directory_nor_its_temporary_is_there(tmp_path: Path) -> None:
    def interrupted() -> None:
        with files.atomic_directory(tmp_path / "model") as temporary:
            (temporary / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_existing_directory_is_never_replaced(tmp_path: Path, when: str) -> None:
    target = tmp_path / "model"

    def write() -> None:
        with files.atomic_directory(target) as temporary:
            (temporary / "weights").write_text("new")
            target.mkdir()

    if when == "before":
        target.mkdir()
    with pytest.raises(UserError, match="exists already"):
        write()
    assert list(target.iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was forced to the disk, and RENAME where something got its name."""
    if sys.platform != "linux":
        pytest.skip("asks /proc which file a descriptor is")
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted(self: Path, target: Path, by: Callable[[Path, Path], Path]) -> Path:
        events.append("RENAME")
        return by(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", lambda self, target: noted(self, target, rename))
    monkeypatch.setattr(Path, "replace", lambda self, target: noted(self, target, replace))
    return events


def test_a_file_reaches_the_disk_before_it_gets_its_name_and_its_name_after(
    tmp_path: Path, events: list[str]
) -> None:
    files.write_atomic(tmp_path / "summary.json", "new")
    written, *rest = events
    assert "summary.json.tmp-" in written
    assert rest == ["RENAME", tmp_path.name]


def test_every_file_reaches_the_disk_before_the_directory_gets_its_name(
    tmp_path: Path, events: list[str]
) -> None:
    with files.atomic_directory(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        (temporary / "b").write_text("b")
    named = events.index("RENAME")
    assert set(events[:named]) == {"a", "b", "sub", temporary.name}
    assert events[named - 1] == temporary.name
    assert events[named + 1 :] == [tmp_path.name]


def test_a_file_is_replaced_in_one_go_and_a_failure_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "summary.json"
    files.write_atomic(target, "old é")
    files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"cannot write .*summary\.json: No space left on device\. Check free space"
    ):
        files.write_atomic(target, "never")
    assert target.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=f"cannot write into {tmp_path}/file/model: a file is in the way"),
        files.atomic_directory(tmp_path / "file" / "model"),
    ):
        pass


def test_sweeping_removes_the_temporaries_of_dead_processes_only(tmp_path: Path) -> None:
    gone = [f".a.tmp-{DEAD}-00ff", f".b.json.tmp-{DEAD}-0"]
    stays = [f".c.tmp-{os.getpid()}-00ff", "tmp-1-0", f"d.tmp-{DEAD}-00ff", f".e.tmp-{DEAD}-xyz"]
    (tmp_path / gone[0]).mkdir()
    (tmp_path / gone[0] / "inside").write_text("")
    (tmp_path / gone[1]).write_text("")
    for name in stays:
        (tmp_path / name).mkdir()
    files.sweep_temporaries(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(stays)
    files.sweep_temporaries(tmp_path / "absent")


# Locks


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from unmask.files import lock\n"
        "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf"\(pid {holder.pid}\) is working in {directory}"),
        files.lock(directory),
    ):
        pass
    holder.kill()
    holder.wait()
    with files.lock(directory):
        assert (directory / ".lock").read_text() == str(os.getpid())
    with files.lock(directory):
        pass


# JSON lines


def test_lines_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    files.append_lines(path, [{"a": 1}, {"b": "é\n"}])
    files.append_lines(path, [{"c": None}])
    assert files.read_json_lines(path) == [{"a": 1}, {"b": "é\n"}, {"c": None}]
    assert path.read_text("utf-8").count("\n") == 3
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.append_lines(path, [{"a": float("inf")}])


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"a": ', "not valid JSON"), (b"[1]", "a JSON object, found list"), (b"\xff", "not valid")],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{message}"):
        files.read_json_lines(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        files.read_json_lines(tmp_path / "absent.jsonl")
