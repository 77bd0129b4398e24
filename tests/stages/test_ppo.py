"""PPO: exact at its first step, a pure function of weights and seed, and it learns what is rewarded."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import CONTEXT, CPU, END_OF_TEXT, STOP, VOCABULARY, answer, decoder, scorer
from torch import Tensor

from unmask.errors import Interrupted, UserError
from unmask.model.scorer import Scorer
from unmask.progress import Progress
from unmask.stages import ppo, pretrain
from unmask.stages.ppo import PPO, ActorCritic, PPOSettings
from unmask.stages.reward import scores
from unmask.stages.rollouts import (
    Prompts,
    Reward,
    RewardModel,
    Rollout,
    Source,
    actions,
    answered,
    log_probs,
    score_spread,
)
from unmask.training import loop
from unmask.training.optimizer import Optimizer
from unmask.training.parallel import ALONE, Ranks

SETTINGS = {
    "rollouts": 3,
    "answers": 12,
    "answer_tokens": 8,
    "epochs": 2,
    "minibatches": 2,
    "micro_tokens": 60,
    "rows": 8,
}
STOPS = range(STOP, 10)  # so that fresh models stop now and then
PROMPTS = [[10, 11], [12, 13, 14, 15], [16], [17, 18, 19, 20, 21]]


Stage = tuple[ActorCritic, PPO, Optimizer]


def begin(
    reward: Reward | None = None,
    lr: float = 1e-3,
    say: Callable[[str], None] = print,
    text: ppo.RawText | None = None,
    ranks: Ranks = ALONE,
    **changes: Any,
) -> Stage:
    """The stage from fresh models; a `reward` that is given judges in the reward model's place."""
    model, objective, optimizer = ppo.stage(
        decoder(1),
        scorer(2),
        [Source("made up", PROMPTS, 1.0)],
        PPOSettings(**{**SETTINGS, **changes}),
        stop_ids=STOPS,
        lr=lr,
        critic_lr=3 * lr,
        dtype=torch.float32,
        seed=5,
        text=text,
        say=say,
        ranks=ranks,
    )
    if reward is not None:
        objective.reward = reward
    return model, objective, optimizer


def train(stage: Stage, directory: Path, ranks: Ranks = ALONE) -> loop.Outcome:
    model, objective, optimizer = stage
    settings = loop.Settings(warmup_tokens=0, decay_tokens=0)
    return loop.train(
        model, objective, optimizer, settings, directory, Progress(quiet=True), "RL", ranks=ranks
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_at_the_first_inner_step_the_ratio_is_exactly_one_and_no_value_has_moved(tmp_path: Path) -> None:
    train(begin(), tmp_path)
    seen = lines(tmp_path)
    per_rollout = 4
    for first in seen[::per_rollout]:
        assert first["ratio_distance"] == 0
        assert first["kl_old_new"] == 0
        assert first["clip_fraction"] == 0
    assert all(line["ratio_distance"] > 0 for i, line in enumerate(seen) if i % per_rollout)


def test_before_any_step_policy_and_reference_are_the_same_to_the_last_bit() -> None:
    _, objective, _ = begin()
    assert objective.collect(0).numbers["kl_child_parent"] == 0


def test_the_samplers_log_probabilities_are_compared_with_the_trainers() -> None:
    _, objective, _ = begin()
    numbers = objective.collect(0).numbers
    assert 0 <= numbers["sampler_gap_mean"] <= numbers["sampler_gap_max"] < 1e-4


def test_a_sampler_that_draws_from_another_distribution_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    _, objective, _ = begin(say=said.append)
    objective.collect(0)
    assert not said
    other = decoder(3)
    monkeypatch.setattr(ppo, "answered", lambda policy, prompts, **keys: answered(other, prompts, **keys))
    objective.collect(0)
    assert any("nats from those trained on" in line for line in said)


def test_values_are_read_before_each_action_and_less_the_reward_models_offset() -> None:
    """Three actions after a prompt of two: a critic that says its position must give 1, 2, 3."""
    _, objective, _ = begin()

    class Position(torch.nn.Module):
        config = replace(objective.model.critic.config, reward_offset=0.5)

        def values(self, ids_BT: Tensor, at_N: Tensor) -> Tensor:
            return torch.arange(ids_BT.shape[1]).expand(ids_BT.shape).float().flatten()[at_N]

    objective.model.critic = Position()  # type: ignore[assignment]
    acts = actions(Rollout([[10, 11]], [answer([20, 21, STOP])]), [0], CPU)
    assert objective._values(acts).tolist() == [1 - 0.5, 2 - 0.5, 3 - 0.5]


def spread_of(judge: Scorer, prompts: Sequence[Sequence[int]] = PROMPTS * 6) -> float:
    whole = RewardModel(judge, 60)
    return score_spread(decoder(1), whole, prompts, answer_tokens=8, stop_ids=STOPS, seed=5, rows=8)


def test_the_price_of_a_nat_grows_with_the_reward_models_margins_and_not_with_its_opinion_of_prompts() -> (
    None
):
    judge = scorer(2)
    plain = spread_of(judge)
    judge.score.weight.data *= 8
    judge.config = replace(judge.config, reward_offset=3.0)
    assert spread_of(judge) == pytest.approx(8 * plain, rel=1e-5)

    class OfThePrompt(torch.nn.Module):
        """Scores by the first token alone."""

        config, score = judge.config, judge.score

        def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
            return ids_BT[:, 0].float()

    assert spread_of(cast(Scorer, OfThePrompt())) == 0


def test_the_spread_is_that_of_the_score_between_answers_to_one_prompt() -> None:
    judge, prompt = scorer(2), PROMPTS[1]
    said = answered(decoder(1), [prompt] * 400, answer_tokens=8, stop_ids=STOPS, seed=9, rows=50)
    texts = [[*prompt, *each.ids] for each in said.answers if each.finished]
    assert spread_of(judge, [prompt] * 400) == pytest.approx(scores(judge, texts).std().item(), rel=0.15)


def test_the_reward_is_the_score_at_the_stop_token_less_beta_times_k1_everywhere() -> None:
    """With γ = λ = 1 returns are the rewards ahead, recomputed here from full log-softmax tables."""
    model, objective, _ = begin(kl=0.3, gamma=1.0, gae_lambda=1.0, reward=lambda rollout: torch.arange(12.0))
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    experience = objective.collect(0)
    for row, (prompt, said) in enumerate(zip(*experience.rollout, strict=True)):
        ids = torch.tensor([[*prompt, *said.ids]])
        tables = [m(ids)[0].log_softmax(-1).detach() for m in (model.policy, objective.reference)]
        at = range(len(prompt) - 1, ids.shape[1] - 1)
        k1 = [float(tables[0][t, ids[0, t + 1]] - tables[1][t, ids[0, t + 1]]) for t in at]
        for i in range(len(said.ids)):
            expected = row - 0.3 * objective.spread * sum(k1[i:])
            assert experience.returns_BA[row, i].item() == pytest.approx(expected, abs=1e-3)
    assert experience.numbers["kl_child_parent"] != 0


def test_an_answer_that_was_cut_is_worth_the_penalty_less_than_the_critic_expected_of_its_prompt() -> None:
    _, objective, _ = begin(kl=0.0, truncation_penalty=3.0, gamma=1.0, gae_lambda=1.0)
    found = objective.collect(0)
    cut = [i for i, said in enumerate(found.rollout.answers) if not said.finished]
    assert 0 < len(cut) < len(found.rollout.answers)
    texts = [[*p, *a.ids] for p, a in zip(*found.rollout, strict=True) if a.finished]
    assert found.numbers["reward"] == pytest.approx(scores(scorer(2), texts).mean().item(), abs=1e-5)
    for i in cut:
        expected = found.values_BA[i, 0] - 3 * objective.spread
        torch.testing.assert_close(found.returns_BA[i], expected.expand_as(found.returns_BA[i]))


def test_advantages_are_whitened_over_the_whole_rollout_whatever_the_micro_batches() -> None:
    wide, narrow = (begin(micro_tokens=n)[1].collect(0) for n in (10_000, 20))
    white = wide.advantages_BA[wide.mask_BA]
    assert white.mean().item() == pytest.approx(0, abs=1e-5)
    assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(wide.advantages_BA, narrow.advantages_BA, atol=1e-4, rtol=1e-4)


def test_micro_batches_of_any_size_make_the_same_step() -> None:
    results = []
    for micro_tokens in (10_000, 40):
        _, objective, optimizer = begin(micro_tokens=micro_tokens, minibatches=1)
        batches = objective.micro_batches(0)
        result = loop.train_step(objective, optimizer, 0, 1.0, 1e9)
        results.append((len(batches), result))
    (few, one), (many, other) = results
    assert few == 1 < many
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    for name in one.metrics:
        assert one.metrics[name] == pytest.approx(other.metrics[name], abs=1e-4), name


@pytest.mark.parametrize("answers", [12, 1])
def test_two_ranks_each_answer_half_and_learn_from_the_same_rollouts_as_one_process(
    tmp_path: Path, answers: int
) -> None:
    """Of one answer the second rank has none."""
    for name, launch in {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }.items():
        (tmp_path / name).mkdir()
        script = Path(__file__).with_name("ppo_ranks.py")
        command = [sys.executable, *launch, str(script), str(tmp_path / name), str(answers)]
        env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, timeout=120, env=env, capture_output=True)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    for ours, theirs in zip(two, one, strict=True):
        for metric in ours.keys() - {"seconds"}:
            number, other = (math.nan if line[metric] is None else line[metric] for line in (ours, theirs))
            assert number == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True), metric
    per_rollout = len(one) // 3
    assert [line["ratio_distance"] for line in two[::per_rollout]] == [0, 0, 0]
    weights = [torch.load(tmp_path / "two" / f"rank_{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    alone, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("one/rank_0.json", "two/rank_0.json", "two/rank_1.json")
    )
    # The first are those that the score's spread is taken from: four an answer.
    assert first["written"] == [2 * answers, *[(answers + 1) // 2] * 3]
    assert second["written"] == [2 * answers, *[answers // 2] * 3]
    for judge in ("by the reward model", "by the second judge"):
        assert first[judge] + second[judge] == alone[judge]


def test_of_several_ranks_each_gets_a_part_of_a_step() -> None:
    for size in (1, 2, 4):
        _, objective, _ = begin(answers=16, micro_tokens=10_000, minibatches=1)
        objective.ranks = Ranks(0, size)
        rollout = Rollout([PROMPTS[i % 4] for i in range(16)], [answer([20, 21, STOP])] * 16)
        [groups] = objective._parts(0, 0, rollout)
        assert sorted(row for group in groups for row in group) == list(range(16))
        assert len(groups) == 1 if size == 1 else len(groups) >= size


def test_the_loss_is_policy_plus_weighted_value_loss_and_both_networks_learn() -> None:
    model, objective, optimizer = begin(value_weight=0.3)
    before = [p.clone() for p in (model.policy.head, model.critic.score.weight)]
    result = loop.train_step(objective, optimizer, 0, 1.0, 1.0)
    numbers = result.metrics
    assert numbers["value_loss"] > 0
    assert result.loss == pytest.approx(numbers["policy_loss"] + 0.3 * numbers["value_loss"], abs=1e-6)
    for old, new in zip(before, (model.policy.head, model.critic.score.weight), strict=True):
        assert not torch.equal(old, new)


class Shards:
    """Rows of a made-up text, as pretraining reads them."""

    fingerprint = "made up"

    def rows(self, length: int) -> int:
        return 10

    def row(self, i: int, length: int) -> NDArray[np.int64]:
        return np.arange(i, i + length + 1) % (VOCABULARY - 4) + 4


def test_raw_text_takes_part_with_its_weight_and_its_own_denominator() -> None:
    text = ppo.RawText([pretrain.Source("raw", cast(Any, Shards()), 1.0)], 3, 12, END_OF_TEXT, True)
    with_text, without = begin(text=text, ptx=2.0, micro_tokens=24), begin(micro_tokens=24)
    [mixed, plain] = [loop.train_step(o, optimizer, 0, 1.0, 1.0) for _, o, optimizer in (with_text, without)]
    raw = [batch for batch in with_text[1].micro_batches(0) if isinstance(batch, list)]
    assert len(raw) == 2
    rows = torch.cat([with_text[1]._text().read(batch) for batch in raw])
    logits = decoder(1)(rows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert mixed.metrics["text_loss"] == pytest.approx(expected, rel=1e-4)
    assert mixed.loss == pytest.approx(plain.loss + 2 * expected, rel=1e-4)
    assert mixed.tokens == plain.tokens + 3 * 12
    for other in (text._replace(rows=4), text._replace(cross_documents=False)):
        assert with_text[1].fingerprint != begin(ptx=2.0, micro_tokens=24, text=other)[1].fingerprint


def test_while_the_critic_warms_up_the_policy_stands_still_and_raw_text_waits() -> None:
    text = ppo.RawText([pretrain.Source("raw", cast(Any, Shards()), 1.0)], 3, 12, END_OF_TEXT, True)
    model, objective, optimizer = begin(text=text, ptx=1.0, critic_rollouts=1)
    fresh = {name: weight.clone() for name, weight in model.named_parameters()}

    def moved(part: str) -> bool:
        return any(
            not torch.equal(weight, fresh[name])
            for name, weight in model.named_parameters()
            if name.startswith(part)
        )

    for step in range(objective.pause_every):
        result = loop.train_step(objective, optimizer, step, 1.0, 1.0)
        assert result.loss == pytest.approx(objective.settings.value_weight * result.metrics["value_loss"])
    assert moved("critic.")
    assert not moved("policy.")
    grads = [master.grad for name, master in optimizer.masters.items() if name.startswith("policy.")]
    assert grads and all(
        grad is not None and not grad.any() for grad in grads
    )  # none would leave Adam's averages
    loop.train_step(objective, optimizer, objective.pause_every, 1.0, 1.0)
    assert moved("policy.")


def test_a_weight_for_raw_text_without_text_is_an_error() -> None:
    with pytest.raises(UserError, match="no raw text"):
        begin(ptx=1.0)


def test_each_epoch_goes_over_every_answer_once_in_another_order() -> None:
    _, objective, _ = begin()
    rollout = objective.collect(0).rollout
    epochs = []
    for epoch in range(2):
        parts = objective._parts(0, epoch, rollout)
        assert len(parts) == 2
        rows = [row for part in parts for micro in part for row in micro]
        assert sorted(rows) == list(range(12))
        epochs.append([sorted(row for micro in part for row in micro) for part in parts])
    assert epochs[0] != epochs[1]
    taken = [[b.actions.taken_N.tolist() for b in objective.micro_batches(step)] for step in range(4)]
    assert taken[:2] != taken[2:]


def test_a_rollout_is_a_pure_function_of_weights_index_and_seed() -> None:
    first, again = begin()[1], begin()[1]
    again.collect(0)
    for _ in range(3):
        torch.rand(1)  # the global generator has no part in it
    a, b = first.collect(1), again.collect(1)
    assert a.rollout == b.rollout
    assert torch.equal(a.advantages_BA, b.advantages_BA)
    assert a.rollout.answers != first.collect(0).rollout.answers


def test_the_same_prompts_are_answered_and_shuffled_anew_in_another_rollout() -> None:
    _, objective, _ = begin()
    objective.prompts = Prompts([Source("one", [PROMPTS[1]], 1.0)], room=40, seed=1)
    first, second = objective.collect(0), objective.collect(1)
    assert first.rollout.prompts == second.rollout.prompts
    assert first.rollout.answers != second.rollout.answers
    shuffled = [
        [sorted(row for micro in part for row in micro) for part in objective._parts(i, 0, first.rollout)]
        for i in (0, 1)
    ]
    assert shuffled[0] != shuffled[1]


def test_what_is_logged_of_a_step_is_computed_from_the_ratios_by_hand() -> None:
    """k3 of the old policy to the new one, E_old[r − 1 − ln r], and the share of |r − 1| above the clip."""
    model, objective, _ = begin(micro_tokens=10_000, minibatches=1, ratio_clip=0.1)
    [batch] = objective.micro_batches(0)
    assert not isinstance(batch, list)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    _, numbers = objective.loss(batch, objective.counts(batch))
    log_ratio = (log_probs(model.policy, batch.actions) - batch.log_probs_N).detach()
    ratio = log_ratio.exp()
    far = ((ratio - 1).abs() > 0.1).float().mean()
    assert 0 < far < 1
    assert float(numbers["clip_fraction"]) == pytest.approx(float(far))
    assert float(numbers["kl_old_new"]) == pytest.approx(float((ratio - 1 - log_ratio).mean()), rel=1e-4)
    assert float(numbers["ratio_distance"]) == pytest.approx(float((ratio - 1).abs().mean()), rel=1e-4)


def test_training_that_was_stopped_and_resumed_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the second rollout's steps: the loop goes on to its end; none is stored."""
    whole = begin()
    train(whole, tmp_path / "whole")

    stopped = begin()
    objective = stopped[1]
    real = objective.micro_batches

    def interrupting(step: int) -> Any:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step)

    monkeypatch.setattr(objective, "micro_batches", interrupting)
    with pytest.raises(Interrupted):
        train(stopped, tmp_path / "parts")
    assert len(lines(tmp_path / "parts")) == 8  # of 12: rollouts have 4 steps each
    resumed = begin()
    train(resumed, tmp_path / "parts")

    for (name, a), (_, b) in zip(whole[0].named_parameters(), resumed[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    strip = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / part)]
        for part in ("whole", "parts")
    ]
    assert strip[0] == strip[1]


def high(rollout: Rollout) -> Tensor:
    """A checker: the share of an answer's ids that lie in the upper half of the vocabulary."""
    ids = [torch.tensor(answer.ids) for answer in rollout.answers]
    return torch.stack([(row >= VOCABULARY // 2).float().mean() for row in ids])


def test_it_learns_what_is_rewarded_and_a_large_beta_keeps_it_at_its_reference(tmp_path: Path) -> None:
    changes = {"rollouts": 12, "answers": 24, "answer_tokens": 4, "minibatches": 1, "lr": 4e-3}
    for kl in (0.0, 3.0):
        train(begin(reward=high, kl=kl, **changes), tmp_path / str(kl))
    free, kept = lines(tmp_path / "0.0"), lines(tmp_path / "3.0")
    assert free[-1]["reward"] > free[0]["reward"] + 0.25
    assert free[-1]["kl_child_parent"] > 0.2
    assert abs(kept[-1]["kl_child_parent"]) < free[-1]["kl_child_parent"] / 3


def test_reference_and_reward_model_stay_as_they_were(tmp_path: Path) -> None:
    stage = begin()
    train(stage, tmp_path)
    for ours, fresh in zip(stage[1].reference.parameters(), decoder(1).parameters(), strict=True):
        assert torch.equal(ours, fresh)
    assert not torch.equal(stage[0].policy.head, decoder(1).head)


def test_policy_and_critic_start_as_copies_of_sft_and_reward_model_and_learn_at_their_own_rates() -> None:
    model, _, optimizer = begin(lr=1e-4)
    for ours, theirs in ((model.policy, decoder(1)), (model.critic, scorer(2))):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert {optimizer.scales[name] for name in optimizer.scales if name.startswith("policy.")} == {1.0}
    assert {round(optimizer.scales[name], 6) for name in optimizer.scales if name.startswith("critic.")} == {
        3.0
    }
    assert optimizer.settings.eps == 1e-5


def test_metrics_say_how_the_policy_does_and_stand_once_a_step(tmp_path: Path) -> None:
    train(begin(micro_tokens=20), tmp_path)
    for line in lines(tmp_path):
        assert 0 <= line["stop_rate"] <= 1
        assert line["truncated"] == pytest.approx(12 * (1 - line["stop_rate"]))
        assert 1 <= line["answer_tokens"] <= 8
        assert 0 < line["entropy"] < 2 * torch.tensor(float(VOCABULARY)).log()
        assert line["explained_variance"] <= 1
        assert {"reward", "policy_loss", "value_loss", "sampler_gap_max"} <= line.keys()


def test_gold_is_the_second_judges_score_of_whole_answers_at_half_the_longest_length() -> None:
    _, objective, _ = begin(answers=24)
    assert "gold" not in objective.collect(0).numbers
    objective.gold = RewardModel(scorer(3), 4096)
    found = objective.collect(0)
    whole = [i for i, answer in enumerate(found.rollout.answers) if answer.finished]
    lengths = np.array([len(found.rollout.answers[i].ids) for i in whole])
    assert len(set(lengths)) > 1
    texts = [[*found.rollout.prompts[i], *found.rollout.answers[i].ids] for i in whole]
    slope, at_0 = np.polyfit(lengths, scores(scorer(3), texts).numpy(), 1)
    assert found.numbers["gold"] == pytest.approx(at_0 + 4 * slope, abs=1e-4)


def test_broken_rollouts_are_said_once_for_as_long_as_they_stay(tmp_path: Path) -> None:
    said: list[str] = []
    train(begin(reward=lambda rollout: torch.zeros(12), say=said.append), tmp_path)
    assert len([text for text in said if "same reward" in text]) == 1
    assert said[0].startswith("rollout 1 of 3: ")


def test_a_reward_that_is_nan_stops_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finite number"):
        train(begin(reward=lambda rollout: torch.full((12,), float("nan"))), tmp_path)


def test_more_minibatches_than_answers_is_an_error() -> None:
    with pytest.raises(UserError, match=r"minibatches is 13.*12"):
        begin(minibatches=13)


def test_a_prompt_without_room_for_the_answer_is_an_error() -> None:
    long: Sequence[int] = [9] * (CONTEXT - 7)
    with pytest.raises(UserError, match="the context leaves 40"):
        ppo.stage(
            decoder(1),
            scorer(2),
            [Source("chat", [long], 1.0)],
            PPOSettings(rollouts=1, answers=2, answer_tokens=8),
            stop_ids=[STOP],
            lr=1e-4,
            critic_lr=1e-4,
            dtype=torch.float32,
            seed=0,
        )


def test_prompts_are_fingerprinted_and_so_is_every_setting() -> None:
    assert begin()[1].fingerprint == begin()[1].fingerprint
    assert begin()[1].fingerprint != begin(kl=0.7)[1].fingerprint
    assert isinstance(Prompts([Source("a", PROMPTS, 1.0)], room=40, seed=1).fingerprint, str)
