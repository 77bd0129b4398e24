"""Shards give back what was put in, whole or not at all, and notice when they are hurt."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_tokenizer import sentences, tokenizer

from unmask.errors import UserError
from unmask.text import shards
from unmask.text.shards import Shards, build
from unmask.text.tokenizer import Tokenizer


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))).filter(any), at_once=st.integers(1, 50)
)
def test_documents_come_back_each_behind_its_end_of_text(
    texts: list[str], at_once: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_AT_ONCE", at_once)
    built = build(tmp_path_factory.mktemp("shards") / "x", iter(texts), tokenizer())
    kept = [text for text in texts if text]
    assert built.documents == len(kept)
    assert built.empty == len(texts) - len(kept)
    assert built.tokens == sum(len(built.document(i)) for i in range(built.documents))
    assert built.document_bytes.tolist() == [len(text.encode()) for text in kept]
    for i, text in enumerate(kept):
        first, *rest = built.document(i).tolist()
        assert first == tokenizer().end_of_text
        assert tokenizer().decode(rest) == text


@pytest.mark.parametrize("length", [1, 7, 256])
def test_rows_cover_the_stream_and_every_token_but_the_first_is_a_target_once(
    length: int, tmp_path: Path
) -> None:
    built = build(tmp_path / "x", sentences(40), tokenizer())
    stream = np.concatenate([built.document(i) for i in range(built.documents)])
    rows = [built.row(i, length) for i in range(built.rows(length))]
    assert all(row.shape == (length + 1,) and row.dtype == np.int64 for row in rows)
    targets = np.concatenate([row[1:] for row in rows])
    assert targets.tolist() == stream[1 : len(targets) + 1].tolist()
    assert len(stream) - 1 - len(targets) < length
    assert [row[-1] for row in rows[:-1]] == [row[0] for row in rows[1:]]


def test_text_shorter_than_a_row_has_none(tmp_path: Path) -> None:
    built = build(tmp_path / "x", ["ab"], tokenizer())
    assert built.rows(built.tokens - 1) == 1
    assert built.rows(built.tokens) == 0


def test_control_tokens_in_documents_stay_text(tmp_path: Path) -> None:
    built = build(tmp_path / "x", ["a<|endoftext|>b", "<|im_end|>"], tokenizer())
    stream = np.concatenate([built.document(0), built.document(1)])
    assert np.isin(stream, list(tokenizer().control.values())).sum() == 2


def test_opening_gives_what_was_built(tmp_path: Path) -> None:
    built = build(tmp_path / "x", sentences(20), tokenizer())
    opened = Shards.open(tmp_path / "x", verify=True)
    assert (opened.tokens, opened.documents, opened.fingerprint) == (
        built.tokens,
        built.documents,
        built.fingerprint,
    )
    assert opened.tokenizer == tokenizer().hash
    assert opened.row(0, 8).tolist() == built.row(0, 8).tolist()


def test_the_fingerprint_is_of_tokens_documents_and_tokenizer(tmp_path: Path) -> None:
    texts = sentences(20)
    other = Tokenizer.train(sentences(50, seed=4), 500)
    made = {
        build(tmp_path / "a", texts, tokenizer()).fingerprint,
        build(tmp_path / "b", [*texts[1:], texts[0]], tokenizer()).fingerprint,
        build(tmp_path / "c", texts[1:], tokenizer()).fingerprint,
        build(tmp_path / "d", texts, other).fingerprint,
    }
    assert len(made) == 4
    assert build(tmp_path / "e", iter(texts), tokenizer()).fingerprint in made


def test_a_vocabulary_above_65536_is_written_in_32_bits(tmp_path: Path) -> None:
    content = json.loads(json.dumps(tokenizer()._content))
    content["model"]["vocab"]["zzzz"] = 70_000
    large = Tokenizer(content, {}, "")
    built = build(tmp_path / "x", ["the river"], large)
    assert (tmp_path / "x/tokens.bin").stat().st_size == 4 * built.tokens
    assert large.decode(built.document(0)[1:]) == "the river"


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    def broken() -> object:
        yield from sentences(3)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        build(tmp_path / "x", broken(), tokenizer())  # type: ignore[arg-type]
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="no text"):
            build(tmp_path / "x", nothing, tokenizer())
    assert not list(tmp_path.iterdir())
    build(tmp_path / "x", ["a"], tokenizer())
    with pytest.raises(UserError, match="exists"):
        build(tmp_path / "x", ["a"], tokenizer())


@pytest.mark.parametrize("torn", [b"", b"xyz"], ids=["whole", "torn"])
def test_a_build_that_was_cut_short_goes_on_and_ends_as_if_it_had_not(
    torn: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.text.shards._AT_ONCE", 300)
    monkeypatch.setattr("unmask.text.shards._NOTE_SECONDS", 0.0)
    texts = ["", *sentences(60), "", *sentences(40)]  # one before what is noted and one after it

    def killed() -> Iterator[str]:
        yield from texts[:70]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "x", killed(), tokenizer())
    for name in ("tokens.bin", "documents.bin"):  # written after the last note, in part
        with (tmp_path / "x.partial" / name).open("ab") as file:
            file.write(torn)
    encoded: list[str] = []
    plainly = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, batch: encoded.extend(batch) or plainly(self, batch)
    )
    again = build(tmp_path / "x", texts, tokenizer())
    assert len(encoded) < 60  # some 60 of 102 were there
    assert again.fingerprint == build(tmp_path / "y", texts, tokenizer()).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "documents.bin", "index.json", "tokens.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "negative"])
def test_what_is_shorter_than_was_noted_is_not_taken_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.text.shards._AT_ONCE", 300)
    monkeypatch.setattr("unmask.text.shards._NOTE_SECONDS", 0.0)

    def killed() -> Iterator[str]:
        yield from list(sentences(60))[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "x", killed(), tokenizer())
    partial = tmp_path / "x.partial"
    if name == "negative":
        noted = json.loads((partial / "progress.json").read_text())
        (partial / "progress.json").write_text(json.dumps({**noted, "tokens": -5}))
    else:
        (partial / name).write_bytes((partial / name).read_bytes()[:-20])
    whole = build(tmp_path / "y", sentences(60), tokenizer())
    assert build(tmp_path / "x", sentences(60), tokenizer()).fingerprint == whole.fingerprint


def test_what_another_tokenizer_had_encoded_is_not_taken_up(tmp_path: Path) -> None:
    whole = build(tmp_path / "y", sentences(20), tokenizer())
    partial = tmp_path / "x.partial"
    partial.mkdir()
    for name in ("tokens.bin", "documents.bin"):
        (partial / name).write_bytes(b"0123456789abcdef")
    (partial / "progress.json").write_text(
        '{"tokenizer": "another", "read": 1, "empty": 0, "documents": 1, "tokens": 8, "bytes": 5}'
    )
    assert build(tmp_path / "x", sentences(20), tokenizer()).fingerprint == whole.fingerprint


@pytest.mark.parametrize("threads", [1, 5])
def test_the_bytes_do_not_depend_on_how_many_threads_encode(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_AT_ONCE", 300)
    texts = [*sentences(60), "", "a" * 5000, *sentences(40, seed=1)]
    build(tmp_path / "x", texts, tokenizer())
    monkeypatch.setattr(shards, "_THREADS", threads)
    late = threading.Event()
    plainly = shards._encoded

    def uneven(texts: list[str], tokenizer: Tokenizer) -> shards._Block:
        late.wait(0.002 * (len(texts[0]) % 5))  # later blocks are done earlier
        return plainly(texts, tokenizer)

    monkeypatch.setattr(shards, "_encoded", uneven)
    build(tmp_path / "y", texts, tokenizer())
    for name in ("tokens.bin", "documents.bin", "index.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_documents_are_read_no_faster_than_they_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_AT_ONCE", 1)
    plainly = shards._encoded
    encoded: list[str] = []
    ahead: list[int] = []

    def slow(texts: list[str], tokenizer: Tokenizer) -> shards._Block:
        time.sleep(0.001)
        encoded.extend(texts)
        return plainly(texts, tokenizer)

    def read() -> Iterator[str]:
        for place, text in enumerate(sentences(200), 1):
            ahead.append(place - len(encoded))
            yield text

    monkeypatch.setattr(shards, "_encoded", slow)
    build(tmp_path / "x", read(), tokenizer())
    assert max(ahead) <= shards._THREADS + 2


BUILDING = """
import signal
import sys
import time
from pathlib import Path
from unmask.text import shards
from unmask.text.sources import read_texts
from unmask.text.tokenizer import Tokenizer

shards._AT_ONCE, shards._NOTE_SECONDS = 20_000, 0.0
here = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background

def slowly(texts):  # or it would be done before a busy machine can stop it
    for place, text in enumerate(texts):
        if place % 2_000 == 1_999:
            time.sleep(0.2)
        yield text

try:
    shards.build(here / "x", slowly(read_texts(str(here / "text.jsonl"))), Tokenizer.load(here / "tokenizer"))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_was_stopped_leaves_no_process_and_ends_with_the_same_bytes(
    stopped_by: signal.Signals, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) for text in sentences(500)] * 40
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    tokenizer().save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", BUILDING, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        progress = tmp_path / "x.partial" / "progress.json"
        while not progress.exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(stopped_by)
        _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if stopped_by == signal.SIGINT else -signal.SIGKILL)
    assert said == b""
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # none is left of its group
    noted = json.loads(progress.read_bytes())
    assert 0 < noted["read"] < len(lines)
    subprocess.run(command, check=True, timeout=60)
    whole = build(tmp_path / "y", [json.loads(line)["text"] for line in lines], tokenizer())
    assert Shards.open(tmp_path / "x", verify=True).fingerprint == whole.fingerprint


READING = """
import sys
from pathlib import Path
from unmask.text import shards
from unmask.text.order import row_at
from unmask.text.sources import read_texts
from unmask.text.tokenizer import Tokenizer

def memory(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024

shards._THREADS = 2  # each holds a tiktoken and a block of text
here = Path(sys.argv[1])
tokenizer = Tokenizer.load(here / "tokenizer")
tokenizer.encode_batch(["x"])
before = memory("VmRSS")
built = shards.build(here / "x", read_texts(str(here / "text.jsonl")), tokenizer)
print(memory("VmHWM") - before)
before = memory("RssAnon")
for k in range(20_000):
    built.row(row_at(k, built.rows(64), 0), 64)
print(memory("RssAnon") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """MB by which it grows while 80 MB are encoded, and while their 60 MB of ids are read in a shuffled order."""
    text = "\n".join(sentences(2000))
    with (tmp_path / "text.jsonl").open("w") as file:
        for _ in range(80_000_000 // len(text)):
            file.write(json.dumps({"text": text}) + "\n")
    tokenizer().save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", READING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    building, reading = map(float, done.stdout.split())
    assert building < 40
    assert reading < 15


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_truncated_missing_and_changed_files_are_refused_by_name(tmp_path: Path) -> None:
    build(tmp_path / "x", sentences(20), tokenizer())
    for name in ("tokens.bin", "documents.bin", "index.json"):
        path = tmp_path / "x" / name
        whole = path.read_bytes()
        for hurt in (whole[:-2], whole + b"xx", b""):
            path.write_bytes(hurt)
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                Shards.open(tmp_path / "x")
        path.write_bytes(whole)
        flip(path, len(whole) // 2)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            Shards.open(tmp_path / "x", verify=True)
        path.unlink()
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            Shards.open(tmp_path / "x")
        path.write_bytes(whole)
        Shards.open(tmp_path / "x", verify=True)


def test_an_index_that_was_edited_is_refused(tmp_path: Path) -> None:
    built = build(tmp_path / "x", sentences(20), tokenizer())
    path = tmp_path / "x/index.json"
    whole = path.read_text()
    for old, new in (
        (tokenizer().hash, "0" * 64),
        (f'"tokens": {built.tokens}', f'"tokens": {built.tokens - 1}'),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(UserError, match=r"index\.json was changed"):
            Shards.open(tmp_path / "x")
