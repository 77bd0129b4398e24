"""Packing changes no loss: every example is there once, alone with itself, and nothing that counts is lost unseen."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_tokenizer import tokenizer

from unmask.model.config import ModelConfig
from unmask.model.decoder import Decoder
from unmask.text.chat import Rendered, render
from unmask.text.packing import Packed, PackedRows, _best_fit, pack

PAD = 3
EXAMPLE = st.lists(st.tuples(st.integers(4, 90), st.booleans()), min_size=1, max_size=30).map(
    lambda pairs: Rendered([id for id, _ in pairs], [trained for _, trained in pairs])
)
EXAMPLES = st.lists(EXAMPLE, max_size=25)


def everything(rows: PackedRows) -> Packed:
    return rows.batch(range(rows.rows))


def documents(packed: Packed) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]:
    """(ids, targets, loss) of every document of every row."""
    found = []
    for b in range(len(packed.ids_BT)):
        numbers = packed.documents_BT[b]
        for number in range(int(numbers.max()) + 1):
            at = numbers == number
            assert packed.positions_BT[b][at].tolist() == list(range(int(at.sum()))), "positions begin anew"
            parts = (packed.ids_BT[b][at], packed.targets_BT[b][at], packed.loss_BT[b][at])
            found.append(tuple(tuple(part.tolist()) for part in parts))
        padding = numbers == -1
        assert not packed.loss_BT[b][padding].any(), "padding never counts"
        assert set(packed.ids_BT[b][padding].tolist()) <= {PAD}
        assert numbers.tolist() == sorted(numbers.tolist(), key=lambda n: (n < 0, n)), (
            "one after the other, padding last"
        )
    return found


@settings(deadline=None)
@given(EXAMPLES, st.integers(1, 12))
def test_every_example_is_there_once_cut_to_the_row_or_counted_as_left_out(
    examples: list[Rendered], length: int
) -> None:
    rows, dropped = pack(examples, length, PAD)
    expected, cut, nothing = [], 0, 0
    for ids, trained in examples:
        while trained and not trained[-1]:
            ids, trained = ids[:-1], trained[:-1]
        cut += len(ids) > length + 1
        ids, trained = ids[: length + 1], trained[: length + 1]
        if any(trained[1:]):
            expected.append((tuple(ids[:-1]), tuple(ids[1:]), tuple(trained[1:])))
        else:
            nothing += 1
    found = documents(everything(rows)) if rows.rows else []
    assert Counter(found) == Counter(expected)
    assert dropped["cut to the row's length"] == cut
    assert dropped["nothing left to learn"] == nothing
    assert rows.tokens == sum(len(ids) for ids, _, _ in expected)
    assert rows.trained == sum(sum(loss) for _, _, loss in expected)
    assert rows.rows <= max(1, len(expected))


@given(st.lists(st.integers(1, 10), max_size=40))
def test_no_row_overflows_and_none_could_have_taken_anothers_examples(sizes: list[int]) -> None:
    rows = _best_fit(sizes, 10)
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(0 < fill <= 10 for fill in filled)
    assert sum(fill <= 5 for fill in filled) <= 1, "two rows at most half full would have been one"


def test_the_best_fit_is_taken() -> None:
    assert _best_fit([3, 6, 7, 4], 10) == [[2, 0], [1, 3]]
    assert _best_fit([5, 8, 7, 2, 3], 10) == [[1, 3], [2, 4], [0]]


def test_packing_is_a_function_of_its_arguments_and_its_fingerprint_sees_every_change() -> None:
    examples = [Rendered([4, 5, 6, 7], [False, True, True, True]), Rendered([8, 9], [False, True])]
    rows = pack(examples, 6, PAD)[0]
    assert pack(examples, 6, PAD)[0].fingerprint == rows.fingerprint
    others = [
        pack(examples, 7, PAD),
        pack(examples, 6, PAD + 1),
        pack(examples[:1], 6, PAD),
        pack([examples[0], Rendered([8, 10], [False, True])], 6, PAD),
        pack([Rendered([4, 5, 6, 7], [False, False, True, True]), examples[1]], 6, PAD),
    ]
    assert len({rows.fingerprint, *(other.fingerprint for other, _ in others)}) == 6


def test_a_batch_is_rows_by_number_in_the_types_that_models_take() -> None:
    examples = [Rendered([4 + i, 5, 6], [False, True, True]) for i in range(6)]
    rows = pack(examples, 4, PAD)[0]
    batch, alone = rows.batch([2, 0]), rows.batch([0])
    assert batch.ids_BT.shape == (2, 4)
    assert torch.equal(batch.ids_BT[1:], alone.ids_BT)
    for tensor in (batch.ids_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT):
        assert tensor.dtype == torch.int64
    assert batch.loss_BT.dtype == torch.bool


def test_an_answer_that_was_cut_has_no_stop_in_the_loss_and_a_whole_one_has() -> None:
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because of the river"}]
    rendered = render(tokenizer(), chat)
    inputs = max(
        i for i, id in enumerate(rendered.ids) if id == tokenizer().turn_end
    )  # all before the last stop
    whole = everything(pack([rendered], inputs, PAD)[0])
    assert whole.targets_BT[whole.loss_BT][-1] == tokenizer().turn_end
    rows, dropped = pack([rendered], inputs - 1, PAD)
    assert dropped == {"cut to the row's length": 1}
    cut = everything(rows)
    assert cut.loss_BT.any()
    assert tokenizer().turn_end not in cut.targets_BT[cut.loss_BT]


def test_the_first_token_of_a_conversation_is_never_predicted_even_if_marked() -> None:
    rows, dropped = pack([Rendered([7], [True]), Rendered([8, 9], [True, False])], 4, PAD)
    assert rows.rows == 0
    assert dropped == {"nothing left to learn": 2}


def test_where_every_example_exceeds_the_row_packing_still_ends() -> None:
    rows, dropped = pack([Rendered([5] * 100, [True] * 100)] * 50, 8, PAD)
    assert rows.rows == 50
    assert dropped["cut to the row's length"] == 50


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(ModelConfig.from_depth(2, vocabulary=96, context=64))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return decoder


@settings(max_examples=15, deadline=None)
@given(examples=st.lists(EXAMPLE, min_size=2, max_size=8))
def test_logits_of_a_packed_row_are_those_of_each_conversation_alone(
    model: Decoder, examples: list[Rendered]
) -> None:
    rows, _ = pack(examples, 40, PAD)
    if not rows.rows:
        return
    packed = everything(rows)
    with torch.no_grad():
        together = model.logits(
            model.hidden(packed.ids_BT, positions_BT=packed.positions_BT, documents_BT=packed.documents_BT)
        )
        assert together.isfinite().all()
        for b in range(rows.rows):
            for number in range(int(packed.documents_BT[b].max()) + 1):
                at = packed.documents_BT[b] == number
                alone = model.logits(model.hidden(packed.ids_BT[b][at][None]))[0]
                torch.testing.assert_close(together[b][at], alone, atol=1e-5, rtol=1e-5)
