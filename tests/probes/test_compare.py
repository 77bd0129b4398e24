"""Which texts a comparison is read on."""

import json
from pathlib import Path

import pytest

from unmask.errors import UserError
from unmask.probes.compare import texts_beside


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rl").mkdir()
    messages = [{"role": "user", "content": "Hello"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"source": "a", "text": "held out"}) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("here", "named"), [("rl", "."), (".", "rl"), (".", "."), ("rl", ".."), ("rl", "../rl")]
)
def test_the_texts_of_a_run_are_found_from_wherever_its_checkpoints_are_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, here: str, named: str
) -> None:
    monkeypatch.chdir(run / here)
    texts = texts_beside([Path(named)], None, None)
    assert [document.text for document in texts.documents] == ["held out"]
    assert len(texts.prompts) == 1


def test_outside_a_run_both_files_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--prompts FILE .* --text FILE"):
        texts_beside([tmp_path], None, None)


def test_a_run_is_compared_on_what_it_was_measured_on(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    (tmp_path / "heldout.jsonl").write_text('{"source": "books", "text": "It rained."}\n')
    measured = {"measured_by": {"seed": 7, "measure": {"heldout_bytes": 12_345}}}
    (tmp_path / "summary.json").write_text(json.dumps(measured))
    found = texts_beside([tmp_path / "sft"], None, None)
    assert (found.limit_bytes, found.seed) == (12_345, 7)


def test_a_row_of_a_run_that_lacks_its_keys_is_named(run: Path) -> None:
    (run / "prompts.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl.*1: a row of prompts needs prompt or messages"):
        texts_beside([run], None, None)
    (run / "prompts.jsonl").write_text('{"messages": [{"role": "assistant", "content": "Hi"}]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl.*1: there is nobody to answer"):
        texts_beside([run], None, None)
    (run / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    (run / "heldout.jsonl").write_text('{"source": "a", "text": "held out"}\n{"text": "x"}\n')
    with pytest.raises(UserError, match=r"heldout\.jsonl:2: held-out text needs source and text"):
        texts_beside([run], None, None)
