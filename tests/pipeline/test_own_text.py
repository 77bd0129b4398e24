"""A recipe on one's own files: built whole, kept where it fits, and refused early where it cannot work."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import recipe as recipes
from unmask.errors import UserError
from unmask.lineage import Checkpoint, Lineage
from unmask.model.scorer import Scorer
from unmask.pipeline import begun, check, jobs, measure, runner
from unmask.pipeline import build as build_module
from unmask.pipeline.build import Builder, Built
from unmask.progress import Progress
from unmask.recipe import Recipe
from unmask.stages import examples, ppo, rollouts
from unmask.stages.prepare import prepare
from unmask.stages.reward import scores

WORDS = [
    "ash",
    "bay",
    "cot",
    "dew",
    "elm",
    "fir",
    "gum",
    "hay",
    "ivy",
    "jet",
    "kit",
    "log",
    "moss",
    "nut",
    "oak",
    "pea",
]


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * k + k * k) % len(WORDS)] for k in range(3, 9)) + "."


def write(path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {"path": str(path), "heldout": 0.3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write(folder / "raw.jsonl", ({"text": f"{sentence(i)} {sentence(i + 7)} {i}"} for i in range(400)))
    chats = [{"prompt": f"say {i}", "completion": sentence(i)} for i in range(120)]
    write(folder / "chats.jsonl", chats)
    pairs = (
        {"prompt": f"say {i}", "chosen": sentence(i), "rejected": f"{sentence(i + 1)[:-1]}!"}
        for i in range(120)
    )
    write(folder / "pairs.jsonl", pairs)
    return folder


def recipe_of(files: Path, **changes: Any) -> Recipe:
    """`changes`: "section__key": value."""
    data: dict[str, Any] = {
        "name": "own", "seed": 1, "depth": 1, "context": 64, "heldout": 0.2, "tokenizer": {"vocabulary": 300},
        "pretrain": {"tokens": 2048, "batch_tokens": 1024, "sources": [{"path": str(files / "raw.jsonl")}]},
        "sft": {"tokens": 1024, "batch_tokens": 512, "sources": [{"path": str(files / "chats.jsonl"), "heldout": 0.3}]},
        "reward": {"tokens": 1024, "batch_tokens": 512, "source": {"path": str(files / "pairs.jsonl"), "heldout": 0.3}},
        "rl": {"tokens": 64, "answers": 4, "answer_tokens": 8, "sources": [
            {"path": str(files / "chats.jsonl"), "heldout": 0.3}
        ]},
        "measure": {"answer_tokens": 8},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        (data[section] if section else data)[last] = value
    return recipes.resolve(recipes.validate(data, "here"))


def builder_of(recipe: Recipe, directory: Path) -> Builder:
    return Builder(recipe, directory, torch.device("cpu"), Progress(quiet=True))


def build(recipe: Recipe, directory: Path) -> Built:
    builder = builder_of(recipe, directory)
    return builder.build(builder.prepare())


@pytest.fixture(scope="module")
def built(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own") / "run"
    build(recipe_of(files), directory)
    return directory


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    shutil.copytree(built, tmp_path / "run")
    return tmp_path / "run"


def test_every_stage_is_kept_and_snapshots_that_a_dying_process_left_are_cleared(
    files: Path, run: Path
) -> None:
    before = {stage.name: stage.hash for stage in build(recipe_of(files), run).all}
    left = run / "work" / "sft" / "snapshots"
    left.mkdir()
    (left / "old").write_text("x")
    assert {stage.name: stage.hash for stage in build(recipe_of(files), run).all} == before
    assert len(before) == 5
    assert not left.exists()


def test_a_stage_whose_parent_is_gone_is_refused_before_anything_is_trained(files: Path, run: Path) -> None:
    shutil.rmtree(run / "base")
    with pytest.raises(
        UserError, match=r"sft is there, and \S+base, which it was made from, is not.*--from base"
    ):
        builder_of(recipe_of(files), run).refuse_another_recipe()
    Builder(recipe_of(files), run, torch.device("cpu"), Progress(quiet=True), "base").refuse_another_recipe()


@pytest.mark.parametrize(
    ("name", "gone"), [("sft", "base"), ("reward", "sft"), ("gold", "sft"), ("rl", "sft"), ("rl", "reward")]
)
def test_each_stage_is_missed_by_those_made_from_it(name: str, gone: str, files: Path, run: Path) -> None:
    for other in {"base", "sft", "reward", "gold", "rl"} - {name, "base", "sft"} | {gone}:
        shutil.rmtree(run / other)
    with pytest.raises(UserError, match=rf"{name} is there, and \S+{gone}, which it was made from, is not"):
        builder_of(recipe_of(files), run).refuse_another_recipe()


def test_without_a_second_judge_a_run_begins_and_the_first_has_every_pair(
    files: Path, tmp_path: Path
) -> None:
    alone, both = recipe_of(files, reward__gold=False), recipe_of(files)
    builder_of(alone, tmp_path / "new").refuse_another_recipe()
    assert "gold" not in builder_of(alone, tmp_path / "new").missing()

    def pairs(recipe: Recipe, half: examples.Half) -> int:
        return len(examples.comparisons(recipe, half, 1000))

    assert pairs(alone, "proxy") == pairs(both, "proxy") + pairs(both, "gold")
    assert pairs(alone, "held_out") == pairs(both, "held_out") > 0


def test_a_stage_without_a_record_is_not_of_this_run(files: Path, run: Path) -> None:
    (run / "sft" / "unmask.json").unlink()
    with pytest.raises(UserError, match=r"sft has no unmask\.json: this run did not make it"):
        builder_of(recipe_of(files), run).refuse_another_recipe()


def test_a_damaged_second_judge_is_built_anew_with_the_first(run: Path) -> None:
    assert "--from reward`" in Checkpoint.open(run / "gold").remedy


def test_a_run_that_is_refused_stays_as_it_was(
    files: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.check, "check_extras", lambda: None)

    def state() -> list[str]:
        kept = (path for path in run.rglob("*") if "data" not in path.parts)
        return sorted(f"{path} {path.read_text()}" for path in kept if path.suffix in (".json", ".toml"))

    before = state()
    missing = {"path": str(files / "nowhere.jsonl")}
    for changes, first, message in (
        ({"reward__source": missing}, "reward", "nowhere"),
        ({"seed": 2}, "sft", r"base was made with another recipe: seed"),
        ({"measure__questions": ["why? " * 80]}, "rl", r"measure\.questions"),
    ):
        with pytest.raises(UserError, match=message):
            runner.run(
                recipe_of(files, **changes), output=run, restart_from=first, progress=Progress(quiet=True)
            )
        assert state() == before
        assert not (run / "set-aside").exists()


def test_a_key_that_recipes_did_not_have_yet_stands_at_its_default(files: Path, run: Path) -> None:
    found = {"pretrain": {"tokens": 1}}
    assert begun.with_defaults(found)["pretrain"]["cross_documents"] is True
    kept = {"pretrain": {**found["pretrain"], "recompute": True, "snapshot_seconds": 5.0}}
    assert not {"recompute", "snapshot_seconds"} & begun.with_defaults(kept)["pretrain"].keys()
    assert "weight_decay" in begun.with_defaults(found)["pretrain"]
    builder_of(recipe_of(files), run).refuse_another_recipe()
    sources = [{"path": str(files / "raw.jsonl")}]
    changed = {"tokens": 2048, "batch_tokens": 1024, "sources": sources, "cross_documents": False}
    with pytest.raises(UserError, match="cross_documents was True and is now False"):
        builder_of(recipe_of(files, pretrain=changed), run).refuse_another_recipe()


def test_a_run_verifies_its_second_judge_too(run: Path) -> None:
    assert Lineage.open(run).verify() == []
    weights = run / "gold" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    [problem] = Lineage.open(run).verify()
    assert problem.startswith("gold: ")
    assert Lineage.open(run / "rl").verify() == []  # none of its ancestors, and took no part in it


def test_a_reward_model_is_not_talked_to(run: Path) -> None:
    with pytest.raises(UserError, match=r"reward scores text and writes none: give .*sft"):
        Lineage.open(run / "reward").load()


def test_a_stage_from_another_parent_is_refused(files: Path, run: Path) -> None:
    shutil.rmtree(run / "base")
    with pytest.raises(UserError, match=r"sft was made from another checkpoint: parent .* --from sft"):
        build(recipe_of(files, seed=2), run)


def test_a_stage_of_another_tokenizer_is_refused(files: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"base was made with another tokenizer .* --from base"):
        build(recipe_of(files, tokenizer__vocabulary=310), run)


def test_a_stage_whose_weights_have_changed_is_refused(files: Path, run: Path) -> None:
    weights = run / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"base: .*model\.safetensors.* --from base"):
        build(recipe_of(files), run)


def test_a_stage_that_was_stopped_goes_on_with_the_recipe_that_it_was_begun_with_alone(
    files: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise InterruptedError

    shutil.rmtree(run / "rl")
    shutil.rmtree(run / "work" / "rl")
    monkeypatch.setattr(build_module.loop, "train", stopped)
    with pytest.raises(InterruptedError):
        build(recipe_of(files), run)
    builder_of(recipe_of(files, rl__kl=2.0), run).refuse_another_recipe()  # nothing of it was trained yet
    (run / "work/rl/snapshots/step_00000001").mkdir(parents=True)
    builder_of(recipe_of(files), run).refuse_another_recipe()
    with pytest.raises(UserError, match=r"rl was made with another recipe: rl\.kl .*--from rl"):
        builder_of(recipe_of(files, rl__kl=2.0), run).refuse_another_recipe()


def test_a_nudge_by_another_reward_model_is_refused(files: Path, run: Path) -> None:
    shutil.rmtree(run / "reward")
    with pytest.raises(UserError, match=r"rl was made from another checkpoint: reward .* --from rl"):
        build(recipe_of(files, reward__lr=1e-2), run)


def test_what_was_measured_stands_for_the_layers_alone_that_it_was_measured_on(
    files: Path, run: Path
) -> None:
    recipe = recipe_of(files)
    builder = builder_of(recipe, run)
    prepared = builder.prepare()
    before = builder.build(prepared)
    measure.write(run, recipe, prepared, before, measure.Measured([], [], 1.0, 1), builder.device)
    assert measure.stands(run, recipe, before)
    shutil.rmtree(run / "rl")
    other = build(recipe_of(files, rl__kl=2.0), run)
    assert not measure.stands(run, recipe, other)


def test_an_answer_of_rl_ends_as_a_turn_does_and_in_no_other_way(files: Path, run: Path) -> None:
    recipe = recipe_of(files)
    prepared = builder_of(recipe, run).prepare()
    place = jobs.Place(recipe, prepared, torch.device("cpu"), Progress(quiet=True))
    mask, judge = (Checkpoint.open(run / name) for name in ("sft", "reward"))
    objective = jobs.reinforcement(place, mask, judge, None).objective
    assert isinstance(objective, ppo.PPO)
    assert list(objective.stop_ids) == [prepared.tokenizer.turn_end]


def test_the_scores_zero_is_the_mean_of_what_sft_answers(
    files: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT is made to answer: it was trained for too short a time to stop by itself."""
    recipe, asked = recipe_of(files), list[Any]()

    def answered(policy: Any, prompts: Any, **_: Any) -> rollouts.Rollout:
        asked.extend(prompts)
        answers = [rollouts.Answer([9, 10 + i % 7, 2], [0.0] * 3, i % 3 > 0) for i in range(len(prompts))]
        return rollouts.Rollout(prompts, answers)

    monkeypatch.setattr(rollouts, "answered", answered)
    for name in ("reward", "gold", "rl"):
        shutil.rmtree(run / name)
    builder = builder_of(recipe, run)
    prepared = builder.prepare()
    place = jobs.Place(recipe, prepared, torch.device("cpu"), Progress(quiet=True))
    sft = Checkpoint.open(run / "sft")
    judge = builder._stage("reward", "reward", sft, lambda: jobs.preference(place, sft, "proxy"), prepared)
    model = judge.model()
    assert isinstance(model, Scorer)
    texts = [[*prompt, 9, 10 + i % 7, 2] for i, prompt in enumerate(asked) if i % 3 > 0]
    assert judge.record is not None
    assert 0 < len(texts) == judge.record.metrics["centred_on_answers"]
    assert scores(model, texts).mean().item() == pytest.approx(0.0, abs=1e-5)
    assert model.config.reward_offset != 0


def test_texts_that_nothing_was_asked_before_are_their_own_zero(
    files: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT cannot answer in people's place where there is nothing to answer."""
    said: list[str] = []
    monkeypatch.setattr(Progress, "line", lambda self, line: said.append(line))
    write(
        files / "bare.jsonl",
        ({"chosen": sentence(i), "rejected": f"{sentence(i + 1)[:-1]}!"} for i in range(120)),
    )
    recipe = recipe_of(files, reward__source={"path": str(files / "bare.jsonl"), "heldout": 0.3})
    for name in ("reward", "gold", "rl"):
        shutil.rmtree(run / name)
    judge = build(recipe, run).reward
    assert judge.record is not None and judge.record.metrics["centred_on_answers"] == 0
    assert isinstance(judge.model(), Scorer)
    assert any("nothing is asked before the texts" in line for line in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": 0.0}, r"\[pretrain\] have 0 held-out documents"),
        ({"reward__source": ("pairs.jsonl", 0.0)}, r"'pairs' of \[reward\] has 0 held-out pairs"),
        ({"sft__sources": [("chats.jsonl", 0.0)], "rl__sources": [("chats.jsonl", 0.0)]}, r"have 0 held-out prompts"),
        ({"rl__prompt_tokens": 4}, r"'chats' of \[rl\] has no prompt of at most 4 tokens"),
        ({"measure__questions": ["why? " * 80]}, r"measure\.questions: 'why\? .* does not fit the context of 64"),
        ({"sft__sources": [("broken.jsonl", 0.3)]}, r"broken\.jsonl:121"),
        ({"reward__source": ("broken_pairs.jsonl", 0.3)}, r"broken_pairs\.jsonl:121"),
        ({"sft__sources": [("long.jsonl", 0.0)]}, r"'long' of \[sft\] has no answer to learn from"),
        ({"reward__source": ("uneven.jsonl", 0.3)}, r"for its gold half.*unequal length.*or .*: reward\.gold = false"),
    ],
)  # fmt: skip
def test_what_could_only_fail_late_fails_before_training(
    files: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for good, bad in (("chats", "broken"), ("pairs", "broken_pairs")):
        (files / f"{bad}.jsonl").write_text(
            (files / f"{good}.jsonl").read_text("utf-8") + '{"prompt": 1', "utf-8"
        )
    write(
        files / "uneven.jsonl",
        ({"prompt": f"say {i}", "chosen": "yes, with pleasure", "rejected": "no"} for i in range(90)),
    )
    write(files / "long.jsonl", [{"prompt": "why? " * 80, "completion": "so"}])

    def source(value: Any) -> Any:
        if isinstance(value, tuple):
            return {"path": str(files / value[0]), "heldout": value[1]}
        return [source(each) for each in value] if isinstance(value, list) else value

    recipe = recipe_of(files, **{key: source(value) for key, value in changes.items()})
    prepared = prepare(recipe, tmp_path / "data", Progress(quiet=True))
    with pytest.raises(UserError, match=message):
        check.check(recipe, prepared)


def test_a_recipe_that_works_passes_every_check(files: Path, tmp_path: Path) -> None:
    recipe = recipe_of(files)
    check.check(recipe, prepare(recipe, tmp_path / "data", Progress(quiet=True)))


def test_a_package_that_only_the_end_needs_is_asked_for_at_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(UserError, match=r"sklearn is missing.*unmask\[demo\]"):
        check.check_extras()
