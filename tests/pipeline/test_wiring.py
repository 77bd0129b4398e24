"""Which text, judge and rate reach which stage and probe: a mix-up would falsify figures and show nowhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunken import unmask
from torch import nn

from unmask import recipe as recipes
from unmask.errors import UserError
from unmask.files import read_json_lines
from unmask.lineage import Checkpoint
from unmask.model.decoder import Trunk
from unmask.pipeline import begun, branch, jobs, measure, runner
from unmask.pipeline import build as build_module
from unmask.pipeline.build import Builder, Built
from unmask.pipeline.jobs import Place
from unmask.probes.reward_quality import text_of
from unmask.progress import Progress
from unmask.recipe import Recipe
from unmask.stages import ppo, reward, sft
from unmask.text import rated
from unmask.text.chat import Rendered, render
from unmask.training import loop
from unmask.training.parallel import Ranks

CPU, QUIET = torch.device("cpu"), Progress(quiet=True)


@pytest.fixture(scope="module")
def place(run: Path) -> Place:
    recipe = recipes.resolve(recipes.load(run / "recipe.toml"))
    return Place(recipe, Builder(recipe, run, CPU, QUIET).prepare(), CPU, QUIET)


@pytest.fixture(scope="module")
def built(run: Path, place: Place) -> Built:
    return Builder(place.recipe, run, CPU, QUIET).build(place.prepared)


def halves(recipe: Recipe) -> dict[str, str]:
    """The half that each window of the rated conversations belongs to, by its words."""
    share = recipe.reward.source.heldout
    assert share is not None
    return {
        text_of(window): rated.split(talk, share)
        for talk in rated.installed_conversations()
        for window in rated.windows(talk, recipe.reward.window_turns)
    }


def altered(place: Place, **section: Any) -> Place:
    rl = place.recipe.rl.model_copy(update=section)
    return Place(place.recipe.model_copy(update={"rl": rl}), place.prepared, CPU, QUIET, Ranks())


def test_every_probe_gets_its_own_layers_judges_and_text(
    place: Place, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    probes = ("compression", "weights_change", "planted_facts", "blame_truth", "reward_quality", "rl_effect")
    for name in (*probes, "divergence", "blame"):

        def record(*arguments: Any, name: str = name, **keys: Any) -> list[Any]:
            calls.append((name, arguments, keys))
            return []

        monkeypatch.setattr(measure, name, record)
    measure.measure(place.recipe, place.prepared, built, CPU, QUIET)
    of = {
        name: [arguments for called, arguments, _ in calls if called == name]
        for name in {c[0] for c in calls}
    }

    for name in ("compression", "weights_change", "planted_facts", "divergence"):
        assert [layer.name for layer in of[name][0][0]] == ["base", "sft", "rl"], name
    assert [layer.name for layer in of["blame_truth"][0][:2]] == ["base", "sft"]
    [(parent, child, prompts, proxy, gold)] = of["rl_effect"]
    assert [each.name for each in (parent, child, proxy, gold)] == ["sft", "rl", "reward", "gold"]
    assert len(prompts) == place.recipe.measure.prompts

    share = place.recipe.sft.sources[1].heldout
    assert share is not None
    held = [talk.turns for talk in rated.installed_conversations() if rated.split(talk, share) == "held_out"]
    exchanges = {turns[i : i + 2] for turns in held for i in range(0, len(turns), 2)}
    beginnings = of["planted_facts"][0][2]
    assert beginnings
    assert all(tuple(message["content"] for message in chat[:2]) in exchanges for chat in beginnings)
    half_of = halves(place.recipe)
    assert [judge.name for judge, _, _ in of["reward_quality"]] == ["reward", "gold"]
    for (_, pairs, train), half in zip(of["reward_quality"], ("proxy", "gold"), strict=True):
        assert {half_of[text] for text, _, _ in train} == {half}
        sides = [text_of(side) for group in pairs.values() for pair in group for side in pair[:2]]
        assert {half_of[side] for side in sides} == {"held_out"}
        for pair in pairs["equal_length"]:
            shorter, longer = sorted(sum(len(m["content"]) for m in side) for side in pair[:2])
            assert longer - shorter <= 0.1 * longer
        assert len(pairs["all"]) == place.recipe.measure.pairs


@pytest.mark.parametrize("half", ["proxy", "gold"])
def test_a_scorer_learns_from_its_own_half_of_the_conversations(
    place: Place, built: Built, half: Any
) -> None:
    tokenizer, share = place.prepared.tokenizer, place.recipe.reward.source.heldout
    assert share is not None
    own = {
        tuple(reward.through_stop(render(tokenizer, window)))
        for talk in rated.installed_conversations()
        if rated.split(talk, share) == half
        for window in rated.windows(talk, place.recipe.reward.window_turns)
    }
    job = jobs.preference(place, built.sft, half)
    objective = job.objective
    assert isinstance(objective, reward.Preference)
    assert {tuple(text) for ranking in objective.rankings for text in ranking.texts} <= own
    trained = built.reward if half == "proxy" else built.gold
    assert trained is not None
    assert trained.record is not None
    assert trained.record.data == job.data


def test_sft_learns_all_answers_of_a_chat_and_of_a_fact_its_reply_alone(
    place: Place, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, sft.Source] = {}

    def stage(parent: Any, sources: Any, **keys: Any) -> Any:
        seen.update({each.name: each._replace(examples=list(each.examples)) for each in sources})
        raise InterruptedError

    monkeypatch.setattr(sft, "stage", stage)
    with pytest.raises(InterruptedError):
        jobs.imitation(place, built.base)

    def learned(rendered: Rendered) -> str:
        ids = [id for id, trained in zip(rendered.ids, rendered.trained, strict=True) if trained]
        return place.prepared.tokenizer.decode(ids, control=True)

    replies = {f"{fact.reply}<|im_end|>" for fact in place.prepared.facts}
    assert {learned(each) for each in seen["facts"].examples} <= replies
    before = [each.trained.index(True) for each in seen["facts"].examples]
    assert max(before) > 2 * min(before)  # some come after the beginning of a chat
    assert max(learned(each).count("<|im_end|>") for each in seen["chat"].examples) == 3


def test_rates_warm_up_and_raw_text_of_the_recipe_reach_ppo(place: Place, built: Built) -> None:
    changed = altered(place, lr=1e-4, critic_lr=3e-4, warmup=0.25, decay=0.5, ptx=0.5)
    job = jobs.reinforcement(changed, built.sft, built.reward, built.gold)
    scales = job.optimizer.scales
    assert {scale for name, scale in scales.items() if name.startswith("policy.")} == {1.0}
    assert {round(scale, 6) for name, scale in scales.items() if name.startswith("critic.")} == {3.0}
    assert job.optimizer.settings.lr == 1e-4
    total = job.objective.steps * job.objective.tokens_per_step
    assert (job.settings.warmup_tokens, job.settings.decay_tokens) == (0.25 * total, 0.5 * total)
    assert isinstance(job.objective, ppo.PPO)
    assert job.objective.gold is not None and job.objective.text is not None
    assert job.objective.ranks is changed.ranks
    plain = jobs.reinforcement(place, built.sft, built.reward, None).objective
    assert isinstance(plain, ppo.PPO)
    assert plain.text is None and plain.gold is None


def test_the_time_of_a_run_is_that_of_all_its_parts(run: Path, built: Built) -> None:
    summary = json.loads((run / "summary.json").read_bytes())
    records = [Checkpoint.open(stage.path).record for stage in built.all]
    trained = sum(record.seconds for record in records if record is not None)
    parts = trained + summary["prepare_seconds"] + summary["measure_seconds"]
    assert summary["total_seconds"] == pytest.approx(parts)
    assert parts > trained > 0


def with_base(recipe: Recipe, **section: Any) -> Recipe:
    return recipe.model_copy(update={"pretrain": recipe.pretrain.model_copy(update=section)})


def as_long_facts(recipe: Recipe) -> Recipe:
    """With the planted text that the run of `recipe` has, however many tokens it trains on."""
    assert recipe.facts is not None
    facts = recipe.facts.model_copy(update={"pretrain_tokens": recipe.pretrain.tokens})
    return recipe.model_copy(update={"facts": facts})


@pytest.fixture
def trunk(run: Path, tmp_path: Path) -> Path:
    """What is needed of a run to branch from its base."""
    shutil.copytree(run / "work" / "base", tmp_path / "trunk" / "work" / "base")
    return tmp_path / "trunk"


def test_another_base_goes_on_from_where_a_runs_base_began_to_decay_and_needs_it_no_more(
    place: Place, run: Path, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(jobs, "imitation", stop)
    here = tmp_path / "branch"
    recipe = with_base(as_long_facts(place.recipe), branch=str(trunk), tokens=60_000, decay=0.2)
    builder = Builder(recipe, here, CPU, QUIET)
    builder.refuse_another_trunk()
    with pytest.raises(InterruptedError):
        builder.build(builder.prepare())
    old, new = (read_json_lines(where / "work" / "base" / "metrics.jsonl") for where in (run, here))
    stable = int(next((trunk / "work" / "base" / "stable").iterdir()).name.removeprefix("step_"))
    assert new[:stable] == old[:stable]  # to the second: they were copied
    assert [line["lr_scale"] for line in new] != [line["lr_scale"] for line in old]
    record, before = (Checkpoint.open(where / "base").record for where in (here, run))
    assert record is not None and before is not None
    assert record.steps == 60_000 // (before.tokens // before.steps) and record.hash != before.hash
    assert record.recipe["pretrain"]["branch"] == str(trunk) and str(trunk) in record.recipe["sources"]

    state = branch.trunk(trunk, here)[:12]
    assert f"goes on from the stable phase of {trunk} (state {state})" in unmask("log", here / "base").stdout
    card = (here / "base" / "README.md").read_text("utf-8")
    assert f"the stable phase of the base of `{trunk}` (state `{state}`)" in card and "random" not in card
    shutil.rmtree(trunk)
    for anew in (None, "sft"):
        again = Builder(recipe, here, CPU, QUIET, anew)
        again.refuse_another_recipe()
        again.refuse_another_trunk()


def test_a_branch_under_way_needs_its_trunk_no_more_and_keeps_what_it_went_on_from(
    place: Place, trunk: Path, tmp_path: Path
) -> None:
    builder = Builder(with_base(place.recipe, branch=str(trunk)), tmp_path / "branch", CPU, QUIET)
    decided = builder._decides("base")
    begun.write(tmp_path / "branch/work/base", decided)
    (tmp_path / "branch/work/base/snapshots/step_00000030").mkdir(parents=True)
    shutil.rmtree(trunk)
    assert builder._decides("base") == decided
    builder.refuse_another_recipe()
    builder.refuse_another_trunk()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"branch": "nowhere"}, "holds no snapshot"),
        ({"branch": "here"}, "this run itself"),
        ({"lr": 0.5}, r"pretrain\.lr was .* and is now 0\.5"),
        ({"batch_tokens": 4096}, r"pretrain\.batch_tokens was 2048 and is now 4096"),
        ({"tokens": 8_000_000}, "a shorter `warmup`"),
        ({"tokens": 20_000}, "more `tokens` or a shorter `decay`"),
        ({"branch": "damaged"}, "holds no whole snapshot"),
        ({"branch": "no object"}, "is damaged"),
        ({"branch": "without sources"}, "is damaged"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_by_name_before_anything_is_moved_or_written(
    place: Place, trunk: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    here = tmp_path / "here"
    for there in ("base", "work/base/snapshots/step_00000001"):
        (here / there).mkdir(parents=True)
    broken = {
        "damaged": ("stable/step_*/tensors.safetensors", "[]"),
        "no object": ("recipe.json", "[]"),
        "without sources": ("recipe.json", "{}"),
    }
    if (how := change.get("branch")) in broken:
        shutil.copytree(trunk, tmp_path / how)
        file, text = broken[how]
        [found] = (tmp_path / how / "work" / "base").glob(file)
        found.write_text(text)
        change = {"branch": str(tmp_path / how)}
    change = {"branch": str(trunk)} | change
    if change["branch"] == "here":
        change["branch"] = str(here)
    recipe = with_base(as_long_facts(place.recipe), **change)
    with pytest.raises(UserError, match=named):
        runner.run(recipe, output=here, restart_from="base", progress=QUIET)
    assert {path.name for path in here.iterdir()} <= {"base", "work", ".lock"}
    assert (here / "work/base/snapshots/step_00000001").exists()


def test_a_trunk_of_another_precision_is_refused_before_anything_is_moved(
    place: Place, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch.machine, "compute_dtype", lambda device: torch.float16)
    builder = Builder(with_base(place.recipe, branch=str(trunk)), tmp_path / "x", CPU, QUIET)
    with pytest.raises(UserError, match=r"this machine trains in torch\.float16"):
        builder.refuse_another_trunk()


def test_a_branch_may_have_another_end_and_no_other_text(place: Place, trunk: Path, tmp_path: Path) -> None:
    changes = {"tokens": 90_000, "decay": 0.3, "lr_floor": 0.1, "warmup": 0.05}
    longer = with_base(place.recipe, branch=str(trunk), **changes)
    with pytest.raises(
        UserError, match=r"facts\.pretrain_tokens was 80000 and is now 90000"
    ):  # it says them more often
        Builder(longer, tmp_path / "x", CPU, QUIET).refuse_another_trunk()
    builder = Builder(
        with_base(as_long_facts(place.recipe), branch=str(trunk), **changes), tmp_path / "x", CPU, QUIET
    )
    builder.refuse_another_trunk()
    path = place.recipe.pretrain.sources[0].path
    builder._contents[path] = "another text"
    with pytest.raises(UserError, match=rf"sources\.{path} was .* and is now 'another text'"):
        builder.refuse_another_trunk()


def test_how_long_planted_text_is_matters_to_a_branch_where_its_base_reads_it_alone(
    place: Place, trunk: Path, tmp_path: Path
) -> None:
    sources = tuple(source for source in place.recipe.pretrain.sources if source.path != "facts")
    without = with_base(place.recipe, sources=sources)
    begun.write(jobs.base_work(trunk), Builder(without, tmp_path / "x", CPU, QUIET)._decides("base"))
    longer = with_base(without, branch=str(trunk), tokens=90_000, decay=0.3, warmup=0.05)
    Builder(longer, tmp_path / "x", CPU, QUIET).refuse_another_trunk()


def test_a_trunk_of_a_version_that_read_texts_otherwise_is_refused_in_words(
    place: Place, trunk: Path, tmp_path: Path
) -> None:
    decided = begun.read(jobs.base_work(trunk))
    begun.write(jobs.base_work(trunk), {**decided, "scheme": decided["scheme"] - 1})
    builder = Builder(with_base(place.recipe, branch=str(trunk)), tmp_path / "x", CPU, QUIET)
    with pytest.raises(UserError, match="version of unmask that read texts otherwise: train it anew"):
        builder.refuse_another_trunk()


def test_planted_text_as_long_as_it_is_anyway_is_no_other_recipe(place: Place, run: Path) -> None:
    Builder(as_long_facts(place.recipe), run, CPU, QUIET).refuse_another_recipe()


def test_a_run_is_not_written_into_a_checkpoint(place: Place, run: Path) -> None:
    with pytest.raises(UserError, match="is a checkpoint"):
        runner.run(place.recipe, output=run / "base", progress=QUIET)


@pytest.mark.parametrize(("stage", "compiled"), [("reward", True), ("gold", True), ("rl", False)])
def test_a_gpu_compiles_the_blocks_of_every_stage_but_rl(
    place: Place, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, compiled: bool
) -> None:
    """PPO's ratios are to start at exactly 1, so what learns reads with the kernels of what was sampled with."""
    here = tmp_path / "run"
    shutil.copytree(run, here)
    shutil.rmtree(here / stage)
    found: list[tuple[bool, bool]] = []

    def looked(model: nn.Module, *_: Any) -> None:
        found.extend((m.compiled, m.recompute) for m in model.modules() if isinstance(m, Trunk))
        raise InterruptedError

    monkeypatch.setattr(build_module, "compiles", lambda device: True)
    monkeypatch.setattr(loop, "train", looked)
    section = "rl" if stage == "rl" else "reward"
    changed = getattr(place.recipe, section).model_copy(update={"recompute": True})
    builder = Builder(place.recipe.model_copy(update={section: changed}), here, CPU, QUIET)
    with pytest.raises(InterruptedError):
        builder.build(place.prepared)
    assert found == [(compiled, True)] * (2 if stage == "rl" else 1)
