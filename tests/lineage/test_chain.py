"""A chain that holds verifies; whatever does not hold is named, with its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import decoder, write
from safetensors.torch import load_file, save_file

from unmask.errors import UserError
from unmask.files import hash_json
from unmask.lineage import Checkpoint, Lineage, load_layers, open_layers
from unmask.text.tokenizer import Tokenizer


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def test_the_chain_of_a_finished_run_holds(run: Path) -> None:
    for tip, names in {
        "rl": ["base", "sft", "rl"],
        "reward": ["base", "sft", "reward"],
        "base": ["base"],
    }.items():
        lineage = Lineage.open(run / tip)
        assert [checkpoint.name for checkpoint in lineage.checkpoints] == names
        assert lineage.verify() == []
    assert [layer.name for layer in Lineage.open(run / "reward").layers] == ["base", "sft"]


def test_every_byte_of_the_weights_counts_and_its_tensor_is_named(run: Path) -> None:
    path = run / "sft" / "model.safetensors"
    whole = path.read_bytes()
    for place in (-1, -1000, -len(whole) // 2):
        hurt = bytearray(whole)
        hurt[place] ^= 1
        path.write_bytes(hurt)
        problem = only(Lineage.open(run / "rl").verify())
        assert problem.startswith("sft: ")
        assert str(path) in problem
        assert "model." in problem.split("numbers of")[1]
    path.write_bytes(whole)
    assert Lineage.open(run / "rl").verify() == []


def test_a_tensor_that_is_gone_and_one_that_nobody_recorded_are_named(run: Path) -> None:
    path = run / "sft" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    problems = Lineage.open(run / "rl").verify()
    assert len(problems) == 2
    assert "lacks tensor model.norm.weight" in problems[0]
    assert "holds tensor model.extra.weight" in problems[1]


def test_truncated_weights_are_a_sentence_and_not_a_crash(run: Path) -> None:
    path = run / "rl" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    problem = only(Lineage.open(run / "rl").verify())
    assert problem.startswith("rl: ")
    assert str(path) in problem


def test_an_edited_record_is_seen_at_the_tip_and_below_it(run: Path) -> None:
    edit(run / "rl" / "unmask.json", lambda file: file["record"].update(tokens=1001))
    assert "record" in only(Lineage.open(run / "rl").verify())
    edit(run / "sft" / "unmask.json", lambda file: file["record"].update(seconds=1.0))
    problems = Lineage.open(run / "reward").verify()
    assert any("the record in" in problem and problem.startswith("sft") for problem in problems)
    assert any("the parent in" in problem and problem.startswith("reward") for problem in problems)


def test_a_record_that_was_edited_together_with_its_own_hash_betrays_itself_to_its_children(
    run: Path,
) -> None:
    def forge(file: dict[str, Any]) -> None:
        file["record"]["metrics"] = {"loss": 0.0}
        file["hash"] = hash_json(file["record"])

    edit(run / "base" / "unmask.json", forge)
    problem = only(Lineage.open(run / "sft").verify())
    assert problem.startswith("sft: the parent in")
    assert "recorded" in problem


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("config.json", lambda file: file.update(rope_theta=5000.0), "configuration"),
        ("config.json", lambda file: file.update(auto_map={"AutoModel": "evil.py"}), "configuration"),
        ("config.json", lambda file: file.update(dtype="bfloat16"), "configuration"),
        ("tokenizer.json", lambda file: file["model"]["vocab"].update(new=299), "tokenizer"),
        ("generation_config.json", lambda file: file.update(eos_token_id=0), "stops"),
    ],
)
def test_an_edited_json_file_is_named(
    run: Path, file: str, change: Callable[[dict[str, Any]], None], word: str
) -> None:
    edit(run / "sft" / file, change)
    problem = only(Lineage.open(run / "rl").verify())
    assert problem.startswith("sft: ")
    assert word in problem
    assert str(run / "sft" / file) in problem


def test_an_edited_chat_template_is_named(run: Path) -> None:
    path = run / "rl" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    problem = only(Lineage.open(run / "rl").verify())
    assert "chat template" in problem
    assert str(path) in problem


def test_a_swapped_tokenizer_is_seen(run: Path) -> None:
    Tokenizer.train(["completely other words entirely"] * 9, 280).save(run / "rl")
    assert "tokenizer" in only(Lineage.open(run / "rl").verify())


def test_a_missing_parent_is_named_and_a_moved_one_found(run: Path) -> None:
    (run / "base").rename(run / "elsewhere")
    lineage = Lineage.open(run / "rl")
    assert [checkpoint.name for checkpoint in lineage.checkpoints] == ["sft", "rl"]
    problem = only(lineage.verify())
    assert problem.startswith("sft: its parent is missing")
    assert str(run / "elsewhere") in problem
    shutil.rmtree(run / "elsewhere")
    assert "Put it back" in only(Lineage.open(run / "rl").verify())


def test_another_checkpoint_in_the_parents_place_is_refused(run: Path, tokenizer: Tokenizer) -> None:
    shutil.rmtree(run / "base")
    write(run / "base", tokenizer, seed=9, kind="pretrain")
    problem = only(Lineage.open(run / "sft").verify())
    assert problem.startswith("sft: the parent in")
    assert any("the parent in" in each for each in Lineage.open(run).verify())


def test_what_took_part_is_verified_too_but_does_not_stop_the_layers_from_loading(run: Path) -> None:
    shutil.rmtree(run / "reward")
    assert "its reward is missing" in only(Lineage.open(run / "rl").verify())
    assert [layer.name for layer in Lineage.open(run / "rl").load()] == ["base", "sft", "rl"]


def test_a_run_whose_nudge_is_under_way_opens_at_its_mask(run: Path) -> None:
    """The reward model descends from the mask, which is the tip nevertheless: a scorer is no layer."""
    shutil.rmtree(run / "rl")
    assert (run / "reward").is_dir()
    assert [layer.name for layer in open_layers([run])] == ["base", "sft"]


def test_a_copy_beside_the_original_and_a_moved_run_hold(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shutil.copytree(run / "rl", run / "copy of rl")
    assert Lineage.open(run / "copy of rl").verify() == []
    moved = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(run, moved)
    shutil.rmtree(run / "base")
    assert Lineage.open(moved / "rl").verify() == []


def test_a_stage_that_was_set_aside_still_finds_the_parent_that_was_kept_and_no_other(run: Path) -> None:
    aside = run / "set-aside" / "1" / "rl"
    shutil.copytree(run / "rl", aside)
    assert Lineage.open(aside).verify() == []
    shutil.copytree(run / "base", run / "set-aside" / "2" / "base")
    shutil.rmtree(run / "sft")
    shutil.copytree(run / "base", run / "sft")
    assert any("its parent is missing" in problem for problem in Lineage.open(aside).verify())


def test_a_path_from_elsewhere_and_a_trailing_slash_do_not_matter(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run / "sft")
    assert Lineage.open("../rl/").verify() == []
    assert Lineage.open(".").verify() == []


def test_a_circle_of_parents_ends(run: Path) -> None:
    def forge(file: dict[str, Any]) -> None:
        file["record"]["parent"] = {"path": "../rl", "hash": "0" * 64}

    edit(run / "base" / "unmask.json", forge)
    problems = Lineage.open(run / "rl").verify()
    assert any("descends from it" in problem for problem in problems)


def test_another_shard_layout_breaks_nothing_and_a_flipped_byte_in_a_shard_is_found(run: Path) -> None:
    directory = run / "rl"
    tensors = load_file(directory / "model.safetensors")
    places = {}
    for i, name in enumerate(sorted(tensors)):
        places[name] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    for shard in set(places.values()):
        inside = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
        save_file(inside, directory / shard, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    (directory / "model.safetensors").unlink()
    assert Lineage.open(directory).verify() == []
    name, shard = "model.norm.weight", places["model.norm.weight"]
    hurt = load_file(directory / shard)
    hurt[name][0] += 1e-6
    save_file(hurt, directory / shard)
    problem = only(Lineage.open(directory).verify())
    assert str(directory / shard) in problem
    assert name in problem


def test_saving_again_with_transformers_in_shards_breaks_nothing(run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, kind in (("rl", "AutoModelForCausalLM"), ("reward", "AutoModelForSequenceClassification")):
        model = getattr(transformers, kind).from_pretrained(run / name, dtype=torch.float32)
        (run / name / "model.safetensors").unlink()
        model.save_pretrained(run / name, max_shard_size="50KB")
        assert (run / name / "model.safetensors.index.json").exists()
    assert Lineage.open(run / "rl").verify() == []


def test_layers_load_with_their_own_weights_and_one_that_is_hurt_is_refused(run: Path) -> None:
    layers = Lineage.open(run / "rl").load()
    assert [layer.hash for layer in layers] == [Checkpoint.open(run / layer.name).hash for layer in layers]
    heads = [layer.model.head for layer in layers]
    assert not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    edit(run / "base" / "config.json", lambda file: file.update(rms_norm_eps=1e-3))
    with pytest.raises(UserError, match="base: the configuration"):
        Lineage.open(run / "rl").load()


def test_models_of_different_tokenizers_are_not_compared(run: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["completely other words entirely"] * 9, 280)
    foreign = write(tmp_path / "other", other, model=decoder(other, 0))
    with pytest.raises(UserError, match="tokenizer"):
        load_layers([Checkpoint.open(run / "base"), foreign])
    with pytest.raises(UserError, match="not a language model"):
        load_layers([Checkpoint.open(run / "reward")])


def test_a_directory_without_a_record_opens_and_can_be_a_parent(run: Path, tokenizer: Tokenizer) -> None:
    plain = run / "from-the-hub"
    shutil.copytree(run / "base", plain)
    (plain / "unmask.json").unlink()
    lineage = Lineage.open(plain)
    assert lineage.tip.name == "from-the-hub"
    assert lineage.tip.record is None
    assert [layer.name for layer in lineage.load()] == ["from-the-hub"]
    assert "no unmask.json" in only(lineage.verify())
    write(run / "child", tokenizer, seed=5, parent=Checkpoint.open(plain))
    assert Lineage.open(run / "child").verify() == []
    edit(plain / "config.json", lambda file: file.update(rope_theta=5000.0))
    assert "the parent in" in only(Lineage.open(run / "child").verify())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"record": {"format": 1}, "hash": "x"}', '{"hash": 1}'])
def test_a_garbled_record_is_an_error_that_names_the_file(run: Path, content: str) -> None:
    (run / "sft" / "unmask.json").write_text(content)
    with pytest.raises(UserError, match=r"sft/unmask\.json"):
        Checkpoint.open(run / "sft")
    lineage = Lineage.open(run / "rl")
    assert [checkpoint.name for checkpoint in lineage.checkpoints] == ["rl"]
    assert any(problem.startswith("rl: its parent cannot be read.") for problem in lineage.verify())


def test_a_record_of_a_newer_format_says_so(run: Path) -> None:
    edit(run / "sft" / "unmask.json", lambda file: file["record"].update(format=2))
    with pytest.raises(UserError, match="newer unmask"):
        Checkpoint.open(run / "sft")


def test_what_is_no_checkpoint_is_said_with_what_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        Lineage.open(run / "nowhere")
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen3-0.6B "):
        Lineage.open("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match=r"is a run.*base.*reward.*rl.*sft"):
        Checkpoint.open(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        Lineage.open(tmp_path / "empty")


def test_a_run_stands_for_its_last_layer_and_two_last_layers_are_a_question(
    run: Path, tokenizer: Tokenizer
) -> None:
    assert Lineage.open(run).tip.path == run / "rl"
    shutil.copytree(run / "rl", run / "a copy")
    assert Lineage.open(run).tip.path == run / "rl"
    write(run / "dpo", tokenizer, seed=8, parent=Checkpoint.open(run / "sft"))
    with pytest.raises(UserError, match="is a run"):
        Lineage.open(run)


def test_two_layers_of_one_name_go_by_their_paths(run: Path) -> None:
    shutil.copytree(run, run.parent / "other")
    paths = [run / "base", run / "sft", run.parent / "other" / "sft"]
    assert [layer.name for layer in open_layers(paths)] == ["base", str(paths[1]), str(paths[2])]


def test_one_path_opens_its_lineage_and_several_open_themselves(run: Path) -> None:
    assert [layer.name for layer in open_layers([run])] == ["base", "sft", "rl"]
    assert [layer.name for layer in open_layers([run / "base", run / "rl", run / "rl"])] == [
        "base",
        "rl",
        "rl (2)",
    ]
    shutil.rmtree(run / "base")  # each for itself: no parent is asked for
    assert [layer.name for layer in open_layers([run / "sft", run / "rl"])] == ["sft", "rl"]
    path = run / "rl" / "chat_template.jinja"
    path.write_text("{{ messages }}")
    with pytest.raises(UserError, match="rl: the chat template"):
        open_layers([run / "sft", run / "rl"])


def test_rows_say_what_log_prints(run: Path) -> None:
    rows = Lineage.open(run / "rl").rows()
    assert [row["name"] for row in rows] == ["base", "sft", "rl"]
    assert rows[1]["parent_hash"] == rows[0]["hash"]
    assert rows[2]["inputs"] == {"reward": Checkpoint.open(run / "reward").hash}
    assert rows[0]["tokens"] == 1000
    assert rows[0]["headline"] == {"grad_norm": 0.5}
    json.dumps(rows)


def test_ancestors_are_named_as_the_checkpoint_is_from_the_working_directory_or_absolutely(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    for directory in (Path(run.name), run):
        rows = Lineage.open(directory / "rl").rows()
        assert [row["path"] for row in rows] == [str(directory / name) for name in ("base", "sft", "rl")]
