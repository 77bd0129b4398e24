"""Pretraining: which rows, which targets, which denominator, and that it learns and resumes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import CONFIG, CPU, END_OF_TEXT, VOCABULARY, decoder
from torch.nn import functional

from unmask.errors import UserError
from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.progress import Progress
from unmask.stages import pretrain
from unmask.stages.pretrain import Pretraining, Source, documents_and_positions
from unmask.text.shards import Shards
from unmask.training import loop
from unmask.training.optimizer import Optimizer, OptimizerSettings

LENGTH = 12


class MadeUp:
    """What pretraining asks of shards, over made-up ids: documents that count up from a random id."""

    def __init__(self, seed: int, tokens: int) -> None:
        generator = np.random.default_rng(seed)
        stream: list[int] = []
        while len(stream) < tokens:
            start, length = generator.integers(4, VOCABULARY), generator.integers(3, 15)
            stream += [END_OF_TEXT, *((start + np.arange(length)) % (VOCABULARY - 4) + 4)]
        self.stream, self.tokens, self.fingerprint = (
            np.array(stream[:tokens]),
            tokens,
            f"made up {seed} {tokens}",
        )

    def rows(self, length: int) -> int:
        return (self.tokens - 1) // length

    def row(self, i: int, length: int) -> NDArray[np.int64]:
        return self.stream[i * length : (i + 1) * length + 1]


def source(seed: int = 0, tokens: int = 600, share: float = 1.0) -> Source:
    return Source(f"source {seed}", cast(Shards, MadeUp(seed, tokens)), share)


def objective(model: Decoder, *sources: Source, **changes: Any) -> Pretraining:
    plain: dict[str, Any] = {
        "length": LENGTH,
        "steps": 5,
        "batch_rows": 8,
        "micro_rows": 8,
        "end_of_text": END_OF_TEXT,
        "seed": 3,
    }
    return Pretraining(model, sources or (source(),), **{**plain, **changes})


def test_the_loss_is_the_mean_over_all_tokens_of_minus_log_p_of_the_next_one() -> None:
    model = decoder(0)
    made = objective(model)
    [batch] = made.micro_batches(0)
    loss, _ = made.loss(batch, made.counts(batch))
    ids = made.read(batch)
    expected = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert made.counts(batch) == {"tokens": 8 * LENGTH}


def test_a_fresh_model_starts_at_the_logarithm_of_the_vocabulary() -> None:
    _, made, _ = stage()
    [batch, *_] = made.micro_batches(0)
    loss, _ = made.loss(batch, made.counts(batch))
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.1)


@pytest.mark.parametrize("micro_rows", [1, 3])
def test_micro_batches_of_any_size_make_the_same_trajectory(micro_rows: int) -> None:
    """One batch of 8 rows against 8 of 1, and against 3 + 3 + 2, over three steps in float64."""
    trajectories = []
    for rows in (8, micro_rows):
        model = decoder(1).double()
        made = objective(model, micro_rows=rows)
        optimizer = Optimizer(model, OptimizerSettings(lr=1e-2), torch.float64)
        results = [loop.train_step(made, optimizer, step, 1.0, 1.0) for step in range(3)]
        trajectories.append([(result.loss, result.grad_norm) for result in results])
    assert np.allclose(trajectories[0], trajectories[1], rtol=0, atol=1e-6)


def test_batches_are_a_pure_function_of_the_step() -> None:
    one, other = objective(decoder(0)), objective(decoder(1))
    later = other.micro_batches(4)
    for step in (2, 0, 4):
        assert one.micro_batches(step) == other.micro_batches(step)
    assert later == one.micro_batches(4)
    assert one.micro_batches(0) != one.micro_batches(1)


def test_rows_are_read_by_the_process_that_learns_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made, read, row = objective(decoder(0), micro_rows=2), [], MadeUp.row

    def noted(shards: MadeUp, i: int, length: int) -> NDArray[np.int64]:
        read.append(i)
        return row(shards, i, length)

    monkeypatch.setattr(MadeUp, "row", noted)
    batches = made.micro_batches(0)
    assert read == []
    made.loss(batches[1], {"tokens": 8 * LENGTH})
    assert read == [each.row for each in batches[1]]


def test_sources_fill_every_batch_in_their_shares() -> None:
    first, second = source(1, share=3.0), source(2, share=1.0)
    made = objective(decoder(0), first, second)
    rows = torch.cat([made.read(batch) for step in range(5) for batch in made.micro_batches(step)])
    of_first = {tuple(first.shards.row(i, LENGTH)) for i in range(first.shards.rows(LENGTH))}
    assert sum(tuple(row.tolist()) in of_first for row in rows) == 30


def test_without_cross_document_attention_a_document_reads_as_if_it_were_alone() -> None:
    model = decoder(2)
    document = [END_OF_TEXT, 7, 8, 9]
    row = torch.tensor([[20, 21, *document, END_OF_TEXT, 30]])
    documents, positions = documents_and_positions(row, END_OF_TEXT)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2]]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    hidden = model.hidden(row, positions_BT=positions, documents_BT=documents)
    torch.testing.assert_close(hidden[:, 2:6], model.hidden(torch.tensor([document])), atol=1e-5, rtol=1e-5)


def test_cross_document_attention_is_a_declared_choice() -> None:
    model = decoder(2)
    open_, closed = (objective(model, cross_documents=cross) for cross in (True, False))
    [batch] = open_.micro_batches(0)
    with_, without = (made.loss(batch, made.counts(batch))[0] for made in (open_, closed))
    assert not torch.isclose(with_, without)
    assert open_.fingerprint != closed.fingerprint


def test_the_fingerprint_names_data_and_order() -> None:
    model = decoder(0)
    variants = [
        objective(model),
        objective(model, seed=4),
        objective(model, batch_rows=4),
        objective(model, source(1)),
        objective(model, source(share=0.5), source(1, share=0.5)),
    ]
    assert len({made.fingerprint for made in variants}) == len(variants)
    assert objective(decoder(1)).fingerprint == variants[0].fingerprint


def test_a_source_too_short_for_one_row_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match="'source 5' has 12 tokens"):
        objective(decoder(0), source(5, tokens=12))


def stage(**changes: Any) -> tuple[Decoder, Pretraining, Optimizer]:
    plain: dict[str, Any] = {
        "length": LENGTH,
        "tokens": 60 * 16 * LENGTH + 5,
        "batch_tokens": 16 * LENGTH + 1,
        "micro_tokens": 8 * LENGTH,
        "end_of_text": END_OF_TEXT,
        "settings": OptimizerSettings(lr=1e-2),
        "dtype": torch.float32,
        "device": CPU,
        "seed": 1,
    }
    return pretrain.stage(replace(CONFIG), [source(tokens=2000)], **{**plain, **changes})


def test_amounts_in_tokens_become_whole_rows_and_steps() -> None:
    _, made, _ = stage()
    assert (made.steps, made.batch_rows, made.micro_rows) == (60, 16, 8)
    assert made.tokens_per_step == 16 * LENGTH
    assert [made.tokens(batch) for batch in made.micro_batches(0)] == [8 * LENGTH, 8 * LENGTH]


@pytest.mark.parametrize("changes", [{"tokens": 100}, {"batch_tokens": LENGTH - 1}])
def test_too_few_tokens_for_one_step_is_an_error(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="no step"):
        stage(**changes)


def test_it_learns_and_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loop.Settings(warmup_tokens=0, decay_tokens=500)
    progress = Progress(quiet=True)

    whole = stage()
    outcome = loop.train(*whole, settings, tmp_path / "whole", progress, "base")
    assert outcome.metrics["loss"]["last"] < 0.6 * math.log(VOCABULARY)

    killed = stage()
    real = killed[1].micro_batches

    def dying(step: int) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return real(step)

    monkeypatch.setattr(killed[1], "micro_batches", dying)
    with pytest.raises(KeyboardInterrupt):
        loop.train(*killed, replace(settings, snapshot_seconds=0.0), tmp_path / "parts", progress, "base")
    resumed = stage()
    loop.train(*resumed, settings, tmp_path / "parts", progress, "base")
    for (name, a), (_, b) in zip(whole[0].named_parameters(), resumed[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("tied", [True, False])
def test_control_tokens_that_were_never_seen_begin_as_the_one_that_was(tied: bool) -> None:
    config = replace(ModelConfig.from_depth(1, vocabulary=64, context=16), tie_word_embeddings=tied)
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    before = model.model.embed_tokens.weight.clone()
    pretrain.give_meaning(model, [1, 2], like=0)
    logits = model(torch.tensor([[0, 9], [1, 9], [2, 9]]))
    for same in ((logits[0], logits[1]), (logits[0], logits[2]), (logits[..., 0], logits[..., 2])):
        torch.testing.assert_close(*same, rtol=0, atol=1e-6)  # rows of one product may round differently
    assert torch.equal(model.model.embed_tokens.weight[3:], before[3:])
