"""`unmask plan`: what is planned is counted as records count it, and what is assumed is said."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unmask import recipe as recipes
from unmask.cli.main import main
from unmask.errors import UserError
from unmask.model.decoder import Decoder
from unmask.pipeline import show, show_plan
from unmask.pipeline.estimate import Accelerator, Cost, accelerator, accelerators, estimate, shape
from unmask.pipeline.jobs import ppo_settings
from unmask.pipeline.plan import Plan, _measuring, plan, whole_plan
from unmask.recipe import given
from unmask.training import machine
from unmask.training.cost import flops_per_token, parameters, training_bytes, training_flops
from unmask.training.parallel import Ranks

CPU = torch.device("cpu")
SMALL = ("depth=1", "context=64", "tokenizer.vocabulary=300", "rl.answer_tokens=8", "rl.answers=4",
         "measure.answer_tokens=8")  # fmt: skip


def test_what_is_planned_is_what_a_record_will_count() -> None:
    recipe = recipes.resolve(recipes.load("tiny"))
    costs = {cost.stage: cost for cost in estimate(recipe, torch.bfloat16)}
    assert list(costs) == ["base", "sft", "reward", "gold", "rl"]
    for stage, section in (("base", recipe.pretrain), ("sft", recipe.sft)):
        tokens = given(section.tokens)
        assert costs[stage].flops == training_flops(Decoder(shape(recipe)), tokens, recipe.context)
    assert costs["rl"].tokens == 60 * 64 * (recipe.rl.prompt_tokens + recipe.rl.answer_tokens)


def test_what_rl_costs_is_its_longest_texts_read_by_two_networks_and_held_beside_the_frozen_ones() -> None:
    recipe = recipes.resolve(recipes.load("tiny", ["rl.epochs=3"]))
    cost = estimate(recipe, torch.bfloat16)[-1]
    policy, critic = shape(recipe), shape(recipe).scoring()
    read = 60 * 64 * (128 + 48) * 3
    assert cost.tokens == read and cost.networks == 2
    learning = 1 - 9 / 60  # the critic warms up in 9 of 60 rollouts
    each = [flops_per_token(config, 256) for config in (policy, critic)]
    assert cost.flops == pytest.approx(read * (learning * each[0] + each[1]))
    trained = [
        training_bytes(config, torch.bfloat16, micro_tokens=2048, length=256, muon=False)
        for config in (policy, critic)
    ]
    frozen = 2 * (parameters(policy) + 2 * parameters(critic))  # SFT, reward and gold, in bfloat16
    assert cost.bytes == sum(trained) + frozen
    without = recipes.resolve(recipes.load("tiny", ["rl.epochs=3", "reward.gold=false"]))
    assert estimate(without, torch.bfloat16)[-1].bytes == cost.bytes - 2 * parameters(critic)


def test_memory_is_of_what_stands_together_and_of_no_more_than_a_batch() -> None:
    def held(stage: str, *sets: str) -> int:
        recipe = recipes.resolve(recipes.load("tiny", list(sets)))
        return next(cost.bytes for cost in estimate(recipe, torch.bfloat16) if cost.stage == stage)

    assert held("base", "pretrain.micro_tokens=999999") == held("base")  # a batch has 4,096 tokens
    assert held("base", "pretrain.micro_tokens=1024") < held("base")
    assert held("base", "pretrain.recompute=true") < held("base")
    assert held("reward") == held("reward", "reward.micro_tokens=1024")  # 32 windows are compared in one pass
    assert held("reward") > held("reward", "reward.together=8")
    assert held("gold") == held("reward")


def test_an_accelerator_keeps_no_probabilities_whatever_this_machine_does() -> None:
    recipe = recipes.resolve(recipes.load("tiny", ["rl.micro_tokens=8192"]))
    for here, there in zip(
        estimate(recipe, torch.bfloat16), estimate(recipe, torch.bfloat16, cpu=False), strict=True
    ):
        if here.stage not in ("reward", "gold"):  # their chunks of logits are larger there
            continue
        assert there.bytes < here.bytes, here.stage


def test_the_note_says_what_is_too_small_and_what_costs_nothing() -> None:
    def note(memory: float, flops: float, gpus: int = 1) -> str:
        card = Accelerator("X", "card X", 1e12, memory, "somebody", (1.0, 2.0))
        costs = [Cost("base", 10, 1, flops, 5 * 10**9), Cost("rl", 10, 2, flops, 10**9)]
        recipe = recipes.resolve(recipes.load("tiny"))
        planned = show_plan.Planned(recipe, CPU, costs, Plan(1, {}), [card], costs, gpus, 0.5)
        return show_plan._note(planned, card)

    assert "its 4 GB are too few" in note(4e9, 1e15)
    assert "too few" not in note(5e9, 1e15)
    assert "less than a cent" in note(5e9, 1e12)
    assert "$1.11 to $2.22 at $1.00 to $2.00" in note(5e9, 1e15)
    several = note(5e9, 1e15, gpus=8)  # an eighth of the time, for eight times the price
    assert "8 of them are taken to be 8 times as fast, and hold 5.0 GB each" in several
    assert "$1.11 to $2.22" in several


def test_every_accelerator_has_a_rate_a_memory_and_a_source() -> None:
    for each in accelerators().values():
        assert each.flops_per_second > 1e12 and each.memory > 1e9 and each.source
        assert each.dollars is None or each.dollars[0] <= each.dollars[1]
    with pytest.raises(UserError, match="Did you mean 'H100'"):
        accelerator("H10")


def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    sets = [part for override in SMALL for part in ("--set", override)]
    monkeypatch.setattr("sys.argv", ["unmask", "plan", "tiny", *sets, "--on", "H100", *more])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    return capsys.readouterr().out


def test_the_table_has_a_row_a_stage_and_says_what_is_assumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(monkeypatch, capsys, "--share", "0.5", "--price", "3600")
    assert " at $3600.00 an hour" in " ".join(text.split())
    for stage in ("base", "sft", "reward", "gold", "rl", "measure", "all"):
        assert any(line.split()[:1] == [stage] for line in text.splitlines()), text
    assert "50% of 989 TFLOP/s is assumed" in " ".join(text.split())


@pytest.mark.parametrize(("option", "value"), [("--price", "inf"), ("--price", "nan"), ("--share", "nan")])
def test_what_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    monkeypatch.setattr("sys.argv", ["unmask", "plan", "tiny", option, value])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and f"Invalid value for '{option}'" in capsys.readouterr().err


def test_json_has_seconds_and_dollars_of_the_same_flops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(planned(monkeypatch, capsys, "--json"))
    h100 = found["accelerators"]["NVIDIA H100 SXM"]
    base = found["stages"][0]
    assert h100["fits"] is True and 0 < h100["bytes"] < 80e9
    assert h100["seconds"]["base"] == pytest.approx(base["flops"] / (0.4 * 989.4e12))
    hours = sum(h100["seconds"].values()) / 3600
    assert h100["dollars"] == pytest.approx([1.99 * hours, 5.00 * hours])
    assert found["here"]["seconds"].keys() == {stage["stage"] for stage in found["stages"]} | {"measure"}
    assert all(seconds > 0 for seconds in found["here"]["seconds"].values())
    eight = json.loads(planned(monkeypatch, capsys, "--json", "--gpus", "8", "--price", "2"))
    there = eight["accelerators"]["NVIDIA H100 SXM"]
    assert there["seconds"]["base"] == pytest.approx(h100["seconds"]["base"] / 8)
    assert there["dollars"] == pytest.approx(h100["dollars"])  # an eighth of the time, of eight
    assert eight["here"]["dollars"] == pytest.approx(2 * sum(eight["here"]["seconds"].values()) / 3600)
    assert found["here"]["dollars"] is None
    without = json.loads(planned(monkeypatch, capsys, "--json", "--set", "reward.gold=false"))
    assert without["here"]["seconds"].keys() == found["here"]["seconds"].keys() - {"gold"}


def test_several_gpus_share_the_time_and_with_shard_the_memory() -> None:
    sets = ["depth=24", "context=1024", "pretrain.batch_tokens=524288", "pretrain.micro_tokens=8192",
            "pretrain.matrix_lr=0"]  # fmt: skip

    def base(processes: int, *more: str) -> Cost:
        recipe = recipes.resolve(recipes.load("tiny", [*sets, *more]))
        return estimate(recipe, torch.bfloat16, cpu=False, processes=processes)[0]

    alone, whole, split = base(1), base(8), base(8, "pretrain.shard=true")
    assert alone.flops == whole.flops == split.flops
    assert alone.bytes == whole.bytes
    weights = parameters(shape(recipes.resolve(recipes.load("tiny", sets))))
    # 18 bytes a weight became an eighth of 16, and 4 for gradients that add up over the eight micro-batches of each
    assert 0.9 < (alone.bytes - split.bytes) / (12 * weights) < 1.0
    once = base(64, "pretrain.shard=true")  # each has one micro-batch: nothing adds up
    assert 0.8 < (split.bytes - once.bytes) / (5.75 * weights) < 1.05


def test_what_does_not_fit_is_not_timed_and_why_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "memory", lambda device: 10**6)
    monkeypatch.setattr("unmask.pipeline.plan.Decoder", None)  # its weights would not fit either
    timed = whole_plan(recipes.resolve(recipes.load("tiny")), CPU)
    assert not timed.seconds and "it takes 1 GB in one process, of 0 that there are" in (timed.untimed or "")
    text = " ".join(planned(monkeypatch, capsys).split())
    assert "not timed: it takes" in text
    assert json.loads(planned(monkeypatch, capsys, "--json"))["here"]["seconds"] == {}


def test_a_run_that_is_done_is_said_to_be_though_it_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda device: 10**6)
    recipe = recipes.resolve(recipes.load("tiny"))
    builder: Any = SimpleNamespace(recipe=recipe, device=CPU, ranks=Ranks(), directory=tmp_path, missing=list)
    assert "not timed: it takes" in show.opening(recipe, CPU, plan(builder))
    (tmp_path / "summary.json").touch()
    assert "all is there" in show.opening(recipe, CPU, plan(builder))


def test_several_processes_train_in_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("unmask.pipeline.plan._now", lambda device: float(next(clock)))
    recipe = recipes.resolve(recipes.load("tiny", SMALL))
    rows: list[int] = []

    def generated(model: Any, prompts: Any, **settings: Any) -> list[Any]:
        rows.append(len(prompts))
        return []

    monkeypatch.setattr("unmask.pipeline.plan.generate", generated)
    alone, four = (whole_plan(recipe, CPU, processes).seconds for processes in (1, 4))
    assert four["sft"] == pytest.approx(alone["sft"] / 4)
    rl = recipe.rl
    assert rows == [rl.answers, rl.answers, rl.answers // 4, rl.answers]  # of RL, and of measuring
    written = ppo_settings(rl).rollouts * rl.answer_tokens / 8  # a step of 8 takes a second of this clock
    assert four["rl"] - written == pytest.approx((alone["rl"] - written) / 4)
    longer = rl.model_copy(update={"prompt_tokens": recipe.context})  # more than the answer leaves room for
    fitting = rl.model_copy(update={"prompt_tokens": recipe.context - rl.answer_tokens})
    assert whole_plan(recipe.model_copy(update={"rl": longer}), CPU).seconds["rl"] == pytest.approx(
        whole_plan(recipe.model_copy(update={"rl": fitting}), CPU).seconds["rl"]
    )
    assert four["measure"] == alone["measure"]  # by one of them
    again = recipes.resolve(recipes.load("tiny", [*SMALL, "sft.recompute=true"]))
    assert whole_plan(again, CPU).seconds["sft"] == pytest.approx(alone["sft"] * 4 / 3)


def test_a_step_is_taken_for_as_fast_as_the_faster_of_two_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(i * i for i in range(10_000))  # what comes later takes longer
    monkeypatch.setattr("unmask.pipeline.plan._now", lambda device: float(next(clock)))
    recipe = recipes.resolve(recipes.load("tiny", SMALL))
    found = whole_plan(recipe, CPU).seconds
    rows = recipe.pretrain.micro_tokens // recipe.context
    # Two looks at the clock for each of two readings, two for the first step and three for the others.
    a_token = (7**2 - 6**2) / (rows * recipe.context)
    assert found["sft"] == pytest.approx(given(recipe.sft.tokens) * a_token)


def test_measuring_is_planned_with_two_answers_a_prompt_and_six_more_of_the_first_128() -> None:
    def steps(prompts: int) -> float:
        recipe = recipes.resolve(recipes.load("tiny", [f"measure.prompts={prompts}"]))
        return (
            _measuring(recipe, a_reading=0.0, a_decode_step=1.0)
            * recipe.rl.answers
            / recipe.measure.answer_tokens
        )

    assert steps(100) - steps(60) == pytest.approx(8 * 40)
    assert steps(500) - steps(200) == pytest.approx(2 * 300)
