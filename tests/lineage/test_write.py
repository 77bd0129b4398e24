"""A checkpoint is written whole, opens elsewhere, and says where it comes from."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import decoder, write
from pydantic import JsonValue

from unmask.errors import UserError
from unmask.lineage import Checkpoint, Lineage, Record
from unmask.lineage import record as records
from unmask.lineage.card import model_card
from unmask.model.decoder import Decoder
from unmask.text.tokenizer import Tokenizer

FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "unmask.json",
}  # fmt: skip


def test_the_directory_has_what_others_expect_and_nothing_else(run: Path) -> None:
    assert {path.name for path in (run / "rl").iterdir()} == FILES
    assert {path.name for path in (run / "reward").iterdir()} == FILES - {"generation_config.json"}
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_transformers_reads_the_stop_tokens(run: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig.from_pretrained(run / "rl")
    assert config.eos_token_id == [tokenizer.turn_end, tokenizer.end_of_text]
    assert config.pad_token_id == tokenizer.pad
    assert config.pad_token_id not in config.eos_token_id


def test_what_is_written_is_what_was_given(run: Path, tokenizer: Tokenizer) -> None:
    model = Checkpoint.open(run / "sft").model()
    assert isinstance(model, Decoder)
    given = decoder(tokenizer, 1).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    record = Checkpoint.open(run / "sft").record
    assert record is not None
    assert (record.steps, record.tokens, record.seconds, record.seed) == (10, 1000, 2.5, 1)
    assert record.recipe == {"name": "test", "sft": {"tokens": 1000, "lr": 7e-4}}
    assert record.parent is not None
    assert record.parent.path == "../base"
    assert record.dtype == "float32"


def test_the_hash_covers_every_field_of_the_record(run: Path) -> None:
    path = run / "rl" / "unmask.json"
    whole = json.loads(path.read_text())
    assert set(whole["record"]) == set(Record.model_fields)
    for field, value in whole["record"].items():
        if field == "format":
            continue  # only one is known
        other = {int: 7, float: 0.125, str: "x"}.get(type(value), {"path": "../sft", "hash": "x"})
        path.write_text(json.dumps(whole | {"record": whole["record"] | {field: other}}))
        try:
            read = records.read(path)
        except UserError:  # of another form
            continue
        assert read.hash != read.claimed == whole["hash"], field


def test_a_metric_that_is_not_finite_does_not_lose_the_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write(
        tmp_path / "base",
        tokenizer,
        metrics={"loss": math.nan, "more": [math.inf, {"x": -math.inf}], "ok": 1.5},
    )
    checkpoint = Checkpoint.open(tmp_path / "base")
    assert checkpoint.record is not None
    assert checkpoint.record.metrics == {"loss": None, "more": [None, {"x": None}], "ok": 1.5}
    assert Lineage.open(tmp_path / "base").verify() == []


def test_bfloat16_on_request_is_recorded_and_verified(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = write(tmp_path / "base", tokenizer, dtype=torch.bfloat16)
    assert checkpoint.record is not None
    assert checkpoint.record.dtype == "bfloat16"
    assert Lineage.open(checkpoint.path).verify() == []


def test_a_name_of_an_ancestor_is_refused(run: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="'base' is taken"):
        write(run / "again", tokenizer, name="base", parent=Checkpoint.open(run / "sft"))
    assert not (run / "again").exists()


def test_another_tokenizer_than_the_parents_is_refused(run: Path) -> None:
    other = Tokenizer.train(["completely other words entirely"] * 9, 280)
    with pytest.raises(UserError, match="another tokenizer"):
        write(run / "child", other, model=decoder(other, 0), parent=Checkpoint.open(run / "sft"))


def test_an_existing_directory_is_never_overwritten(run: Path, tokenizer: Tokenizer) -> None:
    before = Checkpoint.open(run / "sft").hash
    with pytest.raises(UserError, match="exists"):
        write(run / "sft", tokenizer, seed=7)
    assert Checkpoint.open(run / "sft").hash == before
    assert Lineage.open(run / "rl").verify() == []


def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("on the way")

    monkeypatch.setattr("unmask.lineage.write.model_card", fail)
    with pytest.raises(RuntimeError):
        write(tmp_path / "base", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_for_people_and_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 64 KB: the weights do not fit."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from checkpoints import TEXTS, write
from unmask.errors import UserError
from unmask.text.tokenizer import Tokenizer
tokenizer = Tokenizer.train(TEXTS, 300)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write(Path({str(tmp_path)!r}) / "base", tokenizer)
except UserError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "refused: " in done.stdout
    assert str(tmp_path / "base") in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 65536


def front_matter(card: str) -> dict[str, object]:
    head, _, _ = card.removeprefix("---\n").partition("\n---\n")
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}


def test_the_card_names_base_and_relation(run: Path) -> None:
    card = (run / "rl" / "README.md").read_text()
    matter = front_matter(card)
    assert matter["base_model"] == "../sft"
    assert matter["base_model_relation"] == "finetune"
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert "datasets" not in matter  # labels of ours name nothing on the Hub
    assert Checkpoint.open(run / "rl").hash in card
    root = front_matter((run / "base" / "README.md").read_text())
    assert "base_model" not in root
    assert "base_model_relation" not in root
    assert front_matter((run / "reward" / "README.md").read_text())["pipeline_tag"] == "text-classification"


def test_the_card_names_the_data_sets_of_the_hub_that_a_stage_read(run: Path) -> None:
    record = Checkpoint.open(run / "rl").record
    assert record is not None
    sources: list[JsonValue] = [{"path": "hf://a/b:config#train"}, {"path": "hf://c"}, {"path": "talk.jsonl"}]
    recipe: dict[str, JsonValue] = {"sft": {"sources": sources}}
    assert front_matter(model_card(record.model_copy(update={"recipe": recipe})))["datasets"] == ["a/b", "c"]


def test_the_hub_reads_the_front_matter(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(run / "rl" / "README.md").data
    assert data.base_model == "../sft"
    assert data.to_dict()["base_model_relation"] == "finetune"


def test_a_hostile_label_stays_in_its_cell(run: Path) -> None:
    record = Checkpoint.open(run / "rl").record
    assert record is not None
    label = "a | b\n---\n# heading: \"x\" 'y'"
    name = "a\n---\nb \"x\" 'y'"
    hub: dict[str, JsonValue] = {"sources": [{"path": f"hf://{name}"}]}
    card = model_card(record.model_copy(update={"data": {label: "f" * 64}, "recipe": hub}))
    assert front_matter(card)["datasets"] == [name]
    assert "\n# heading" not in card.split("\n---\n", 1)[1]
    assert "a \\| b" in card


def test_writing_into_the_card_breaks_no_hash(run: Path) -> None:
    (run / "sft" / "README.md").write_text("mine")
    assert Lineage.open(run / "rl").verify() == []
