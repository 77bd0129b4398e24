"""`unmask plan`: what is planned is counted as records count it, and what is assumed is said."""

import json

import pytest
import torch

from unmask import recipe as recipes
from unmask.cli.main import main
from unmask.errors import UserError
from unmask.model.decoder import Decoder
from unmask.pipeline.estimate import accelerator, accelerators, estimate, shape
from unmask.recipe import given
from unmask.training.cost import training_flops

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
    text = planned(monkeypatch, capsys, "--share", "0.5")
    for stage in ("base", "sft", "reward", "gold", "rl", "measure", "all"):
        assert any(line.split()[:1] == [stage] for line in text.splitlines()), text
    assert "50% of 989 TFLOP/s is assumed" in " ".join(text.split())


def test_json_has_seconds_and_dollars_of_the_same_flops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(planned(monkeypatch, capsys, "--json"))
    h100 = found["accelerators"]["NVIDIA H100 SXM"]
    base = found["stages"][0]
    assert h100["seconds"]["base"] == pytest.approx(base["flops"] / (0.4 * 989.4e12))
    hours = sum(h100["seconds"].values()) / 3600
    assert h100["dollars"] == pytest.approx([1.99 * hours, 5.00 * hours])
    assert found["here"]["seconds"].keys() == {stage["stage"] for stage in found["stages"]} | {"measure"}
