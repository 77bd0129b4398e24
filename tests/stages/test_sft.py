"""SFT: only what assistants say is learned, neighbours in a row see nothing of each other, answers end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import PAD, STOP, decoder, rows
from torch import Tensor

from unmask.errors import UserError
from unmask.generation.engine import generate
from unmask.model.decoder import Decoder
from unmask.progress import Progress
from unmask.stages import sft
from unmask.stages.sft import Batch, Imitation, Source
from unmask.text.chat import Rendered
from unmask.training import loop
from unmask.training.optimizer import Optimizer, OptimizerSettings

LENGTH = 24


def chat(prompt: Sequence[int], answer: Sequence[int]) -> Rendered:
    """As `render` marks it: the prompt is not trained, the answer and its stop are, what follows is not."""
    ids = [*prompt, *answer, STOP, 1]
    return Rendered(ids, [False] * len(prompt) + [True] * (len(answer) + 1) + [False])


def chats(seed: int, n: int) -> list[Rendered]:
    return [chat(*pair) for pair in zip(rows(seed, n, 8), rows(seed + 100, n, 6), strict=True)]


def imitation(model: Decoder, *sources: Source, **changes: Any) -> Imitation:
    plain: dict[str, Any] = {
        "length": LENGTH, "tokens": 400, "batch_rows": 4, "micro_rows": 4, "pad": PAD, "seed": 3
    }  # fmt: skip
    return Imitation(model, sources or (Source("made up", chats(0, 40), 1.0),), **{**plain, **changes})


def nats(model: Decoder, example: Rendered) -> Tensor:
    """−ln p of each trained id of one conversation read alone, from the full table of logits."""
    table = model(torch.tensor([example.ids]))[0].log_softmax(-1)
    trained = [i for i, counts in enumerate(example.trained) if counts]
    return torch.stack([-table[i - 1, example.ids[i]] for i in trained])


def whole_step(made: Imitation, step: int) -> tuple[Tensor, int]:
    batches = made.micro_batches(step)
    total = sum(made.counts(batch)["trained"] for batch in batches)
    losses = [made.loss(batch, {"trained": total})[0] for batch in batches]
    return torch.stack(losses).sum(), total


def test_a_packed_row_has_the_loss_of_each_conversation_alone() -> None:
    model, examples = decoder(0), chats(1, 5)
    made = imitation(model, Source("few", examples, 1.0), length=96, batch_rows=1)
    [batch] = made.micro_batches(0)
    assert batch.documents_BT.max() == 4  # all five share the row
    loss, total = whole_step(made, 0)
    alone = torch.cat([nats(model, example) for example in examples])
    assert total == len(alone)
    torch.testing.assert_close(loss, alone.mean(), atol=1e-5, rtol=1e-5)


def test_positions_begin_anew_with_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative, so the loss does not tell: look at what the model is given."""
    model, seen = decoder(0), list[Tensor]()
    hidden = model.hidden

    def spy(ids_BT: Tensor, **where: Tensor) -> Tensor:
        seen.append(where["positions_BT"])
        return hidden(ids_BT, **where)

    monkeypatch.setattr(model, "hidden", spy)
    example = chat([10, 11], [12])
    whole_step(imitation(model, Source("two", [example, example], 1.0), batch_rows=1), 0)
    assert seen[0].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_only_what_the_assistant_says_and_its_stop_are_learned() -> None:
    example = chat([10, 11, 12], [20, 21])
    made = imitation(decoder(0), Source("one", [example], 1.0), batch_rows=1)
    [batch] = made.micro_batches(0)
    assert batch.targets_N.tolist() == [20, 21, STOP]
    assert batch.before_N.tolist() == [2, 3, 4]


def test_the_first_token_of_a_conversation_is_no_target_even_if_it_is_trained() -> None:
    spoken = Rendered([30, 31, STOP], [True, True, True])
    made = imitation(decoder(0), Source("two", [spoken, spoken], 1.0), batch_rows=1)
    assert made.micro_batches(0)[0].targets_N.tolist() == [31, STOP] * 2


@pytest.mark.parametrize("micro_rows", [1, 3])
def test_micro_batches_of_unequal_counts_make_the_same_trajectory(micro_rows: int) -> None:
    trajectories = []
    for size in (4, micro_rows):
        model = decoder(1).double()
        made = imitation(model, micro_rows=size)
        optimizer = Optimizer(model, OptimizerSettings(lr=1e-2), torch.float64)
        results = [loop.train_step(made, optimizer, step, 1.0, 1.0) for step in range(3)]
        trajectories.append([(result.loss, result.grad_norm) for result in results])
    counted = {
        made.counts(batch)["trained"] for batch in imitation(decoder(1), micro_rows=1).micro_batches(0)
    }
    assert len(counted) > 1
    assert np.allclose(trajectories[0], trajectories[1], rtol=0, atol=1e-6)


def test_a_micro_batch_in_which_nothing_counts_has_zero_loss_and_zero_gradient() -> None:
    model = decoder(2)
    made = imitation(model)
    [batch] = made.micro_batches(0)
    silent = batch._replace(before_N=batch.before_N[:0], targets_N=batch.targets_N[:0])
    for total in (0, 17):
        loss, _ = made.loss(silent, {"trained": total})
        assert loss.item() == 0
        loss.backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


class WithSilence:
    """The objective with a micro-batch added to every step in which nothing counts."""

    def __init__(self, real: Imitation) -> None:
        self.real = real
        self.counts, self.loss, self.tokens = real.counts, real.loss, real.tokens

    def micro_batches(self, step: int) -> list[Batch]:
        batches = self.real.micro_batches(step)
        [first, *_] = batches
        return [first._replace(before_N=first.before_N[:0], targets_N=first.targets_N[:0]), *batches]


def test_a_silent_micro_batch_leaves_the_step_as_it_is() -> None:
    results = []
    for wrap in (lambda made: made, WithSilence):
        model = decoder(3).double()
        optimizer = Optimizer(model, OptimizerSettings(lr=1e-2), torch.float64)
        result = loop.train_step(wrap(imitation(model)), optimizer, 0, 1.0, 1.0)
        results.append((result.loss, result.grad_norm))
    assert results[0] == pytest.approx(results[1], abs=1e-12)


def test_rows_behind_the_last_real_token_are_cut_and_change_nothing() -> None:
    model, example = decoder(4), chats(2, 1)
    short, long = (imitation(model, Source("one", example, 1.0), length=n) for n in (20, 40))
    assert torch.equal(short.micro_batches(0)[0].ids_BT, long.micro_batches(0)[0].ids_BT)
    assert short.micro_batches(0)[0].ids_BT.shape[1] == len(example[0].ids) - 2  # without stop and line break


def test_batches_are_a_pure_function_of_the_step_and_sources_keep_their_shares() -> None:
    few, many = Source("few", chats(3, 5), 0.25), Source("many", chats(4, 60), 0.75)
    one, other = (imitation(decoder(0), few, many) for _ in range(2))
    other.micro_batches(9)
    ids = [one.micro_batches(step)[0].ids_BT for step in range(8)]
    assert torch.equal(ids[7], other.micro_batches(7)[0].ids_BT)
    assert not torch.equal(ids[0], ids[1])
    of_few = {id for example in few.examples for id in [tuple(example.ids[:3])]}
    starts = [tuple(row[:3].tolist()) for batch in ids for row in batch]
    assert sum(start in of_few for start in starts) == 8  # of 32 rows, as many as its share


def test_what_was_cut_or_left_out_is_counted() -> None:
    examples = [*chats(5, 6), chat([9] * 10, [8] * 40), chat([9] * 60, [8])]
    made = imitation(decoder(0), Source("mixed", examples, 1.0))
    assert sum(made.dropped.values()) == 3  # two are cut, and of one of them nothing is left


def test_an_answer_that_was_cut_has_no_stop_in_the_loss() -> None:
    made = imitation(decoder(0), Source("long", [chat([9], [8] * 40)], 1.0), batch_rows=1)
    assert made.micro_batches(0)[0].targets_N.tolist() == [8] * LENGTH


def test_a_source_without_any_answer_is_an_error_that_names_it() -> None:
    silent = Rendered([5, 6, 7], [False, False, False])
    with pytest.raises(UserError, match=r"'mute'.*no answer"):
        imitation(decoder(0), Source("mute", [silent], 1.0))


def test_the_fingerprint_names_data_shares_and_order() -> None:
    model, source = decoder(0), Source("a", chats(0, 20), 1.0)
    variants = [
        imitation(model, source),
        imitation(model, source, seed=4),
        imitation(model, source._replace(examples=chats(1, 20))),
        imitation(model, source, source._replace(name="b")),
        imitation(model, source, length=LENGTH + 1),
    ]
    assert len({made.fingerprint for made in variants}) == len(variants)


def test_it_learns_an_answer_and_to_stop_after_it(tmp_path: Path) -> None:
    """Questions whose first id names the answer; after training, the greedy answer is right and ends."""
    asked = {id: chat([id, 50], [id + 20, id + 21]) for id in range(4, 12)}
    model, made, optimizer = sft.stage(
        decoder(5),
        [Source("facts", list(asked.values()), 1.0)],
        length=LENGTH,
        tokens=12_000,
        batch_tokens=8 * LENGTH,
        micro_tokens=4 * LENGTH,
        pad=PAD,
        settings=OptimizerSettings(lr=3e-3),
        dtype=torch.float32,
        seed=1,
    )
    assert made.steps * made.tokens_per_step == pytest.approx(12_000, rel=0.05)
    settings = loop.Settings(warmup_tokens=0, decay_tokens=6_000)
    outcome = loop.train(model, made, optimizer, settings, tmp_path, Progress(quiet=True), "sft")
    assert outcome.tokens == pytest.approx(12_000, rel=0.05)
    answers = generate(model, [[id, 50] for id in asked], max_new_tokens=6, stop_ids=[STOP], temperature=0)
    assert [answer.ids for answer in answers] == [[id + 20, id + 21, STOP] for id in asked]
    assert all(answer.finished for answer in answers)
