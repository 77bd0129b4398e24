"""The reward model: whole pairs, one score at the last real token, one epoch, a centred scale."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CONTEXT, STOP, decoder, rows, scorer

from unmask.errors import UserError
from unmask.model.scorer import Scorer
from unmask.progress import Progress
from unmask.stages import examples, reward
from unmask.stages.objectives import bradley_terry
from unmask.stages.reward import Preference, Ranking, centre, scores, through_stop, tokenize
from unmask.text.chat import render
from unmask.text.tokenizer import Tokenizer
from unmask.training import loop
from unmask.training.optimizer import Optimizer, OptimizerSettings

LIKED, DISLIKED = 40, 50


def pairs(seed: int, n: int) -> list[Ranking]:
    """Texts of random ids; what is preferred holds LIKED somewhere, what is not DISLIKED in its place."""
    made = []
    for text in rows(seed, n, 20):
        body = [id for id in text if id not in (LIKED, DISLIKED)]
        at = len(body) // 2
        made.append(Ranking([[*body[:at], told, *body[at:], STOP] for told in (LIKED, DISLIKED)], [(0, 1)]))
    return made


def ranked(seed: int, n: int) -> list[Ranking]:
    """Rankings of three texts, the first before the second and both before the third."""
    texts = [[*text, STOP] for text in rows(seed, 3 * n, 20)]
    return [Ranking(texts[i : i + 3], [(0, 1), (0, 2), (1, 2)]) for i in range(0, 3 * n, 3)]


def preference(model: Scorer, data: list[Ranking], **changes: Any) -> Preference:
    plain: dict[str, Any] = {"steps": 4, "batch_rankings": 6, "micro_tokens": 10_000, "seed": 1}
    return Preference(model, data, **{**plain, **changes})


def test_a_score_does_not_depend_on_batch_padding_or_order() -> None:
    model, texts = scorer(0), rows(0, 17, 30)
    together = scores(model, texts)
    alone = torch.cat([scores(model, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores(model, texts[::-1]), together.flip(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores(model, texts, micro_tokens=40), together, atol=1e-5, rtol=1e-5)


def test_the_score_is_read_at_the_last_real_token_even_if_its_id_is_the_padding() -> None:
    model = scorer(1)
    text = [9, 8, 0]
    [short, _] = scores(model, [text, [7] * 12])
    assert short.item() == pytest.approx(model.values(torch.tensor([text]))[0, 2].item(), abs=1e-5)


@pytest.mark.parametrize("data", [pairs(0, 6), ranked(0, 6)], ids=["pairs", "rankings of three"])
def test_the_loss_is_the_mean_of_bradley_terry_over_all_comparisons(data: list[Ranking]) -> None:
    model = scorer(2)
    made = preference(model, data)
    [batch] = made.micro_batches(0)
    loss, metrics = made.loss(batch, made.counts(batch))
    sides = [(r.texts[a], r.texts[b]) for r in data for a, b in r.better]
    chosen, rejected = (scores(model, [side[i] for side in sides]) for i in (0, 1))
    torch.testing.assert_close(loss, bradley_terry(chosen, rejected).mean(), atol=1e-5, rtol=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((chosen > rejected).float().mean().item())
    assert float(metrics["margin"]) == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)


def test_equal_scores_give_ln_2_and_count_as_half_right() -> None:
    model = scorer(0)
    torch.nn.init.zeros_(model.score.weight)
    made = preference(model, pairs(0, 3))
    [batch] = made.micro_batches(0)
    loss, metrics = made.loss(batch, made.counts(batch))
    assert loss.item() == pytest.approx(math.log(2))
    assert float(metrics["accuracy"]) == 0.5


def test_micro_batches_hold_whole_rankings_and_make_the_same_trajectory() -> None:
    trajectories = []
    for micro_tokens in (10_000, 90):
        model = scorer(3).double()
        made = preference(model, ranked(1, 24), micro_tokens=micro_tokens)
        assert all(len(batch.chosen_P) == len(batch.ids_BT) for batch in made.micro_batches(0))
        optimizer = Optimizer(model, OptimizerSettings(lr=1e-2), torch.float64)
        results = [loop.train_step(made, optimizer, step, 1.0, 1.0) for step in range(3)]
        trajectories.append([(r.loss, r.grad_norm, *r.metrics.values()) for r in results])
    assert len(made.micro_batches(0)) > 1
    assert np.allclose(*[np.array(t)[:, :4] for t in trajectories], rtol=0, atol=1e-6)  # padding may differ


def test_an_epoch_reads_every_text_once_in_batches_of_similar_length() -> None:
    data = pairs(2, 50)
    made = preference(scorer(0), data, batch_rankings=8)
    for epoch in range(2):
        batches = [made.micro_batches(epoch * 7 + step) for step in range(7)]
        read = [
            row[:length].tolist()
            for [batch] in batches
            for row, length in zip(batch.ids_BT, batch.lengths_B, strict=True)
        ]
        assert sorted(read) == sorted(text for ranking in data for text in ranking.texts)
    cells = sum(batch.ids_BT.numel() for [batch] in batches)
    assert sum(batch.tokens for [batch] in batches) > 0.85 * cells
    longest = [batch.ids_BT.shape[1] for [batch] in batches]
    assert longest != sorted(longest)  # which batch comes when is shuffled


def test_batches_are_a_pure_function_of_the_step() -> None:
    one, other = preference(scorer(0), pairs(2, 20)), preference(scorer(1), pairs(2, 20))
    other.micro_batches(9)
    for step in (3, 9, 0):
        assert torch.equal(one.micro_batches(step)[0].ids_BT, other.micro_batches(step)[0].ids_BT)


def stage(data: list[Ranking], **changes: Any) -> tuple[Scorer, Preference, Optimizer]:
    plain: dict[str, Any] = {
        "tokens": 10**9,
        "batch_tokens": 400,
        "micro_tokens": 10_000,
        "settings": OptimizerSettings(lr=2e-3),
        "dtype": torch.float32,
        "seed": 4,
    }
    return reward.stage(decoder(5), data, **{**plain, **changes})


def test_it_goes_over_the_texts_once_unless_fewer_tokens_are_wanted() -> None:
    data = pairs(3, 100)
    whole = reward.token_count(data)
    made = stage(data)[1]
    assert (made.steps - 1) * made.batch_rankings < 100 <= made.steps * made.batch_rankings
    fewer = stage(data, tokens=whole // 2)[1]
    assert fewer.steps * fewer.tokens_per_step == pytest.approx(whole / 2, rel=0.2)


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(UserError, match="no pair"):
        stage([])


def test_it_learns_what_people_preferred_and_says_so_of_texts_it_has_not_seen(tmp_path: Path) -> None:
    model, made, optimizer = stage(pairs(4, 600))
    settings = loop.Settings(warmup_tokens=0, decay_tokens=0)
    loop.train(model, made, optimizer, settings, tmp_path, Progress(quiet=True), "reward")
    new = pairs(5, 80)
    right = scores(model, [p.texts[0] for p in new]) > scores(model, [p.texts[1] for p in new])
    assert right.float().mean() > 0.9


def test_the_scorer_starts_from_the_sft_model_with_a_small_head() -> None:
    model = stage(pairs(6, 10))[0]
    for a, b in zip(model.model.parameters(), decoder(5).model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert 0.3 < model.score.weight.std().item() * math.sqrt(33) < 3


def test_centring_makes_the_mean_score_zero_and_leaves_weights_and_order_alone() -> None:
    model, texts = scorer(4), rows(7, 30, 20)
    before, weights = scores(model, texts), [p.clone() for p in model.parameters()]
    offset = centre(model, texts)
    assert model.config.reward_offset == offset == pytest.approx(before.mean().item(), abs=1e-5)
    torch.testing.assert_close(scores(model, texts), before - offset)
    assert centre(model, texts) == offset  # once more changes nothing
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    with pytest.raises(UserError, match="no text"):
        centre(model, [])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["how are you", "very well, thank you", "who is there?"] * 20, 280)


ASKED = {"role": "user", "content": "how are you"}


def said(text: str) -> list[dict[str, str]]:
    return [ASKED, {"role": "assistant", "content": text}]


def test_a_text_to_be_scored_ends_with_the_stop_token_exactly_as_a_finished_answer_does(
    tokenizer: Tokenizer,
) -> None:
    text = through_stop(render(tokenizer, said("well")))
    prompt = render(tokenizer, [ASKED], open_turn=True).ids
    assert text == [*prompt, *tokenizer.encode("well"), tokenizer.turn_end]


def test_texts_beyond_the_context_are_dropped_with_their_comparisons_and_counted(
    tokenizer: Tokenizer,
) -> None:
    short, other, long = said("well"), said("no"), said("very well, thank you " * 30)
    data = [
        examples.Ranking([short, other], [(0, 1)]),
        examples.Ranking([long, short], [(0, 1)]),
        examples.Ranking([[ASKED], short], [(0, 1)]),
        examples.Ranking([long, short, other], [(0, 1), (0, 2), (2, 1)]),
    ]
    kept, dropped = tokenize(data, tokenizer, CONTEXT)
    assert dropped == 5  # the long ones, the one without an answer, and the two left alone by them
    one, two = (through_stop(render(tokenizer, chat)) for chat in (short, other))
    assert kept == [Ranking([one, two], [(0, 1)]), Ranking([one, two], [(1, 0)])]
