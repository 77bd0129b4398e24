"""`unmask text` on files whose copies are known."""

import json
from pathlib import Path

import pytest
from shrunken import unmask

from unmask import recipe
from unmask.pipeline import text_check

pytest.importorskip("datasketch")


def test_copies_and_trained_on_prompts_are_counted(tmp_path: Path) -> None:
    long = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(30)]
    raw = [{"text": text} for text in [*long, *long[:4]]]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    rows = [{"prompt": f"Say this: {long[i]}", "completion": "no"} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"chosen": f"\n\nHuman: {i}\n\nAssistant: yes", "rejected": f"\n\nHuman: {i}\n\nAssistant: no"}
             for i in range(40)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
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
source = {{ path = "{tmp_path}/pairs.jsonl", heldout = 0.1 }}
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


@pytest.mark.parametrize("layer", ["sft", "reward", "rl", "none"])
def test_a_question_is_seen_in_whatever_layer_it_was_trained_in(tmp_path: Path, layer: str) -> None:
    asked = " ".join(f"ask{i}" for i in range(20))

    def file(name: str, rows: list[dict[str, str]]) -> str:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f'{{ path = "{tmp_path}/{name}.jsonl", heldout = 0.0 }}'

    def question(of: str, i: int) -> str:
        return asked if of == layer and i == 0 else f"{of} {i}"

    raw = file("raw", [{"text": f"nothing {i}"} for i in range(30)])
    chats = file("chats", [{"prompt": question("sft", i), "completion": "yes"} for i in range(30)])
    pairs = file(
        "pairs", [{"prompt": question("reward", i), "chosen": "yes", "rejected": "no"} for i in range(30)]
    )
    prompts = file("prompts", [{"prompt": question("rl", i)} for i in range(30)])
    (tmp_path / "mine.toml").write_text(
        f'''name = "mine"
[pretrain]
sources = [{raw}]
[sft]
sources = [{chats}]
[reward]
gold = false
source = {pairs}
[rl]
sources = [{prompts}]
[measure]
questions = ["{asked}"]
'''
    )
    found = text_check.look(recipe.resolve(recipe.load(str(tmp_path / "mine.toml"))))
    assert found.kinds["questions"].seen == (layer != "none")
