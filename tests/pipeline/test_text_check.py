"""`unmask text` on files whose copies are known."""

import json
from pathlib import Path

import pytest
from shrunken import unmask

pytest.importorskip("datasketch")


def test_copies_and_trained_on_prompts_are_counted(tmp_path: Path) -> None:
    long = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(30)]
    raw = [{"text": text} for text in [*long, *long[:4]]]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    rows = [{"prompt": f"Say this: {long[i]}", "completion": "no"} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = f'{{ path = "{tmp_path}/chats.jsonl", heldout = 0.5 }}'
    (tmp_path / "mine.toml").write_text(
        f'''name = "mine"
depth = 1
heldout = 0.0
[pretrain]
tokens = 1000
sources = [{{ path = "{tmp_path}/raw.jsonl", label = "raw" }}]
[sft]
sources = [{chats}]
[reward]
source = {chats}
[rl]
sources = [{chats}]
[measure]
questions = ["Who was it?"]
'''
    )
    done = unmask("text", tmp_path / "mine.toml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pretraining"]["raw"] == {"documents": 34, "exact_copies": 4, "near_copies": 0}
    prompts = found["measured_on"]["held-out prompts"]
    assert 5 < prompts["texts"] < 25
    assert prompts["seen"] == prompts["texts"]  # all their words are in the raw text
    assert found["measured_on"]["questions"]["short"] == 1
    shown = unmask("text", tmp_path / "mine.toml")
    assert "One of each that was seen" in shown.stdout
